"""The recipe: one flat, frozen record of a run, as TOML and as command-line flags."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from domainstudio.data.captions import CaptionSource
from domainstudio.data.nearness import MOST_TO_CHOOSE_AMONG
from domainstudio.errors import UserError
from domainstudio.models.adaptation import LoraLayers
from domainstudio.models.identifier import find_identifier
from domainstudio.training.config import MixedPrecision, OptimizerName
from domainstudio.training.methods import Method
from domainstudio.training.objective import Pairing, Space

TEXT_DEFAULTS = {
    "adapter": "lora",
    "max_train_steps": 500,
    "train_batch_size": 4,
    "pair_batch_size": 4,
    "checkpointing_steps": 100,
    "validation_steps": 100,
    "num_validation_images": 8,
}
"""Of recipes with an instance_prompt, for Stable Diffusion's size; the learning rate is 1e-4 (LoRA) or 5e-6 (full)."""

CLASS_IMAGES = 100
"""Source samples where all are shown."""


@dataclass(frozen=True)
class Chosen:
    """What a setting that the recipe leaves open is in a run, and why."""

    value: object
    why: str


class Recipe(BaseModel):
    """Every setting of a run. None means: chosen from the method, the adapter or the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pretrained_model_name_or_path: str = Field(
        "bundled:avatars", description="source: pipeline folder, hub name or bundled:NAME"
    )
    single_file_config: str | None = Field(
        None, description="of a model in one file: pipeline folder or hub name with its configuration; default: guessed"
    )
    instance_data_dir: str = Field(description="folder of training pictures, or bundled:NAME")
    output_dir: str = Field("runs/latest", description="run folder")
    instance_prompt: str | None = Field(
        None,
        description="what the training pictures are, such as 'a portrait in <ink> style'; a word in <> is new to the "
        "model, and learned; {caption} stands for the picture's caption (text models)",
    )
    class_prompt: str | None = Field(None, description="the same without its style or subject, such as 'a portrait'")
    prior_prompt: str | None = Field(
        None, description="what source samples are drawn of; {a|b} draws one of a and b; default: class_prompt"
    )
    captions: CaptionSource = Field(
        "none", description="captions from files (NAME.txt, NAME.caption, metadata.jsonl) or the folder's name"
    )
    subject_data_dir: str | None = Field(None, description="pictures of a subject to learn beside the style")
    subject_prompt: str | None = Field(None, description="what they are, such as 'a [V] dog'")
    subject_class_prompt: str | None = Field(None, description="the same without the subject; default: class_prompt")
    train_text_encoder: bool = Field(False, description="adapt the text encoder too")
    method: Method = Field("studio", description="objective")
    adapter: Literal["full", "lora"] = Field("full", description="train all weights, or low-rank adapters")
    rank: int = Field(16, ge=1, description="LoRA rank")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA scale is lora_alpha / rank; default: rank")
    lora_layers: LoraLayers | None = Field(
        None, description="layers with an adapter; default: attention (text models), all (others)"
    )
    max_train_steps: int = Field(150, ge=1, description="optimiser steps: 150 for a near style, 300 for a far one")
    train_batch_size: int = Field(10, ge=1, description="training pictures a step, in all processes together")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches a step; pairs are formed within each")
    gradient_checkpointing: bool = Field(False, description="compute activations twice to keep fewer of them")
    fsdp: bool = Field(
        False,
        description="of several processes each holds a part of the weights, and of all that training keeps of them",
    )
    torch_compile: bool = Field(False, description="compile the networks: minutes at the start for faster steps after")
    optimizer: OptimizerName = Field("adamw", description="adamw8bit and prodigy need domainstudio[optimizers]")
    learning_rate: float | None = Field(None, gt=0, description="default: 1e-4 full, 1e-3 LoRA, 1 Prodigy")
    lr_warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    use_ema: bool = Field(True, description="take the average of the weights, not the last ones")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="what that average keeps of itself at each step, from the first one on, such as 0.9999; default: "
        "averages over about the last seventh of the run",
    )
    random_flip: bool | None = Field(
        None,
        description="mirror training pictures at random; default: where they are as like each other's mirror images as "
        "each other (text models: no)",
    )
    pairing: Literal["training", "source_samples"] | None = Field(None, description="which pictures form pairs")
    centre_pairs: bool | None = Field(None, description="compare pairs after taking out the batch's mean picture")
    high_noise_weight: float | None = Field(
        None, ge=0, le=1, description="weight of the denoising error where all is noise; 1 where all is picture"
    )
    high_noise_mean_weight: float | None = Field(
        None, ge=0, le=1, description="the same of its part that wrong means of channels make, which are colours"
    )
    high_noise_focus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of high_noise_weight that goes to what tells the training pictures from source samples; 0: "
        "all counts alike",
    )
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting of the denoising error, usually 5")
    noise_offset: float = Field(0.0, ge=0, description="constant added to each channel's noise, usually 0.05")
    erase_steps: int = Field(
        0, ge=0, description="first steps that take out of instance_prompt what its identifier meant before"
    )
    binding_steps: int = Field(
        0,
        ge=0,
        description="last steps that tie what was learned to the new word of instance_prompt, so that other prompts "
        "draw what they drew; default: 4 in 5 (studio, LoRA, with such a word)",
    )
    with_prior_preservation: bool | None = Field(
        None, description="keep what class_prompt draws (text models); default: dreambooth and domainstudio do"
    )
    prior_loss_weight: float | None = Field(None, ge=0, description="weight of that term")
    image_weight: float | None = Field(None, ge=0, description="weight of the pairwise image term")
    hf_weight: float | None = Field(None, ge=0, description="weight of the pairwise high-frequency term")
    hfmse_weight: float | None = Field(None, ge=0, description="weight of the high-frequency error")
    feature_weight: float | None = Field(
        None, ge=0, description="weight of the pairwise term on features of the networks (DomainGallery's); default: 0"
    )
    transfer_weight: float | None = Field(
        None, ge=0, description="weight of the term that moves source samples to where the training pictures lie"
    )
    space: Space | None = Field(None, description="image terms in the model's space, in decoded pixels or in a crop")
    similarity_weight: float | None = Field(None, ge=0, description="weight of the pull towards the domain (ant)")
    adversarial_steps: int | None = Field(None, ge=0, description="steps in which noise becomes harder (ant)")
    num_class_images: int | None = Field(
        None,
        ge=3,
        description="source samples drawn once, where the method looks at any; default: 100, or one to three times as "
        "many as the nearest that are shown: the more, the less the transfer moves",
    )
    nearest_class_images: int | None = Field(
        None,
        ge=3,
        description="how many of them steps show: those nearest to the training pictures; default: 100 (studio, not "
        "text models), or all",
    )
    pair_batch_size: int = Field(10, ge=3, description="source samples a step, where the method looks at any")
    resolution: int | None = Field(None, ge=8, description="side of the pictures; default and only choice: the model's")
    seed: int = Field(0, ge=0, description="seed of everything random")
    mixed_precision: MixedPrecision = Field("no", description="no, bf16 or fp16")
    checkpointing_steps: int = Field(50, ge=1, description="steps between checkpoints")
    checkpoints_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    validation_steps: int = Field(50, ge=1, description="steps between sample sheets")
    num_validation_images: int = Field(16, ge=1, description="pictures a sample sheet")
    watch: bool = Field(True, description="judge every sample sheet and keep the best checkpoint's result in best/")
    stop_when_overfitting: bool = Field(False, description="end the run when the watch sees it overfitting")
    validation_prompt: str | None = Field(
        None, description="prompt of previews and measurements; {a|b} draws; default: instance_prompt"
    )
    negative_prompt: str = Field("", description="what previews and measurements are led away from")
    guidance_scale: float = Field(7.5, ge=1, description="classifier-free guidance when sampling; 1 is none")
    num_inference_steps: int = Field(25, ge=1, description="denoising steps when sampling")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("instance_prompt") is None:
            return given
        lr = 5e-6 if given.get("adapter") == "full" else 1e-4
        lr = {} if given.get("optimizer") == "prodigy" else {"learning_rate": lr}
        chosen = {**TEXT_DEFAULTS, **lr, **{name: value for name, value in given.items() if value is not None}}
        prompt, steps = chosen["instance_prompt"], chosen["max_train_steps"]
        if isinstance(prompt, str) and isinstance(steps, int) and find_identifier([prompt]) is not None:
            chosen.setdefault("train_text_encoder", True)
            if chosen["adapter"] == "lora" and chosen.get("method", "studio") == "studio":
                chosen.setdefault("binding_steps", 4 * steps // 5)
        return chosen

    @model_validator(mode="after")
    def _settings_that_clash(self) -> "Recipe":
        if self.pairs == "training" and self.train_batch_size < 3:
            raise ValueError(
                f"train_batch_size={self.train_batch_size}, but method {self.method} compares each picture with "
                "at least two others; use 3 or more"
            )
        drawn, nearest = self.num_class_images, self.nearest_class_images
        if drawn is not None and self.pair_batch_size > drawn:
            raise ValueError(f"pair_batch_size={self.pair_batch_size} is more than num_class_images={drawn}")
        if nearest is not None and nearest < self.pair_batch_size:
            raise ValueError(
                f"nearest_class_images={nearest} is less than pair_batch_size={self.pair_batch_size}; show more"
            )
        if nearest is not None and drawn is not None and nearest > drawn:
            raise ValueError(
                f"nearest_class_images={nearest} is more than num_class_images={drawn}; draw more, or leave it out"
            )
        if (self.subject_data_dir is None) != (self.subject_prompt is None):
            raise ValueError("subject_data_dir and subject_prompt go together; give both or neither")
        if self.stop_when_overfitting and not self.watch:
            raise ValueError("stop_when_overfitting needs the watch; leave watch at true")
        if self.erase_steps >= self.max_train_steps:
            raise ValueError(
                f"erase_steps={self.erase_steps} leaves none of max_train_steps={self.max_train_steps} to learn in"
            )
        if self.erase_steps + self.binding_steps >= self.max_train_steps:
            raise ValueError(
                f"binding_steps={self.binding_steps} leaves none of max_train_steps={self.max_train_steps} to learn in"
            )
        if self.torch_compile and (self.feature_weight or self.method == "ant"):
            reason = "method ant" if self.method == "ant" else f"feature_weight={self.feature_weight:g}"
            raise ValueError(
                f"{reason} looks inside the networks, which compiled ones do not show; leave torch_compile out"
            )
        self._check_fsdp()
        self._check_identifier()
        return self

    def _check_fsdp(self) -> None:
        if not self.fsdp:
            return
        for name, needed in (
            ("adapter", "full"),
            ("optimizer", "adamw"),
            ("torch_compile", False),
            ("train_text_encoder", False),
        ):
            if (given := getattr(self, name)) != needed:
                raise ValueError(f"fsdp was not made for {name}={given!r}; set {name} to {needed!r}, or leave fsdp out")
        if self.mixed_precision == "fp16":
            raise ValueError("fsdp scales no gradients, as fp16 needs; set mixed_precision to bf16 or no")

    def _check_identifier(self) -> None:
        prompts = (self.instance_prompt, self.subject_prompt, self.class_prompt, self.prior_prompt)
        word = find_identifier([prompt for prompt in prompts if prompt is not None])
        if word != self.identifier:
            raise ValueError(
                f"{word} is a new word of another prompt than instance_prompt; write it into that one, or without <>"
            )
        if word is not None and not self.train_text_encoder:
            raise ValueError(f"{word} is a new word, which the text encoder learns; leave train_text_encoder at true")
        if self.binding_steps and word is None:
            raise ValueError(
                f"binding_steps={self.binding_steps} ties what is learned to a new word; write one into "
                f'instance_prompt ({self.instance_prompt!r}), such as "a portrait in <ink> style"'
            )
        if self.binding_steps and self.stop_when_overfitting:
            raise ValueError("stop_when_overfitting could end the run before it is bound; set binding_steps to 0")

    @property
    def identifier(self) -> str | None:
        """The new word of instance_prompt, brackets included, if it has one."""
        return find_identifier([self.instance_prompt or ""])

    @property
    def pairs(self) -> Pairing:
        """What pairs are formed of: `pairing`, or the method's own choice where it is not given."""
        if self.method in ("finetune", "dreambooth", "ant"):
            return "none"
        return self.pairing or ("source_samples" if self.method == "studio" else "training")

    @property
    def scale_alpha(self) -> float:
        """lora_alpha, or rank where it is not given."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def adapted_layers(self) -> LoraLayers:
        """lora_layers, or those of the kind of model where it is not given."""
        return self.lora_layers or ("all" if self.instance_prompt is None else "attention")

    @property
    def lr(self) -> float:
        """learning_rate, or the adapter's default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "prodigy" else {"full": 1e-4, "lora": 1e-3}[self.adapter]

    def class_images(self, nearest: int | None) -> tuple[int, int]:
        """How many source samples are drawn at least and at most, where the `nearest` are shown (None: all)."""
        if self.num_class_images is not None:
            return self.num_class_images, self.num_class_images
        least = max(nearest or CLASS_IMAGES, self.pair_batch_size)
        return least, least if nearest is None else MOST_TO_CHOOSE_AMONG * least

    def text_settings(self) -> list[str]:
        """Those of `TEXT_SETTINGS` that are given."""
        return [name for name in TEXT_SETTINGS if getattr(self, name) != Recipe.model_fields[name].default]

    def warnings(self) -> list[str]:
        """Settings that differ from their default and have no effect."""
        given = {name for name, field in Recipe.model_fields.items() if getattr(self, name) != field.default}
        unused = []
        if self.adapter == "full":
            unused += [(name, "adapter is full") for name in ("rank", "lora_alpha", "lora_layers") if name in given]
        if not self.use_ema and self.ema_decay is not None:
            unused.append(("ema_decay", "use_ema is off"))
        if self.pairs != "source_samples" and self.instance_prompt is None:
            names = ("pair_batch_size",) if self.method == "ant" else ("num_class_images", "pair_batch_size")
            unused += [(name, "pairs are not formed of source samples") for name in names if name in given]
        return [f"{name} has no effect: {why}" for name, why in unused]

    def to_toml(self, chosen: Mapping[str, Chosen] | None = None) -> str:
        """TOML that `build_recipe` reads back to an equal recipe: a setting a line, and what it is.

        Unset settings stay so; what was `chosen` for them is told in comments.
        """
        chosen = chosen or {}
        lines = ["# Lines that begin with # say what was chosen for settings left open."] if chosen else []
        for name, value in self.model_dump().items():
            what = Recipe.model_fields[name].description
            if value is not None:
                lines.append(f"{name} = {_toml_value(value)}  # {what}")
            elif name in chosen:
                lines.append(f"# {name} = {_toml_value(chosen[name].value)}  # {what}. Chosen: {chosen[name].why}")
        return "\n".join(lines) + "\n"


TEXT_SETTINGS = (
    *("instance_prompt", "class_prompt", "prior_prompt", "captions", "train_text_encoder", "erase_steps"),
    "binding_steps",
    *("subject_data_dir", "subject_prompt", "subject_class_prompt"),
    *("with_prior_preservation", "prior_loss_weight", "validation_prompt", "negative_prompt", "guidance_scale"),
)
"""Those that only a text-to-image model has a use for."""


def _toml_value(value: object) -> str:
    if not isinstance(value, str | bool):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # which JSON allows and TOML does not


def build_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe of a TOML file (if given) with `overrides` on top.

    Raises:
        UserError: naming every problem at once: unreadable file, unknown keys (with the nearest known one), bad values.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid TOML: {error}") from error
    try:
        return Recipe.model_validate({**settings, **overrides})
    except ValidationError as error:
        raise UserError("the recipe cannot be used:\n" + "\n".join(_explain(e) for e in error.errors())) from error


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = get_close_matches(name, Recipe.model_fields, n=1)
        return f"  {name}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"  {name}: required ({Recipe.model_fields[name].description})"
    if not name:
        return f"  {error['msg'].removeprefix('Value error, ')}"
    return f"  {name} = {error['input']!r}: {error['msg'].removeprefix('Value error, ')}"
