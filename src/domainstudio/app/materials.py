"""What a run is made of: the source model, the few pictures, and what both models are told of pictures."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from domainstudio.app.recipe import Recipe
from domainstudio.data.bundled import bundled_model, strip_prefix
from domainstudio.data.captions import caption_table, draw_alternatives, fill, read_captions
from domainstudio.data.domain import Domain, load_domain
from domainstudio.errors import UserError
from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel
from domainstudio.training.binding import Binding
from domainstudio.training.objective import Batch, Prompts

NUM_OTHERS, OTHER_WORDS = 200, 10
"""Prompts that stand for all that users may write, and how long random words make a short one at most."""


def open_source(name_or_path: str, device: torch.device | str = "cpu", config: str | None = None) -> DiffusionModel:
    """A source model by folder, file (with its configuration), hub name or `bundled:NAME`."""
    name = strip_prefix(name_or_path)
    return load_model(name_or_path if name is None else bundled_model(name), device, config)


def recipe_source(recipe: Recipe, device: torch.device | str = "cpu") -> DiffusionModel:
    """The source model of a recipe."""
    return open_source(recipe.pretrained_model_name_or_path, device, recipe.single_file_config)


def open_domain(recipe: Recipe, model: DiffusionModel) -> Domain:
    """The recipe's training pictures at the model's size.

    Raises:
        UserError: if the recipe asks for another resolution, or the pictures cannot be used.
    """
    if recipe.resolution not in (None, model.resolution):
        raise UserError(
            f"resolution={recipe.resolution}, but {recipe.pretrained_model_name_or_path} makes {model.resolution} px "
            f"pictures; leave resolution out (pictures are resized to {model.resolution} px)"
        )
    return load_domain(recipe.instance_data_dir, model.resolution)


@dataclass(frozen=True)
class TrainingPictures:
    """The pictures of a run, (N, 3, H, W) in [-1, 1], and what the two models are told of each (text models alone)."""

    images: Tensor
    student_prompts: tuple[str, ...] = ()
    source_prompts: tuple[str, ...] = ()

    def __add__(self, other: "TrainingPictures") -> "TrainingPictures":
        return TrainingPictures(
            torch.cat([self.images, other.images]),
            self.student_prompts + other.student_prompts,
            self.source_prompts + other.source_prompts,
        )

    def encoded(self, model: DiffusionModel) -> Prompts:
        """The prompts as the model takes them."""
        return Prompts(model.encode_prompts(self.student_prompts), model.encode_prompts(self.source_prompts))


def open_pictures(
    recipe: Recipe, model: DiffusionModel, domain: Domain, log: Callable[[str], None]
) -> TrainingPictures:
    """The pictures of `domain` with their prompts, shown as a table; a subject's pictures come after them.

    With captions and a class_prompt each picture is there twice, told by its caption and told by the class_prompt: a
    model that only ever saw the identifier after details takes both together for the sign of the style.

    Raises:
        UserError: if pictures or captions cannot be used, or prompts are missing or of no use.
    """
    if model.condition is None:
        if given := recipe.text_settings():
            raise UserError(
                f"{recipe.pretrained_model_name_or_path} takes no prompts; remove {', '.join(given)}, or give a "
                "text-to-image model, such as a Stable Diffusion pipeline"
            )
        return TrainingPictures(domain.images)
    if recipe.instance_prompt is None:
        raise UserError(
            f"{recipe.pretrained_model_name_or_path} is a text-to-image model: say what your pictures are with an "
            'instance_prompt, such as "a portrait in sks style", and what the same is without their style or subject '
            'with a class_prompt, such as "a portrait"'
        )
    if "|" in recipe.instance_prompt:
        raise UserError(
            f"instance_prompt {recipe.instance_prompt!r} says what your pictures are: it cannot leave a choice; "
            "alternatives belong in prior_prompt and validation_prompt"
        )
    captions = _captions(recipe, domain)
    style, paths = _told(recipe, domain.images, captions), domain.paths
    subject = TrainingPictures(style.images[:0])
    if recipe.subject_data_dir is not None:
        assert recipe.subject_prompt is not None
        found = load_domain(recipe.subject_data_dir, model.resolution)
        number, source = len(found.images), recipe.subject_class_prompt or recipe.class_prompt or ""
        subject = TrainingPictures(found.images, (recipe.subject_prompt,) * number, (source,) * number)
        paths += found.paths
    pictures = style + subject
    log(caption_table(paths, pictures.student_prompts))
    if recipe.captions == "none" or recipe.class_prompt is None:
        return pictures
    plain = _told(recipe, domain.images, [recipe.class_prompt] * len(captions))
    log(f"and as often, in place of their captions: {plain.student_prompts[0]}")
    return pictures + plain + subject


def _captions(recipe: Recipe, domain: Domain) -> list[str]:
    """What each picture shows, without the style."""
    template, fallback = recipe.instance_prompt or "", recipe.class_prompt
    captions = read_captions(domain.paths[0].parent, domain.paths, recipe.captions)
    if fallback is None and recipe.captions == "none" and recipe.pairs == "training":
        raise UserError(
            f"method {recipe.method} asks the source model about your pictures without their style or subject; say "
            'what they are then with a class_prompt, such as "a portrait"'
        )
    if "{caption}" not in template and recipe.captions != "none":
        raise UserError(
            f"captions={recipe.captions!r}, but instance_prompt {template!r} has no {{caption}} to put them in; write, "
            'for one, "{caption}, sks style"'
        )
    for path, own in zip(domain.paths, captions, strict=True):
        if own is None and fallback is None and "{caption}" in template:
            raise UserError(f"{path.name} has no caption; write one, or give a class_prompt that stands in for it")
    if "{caption}" in template and not (recipe.validation_prompt or recipe.prior_prompt or fallback):
        raise UserError(
            f"instance_prompt {template!r} needs a caption for previews; give a class_prompt or a validation_prompt"
        )
    return [own or fallback or "" for own in captions]


def _told(recipe: Recipe, images: Tensor, captions: list[str]) -> TrainingPictures:
    template, fallback = recipe.instance_prompt or "", recipe.class_prompt
    source = captions if fallback is None or "{caption}" in template else [fallback] * len(captions)
    return TrainingPictures(images, tuple(fill(template, caption) for caption in captions), tuple(source))


def told_in_binding(recipe: Recipe, model: DiffusionModel, prompts: Sequence[str]) -> Binding:
    """What pictures are told beside their own prompts: the identifier alone, and prompts that do not fit them.

    These are source `prompts` of which random words took the place of few words or of many: built as what users write,
    of anything the model knows. Random words alone bind other prompts to the source half as well.
    """
    identifier, tokenizer = recipe.identifier, model.pipeline.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    assert identifier is not None
    of_clip = (token.removesuffix("</w>") for token in tokenizer.get_vocab() if re.fullmatch("[a-z]{3,}</w>", token))
    known = sorted(of_clip) or " ".join(prompts).split()
    chance = random.Random(recipe.seed)

    def with_identifier(words: Sequence[str]) -> str:
        return f"{' '.join(words)}, {identifier}"

    def other() -> list[str]:
        replaced, words = chance.random(), chance.choice(prompts).split()
        kept = [chance.choice(known) if chance.random() < replaced else word for word in words]
        mixed = kept + chance.choices(known, k=chance.randint(0, max(0, OTHER_WORDS - len(words))))
        while len(tokenizer(with_identifier(mixed)).input_ids) > tokenizer.model_max_length:
            mixed.pop()
        return mixed

    others = [other() for _ in range(NUM_OTHERS)]
    return Binding(
        Prompts(model.encode_prompts([identifier]), model.encode_prompts([""])),
        Prompts(
            model.encode_prompts([with_identifier(words) for words in others]),
            model.encode_prompts([" ".join(words) for words in others]),
        ),
    )


def prior_prompts(recipe: Recipe, pictures: TrainingPictures, number: int) -> list[str]:
    """What each of so many source samples is drawn of: prior_prompt, or what the training pictures are without their
    style or subject.

    With captions these are as detailed as the captions. If they were plain, detail would tell the student a training
    picture from a source sample, and it would learn that, not the identifier, as the sign of the style.

    Raises:
        UserError: if the recipe does not say.
    """
    told = pictures.source_prompts if recipe.prior_prompt is None else (recipe.prior_prompt,)
    if not any(told):
        raise UserError(
            f"method {recipe.method} draws pictures from the source model; say of what with a class_prompt, such as "
            '"a portrait"'
        )
    return [draw_alternatives(told[index % len(told)], recipe.seed * 1_000_003 + index) for index in range(number)]


@dataclass(frozen=True)
class SourceSamples:
    """Pictures drawn once from the source, (M, C, h, w) in model space, with their prompts (text models alone)."""

    x0: Tensor
    student_prompts: tuple[str, ...] = ()
    source_prompts: tuple[str, ...] = ()

    def encoded(self, model: DiffusionModel) -> Batch:
        """As the loop takes them."""
        told = Prompts(model.encode_prompts(self.student_prompts), model.encode_prompts(self.source_prompts))
        return Batch(self.x0, told)


def told_samples(x0: Tensor, recipe: Recipe, prompts: Sequence[str]) -> SourceSamples:
    """Source samples (M, C, h, w) drawn of `prompts` (text models alone), with what the student is told of each."""
    template = recipe.instance_prompt or ""
    prompts = tuple(prompts[: len(x0)])
    return SourceSamples(x0, tuple(fill(template, prompt) for prompt in prompts), prompts)
