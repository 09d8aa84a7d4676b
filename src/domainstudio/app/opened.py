"""What a recipe trains: read, checked, and ready for the loop."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from domainstudio.app.draw import validation_guidance
from domainstudio.app.materials import (
    SourceSamples,
    TrainingPictures,
    open_domain,
    open_pictures,
    prior_prompts,
    recipe_source,
    told_in_binding,
)
from domainstudio.app.recipe import TEXT_SETTINGS, Chosen, Recipe
from domainstudio.data.captions import fill
from domainstudio.data.domain import Domain
from domainstudio.data.symmetry import SYMMETRIC_BELOW, asymmetry
from domainstudio.errors import UserError
from domainstudio.evaluation.weights import find_weights
from domainstudio.models.adaptation import Adaptation, FullAdaptation, LoraAdaptation
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sharded import ShardedAdaptation
from domainstudio.quiet import quiet
from domainstudio.training.config import TrainConfig
from domainstudio.training.deck import samples_wanted
from domainstudio.training.methods import build_objective, method_settings
from domainstudio.training.objective import Objective
from domainstudio.training.optimisation import Training, find_optimizer
from domainstudio.training.processes import Processes
from domainstudio.training.state import TrainState
from domainstudio.training.train import Observer, train


def build_adaptation(model: DiffusionModel, recipe: Recipe, needs_source: bool, processes: Processes) -> Adaptation:
    """Full fine-tuning (with a frozen copy only where a term looks at the source; in parts with `fsdp`) or LoRA."""
    if recipe.adapter == "full":
        kind = ShardedAdaptation if recipe.fsdp and processes.count > 1 else FullAdaptation
        return kind(model.network, keep_source=needs_source)
    if model.condition is not None and recipe.mixed_precision != "no":
        with quiet():  # the frozen weights are only ever used in that precision
            model.network.to(torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float16)
    return LoraAdaptation(model.network, recipe.rank, recipe.scale_alpha, recipe.seed, recipe.adapted_layers)


def recipe_settings(recipe: Recipe, model: DiffusionModel) -> dict[str, Any]:
    """The settings of the recipe's method: those that the recipe gives, and the method's own.

    Raises:
        UserError: if one is given that the method has no use for.
    """
    return method_settings(
        recipe.method,
        model,
        pairing=recipe.pairing,
        centre_pairs=recipe.centre_pairs,
        high_noise_weight=recipe.high_noise_weight,
        high_noise_mean_weight=recipe.high_noise_mean_weight,
        high_noise_focus=recipe.high_noise_focus,
        snr_gamma=recipe.snr_gamma,
        image_weight=recipe.image_weight,
        hf_weight=recipe.hf_weight,
        hfmse_weight=recipe.hfmse_weight,
        feature_weight=recipe.feature_weight,
        transfer_weight=recipe.transfer_weight,
        nearest_class_images=recipe.nearest_class_images,
        space=recipe.space,
        with_prior_preservation=recipe.with_prior_preservation,
        prior_loss_weight=recipe.prior_loss_weight,
        similarity_weight=recipe.similarity_weight,
        adversarial_steps=recipe.adversarial_steps,
    )


@dataclass(frozen=True)
class Opened:
    """What a recipe trains, read and checked; nothing is written yet, and no adapter is in the network."""

    recipe: Recipe
    """With what was chosen from the pictures."""
    chosen: dict[str, Chosen]
    """What the settings are that were left open."""
    accelerator: Accelerator
    model: DiffusionModel
    domain: Domain
    pictures: TrainingPictures
    objective: Objective
    prior: list[str]
    """What each source sample is drawn of, as many as there may be (text models alone)."""
    least_samples: int
    most_samples: int
    """Source samples that are drawn, at least and at most; 0 where nothing looks at any."""

    @property
    def draws(self) -> bool:
        """Whether source samples are drawn."""
        return self.most_samples > 0

    def samples_wanted(self, first: Tensor) -> int:
        """How many source samples to draw, judged by the first ones, (least_samples, C, h, w)."""
        if self.least_samples == self.most_samples:
            return self.most_samples
        images = self.pictures.images.to(self.accelerator.device)
        return samples_wanted(self.model, train_config(self.recipe), images, self.objective, first)

    def chosen_samples(self, number: int) -> dict[str, Chosen]:
        """What num_class_images is, where the recipe leaves it open and so many source samples were drawn."""
        if self.recipe.num_class_images is not None:
            return {}
        why = "all of them are shown"
        if self.objective.nearest is not None:
            why = (
                f"from {self.least_samples}, if the transfer moved all that tells the training pictures from source "
                f"samples, to {self.most_samples}, if it moved nothing of it"
            )
        return {"num_class_images": Chosen(number, why)}

    def adapt(self) -> tuple[DiffusionModel, Adaptation]:
        """The model to train and its adaptation; changes the network, so source samples are drawn before."""
        model, recipe = self.model, self.recipe
        if recipe.train_text_encoder:
            model = model.with_text_encoder(recipe.identifier if recipe.adapter == "lora" else None)
        if recipe.gradient_checkpointing:
            model.checkpoint_gradients()
        needs_source = self.objective.needs_source or train_config(recipe).asks_source
        adaptation = build_adaptation(model, recipe, needs_source, Processes.of(self.accelerator))
        if recipe.torch_compile:
            adaptation.compile()
        return model, adaptation

    def train(
        self,
        model: DiffusionModel,
        adaptation: Adaptation,
        config: TrainConfig,
        samples: SourceSamples | None,
        observers: Sequence[Observer],
        resume: TrainState | None = None,
    ) -> Training:
        """Trains what `adapt` gave."""
        return train(
            model,
            adaptation,
            self.pictures.images,
            self.objective,
            config,
            prior=None if samples is None else samples.encoded(model),
            prompts=self.pictures.encoded(model),
            binding=told_in_binding(self.recipe, model, self.prior) if self.recipe.binding_steps else None,
            observers=observers,
            resume=resume,
            accelerator=self.accelerator,
        )


def open_recipe(recipe: Recipe, accelerator: Accelerator, log: Callable[[str], None] = lambda message: None) -> Opened:
    """Reads the model and the pictures of a recipe, and checks its settings against them.

    Raises:
        UserError: for pictures, prompts or settings that cannot be used; MissingWeights if the watch is to stop the
            run and cannot see.
    """
    model = recipe_source(recipe, accelerator.device)
    if recipe.identifier is not None:
        model.add_identifier(recipe.identifier)
    domain = open_domain(recipe, model)
    pictures = open_pictures(recipe, model, domain, log)
    settings = recipe_settings(recipe, model)
    objective = build_objective(recipe.method, model, **settings)
    find_optimizer(recipe.optimizer)
    if recipe.torch_compile:
        _find_compiler(accelerator.device)
    if recipe.fsdp and accelerator.num_processes == 1:
        log("fsdp has no effect: one process holds the whole model")
    if recipe.stop_when_overfitting:
        find_weights("lpips-vgg")
    draws = objective.needs_prior or train_config(recipe).asks_source
    least, most = recipe.class_images(objective.nearest) if draws else (0, 0)
    prior = prior_prompts(recipe, pictures, most) if draws and model.condition is not None else []
    if model.condition is not None:  # prompts that cannot be used are told now
        model.encode_prompts(_all_prompts(recipe, pictures, prior))
    chosen = _chosen(recipe, model, settings)
    if recipe.random_flip is None and model.condition is None:
        flip = _face_both_ways(pictures.images)
        doubt = "--no-random-flip where a mirror image would be wrong, such as of writing"
        log(
            f"training pictures are mirrored at random: {flip.why}; {doubt}"
            if flip.value
            else f"training pictures are not mirrored: {flip.why}; --random-flip does it anyway"
        )
        chosen["random_flip"] = flip
        recipe = recipe.model_copy(update={"random_flip": flip.value})
    return Opened(recipe, chosen, accelerator, model, domain, pictures, objective, prior, least, most)


def _face_both_ways(pictures: Tensor) -> Chosen:
    """Whether they may be mirrored."""
    found = max(0.0, asymmetry(pictures))
    both = found < SYMMETRIC_BELOW
    return Chosen(both, f"the pictures face {'both ways' if both else 'one way'} (asymmetry {found:.2f})")


def _chosen(recipe: Recipe, model: DiffusionModel, settings: dict[str, Any]) -> dict[str, Chosen]:
    """What the recipe leaves open, but for what the pictures say."""
    is_text = model.condition is not None
    reason = f"method {recipe.method}{' of text-to-image models' if is_text else ''}"
    chosen = {
        name: Chosen(value, reason)
        for name, value in settings.items()
        if value is not None and (is_text or name not in TEXT_SETTINGS)
    }
    drawn = recipe.num_class_images
    if drawn is not None and (settings.get("nearest_class_images") or 0) >= drawn:
        del chosen["nearest_class_images"]  # all of them
    chosen["resolution"] = Chosen(model.resolution, "the model's")
    reason = "optimizer prodigy" if recipe.optimizer == "prodigy" else f"adapter {recipe.adapter}"
    chosen["learning_rate"] = Chosen(recipe.lr, reason)
    if recipe.adapter == "lora":
        chosen["lora_alpha"] = Chosen(recipe.scale_alpha, "as rank")
        chosen["lora_layers"] = Chosen(
            recipe.adapted_layers, "text-to-image model" if is_text else "unconditional model"
        )
    return chosen


def _find_compiler(device: torch.device) -> None:
    """As torch.compile looks for one, which would tell after the source samples are drawn, and at length.

    Raises:
        UserError: if there is none.
    """
    if device.type == "cuda":
        found, needed = find_spec("triton") is not None, "the package triton"
    else:
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++")))
        needed = "a C++ compiler (g++, clang++, or the one that CXX names)"
    if not found:
        raise UserError(f"torch_compile needs {needed}, and there is none; install it, or leave torch_compile out")


def _all_prompts(recipe: Recipe, pictures: TrainingPictures, prior: list[str]) -> list[str]:
    """Whatever the text encoder will be asked for in a run."""
    previews = validation_guidance(recipe, recipe.num_validation_images)
    told = [fill(recipe.instance_prompt or "", prompt) for prompt in prior]
    return [
        *pictures.student_prompts,
        *pictures.source_prompts,
        *previews.prompts,
        previews.negative_prompt,
        *prior,
        *told,
    ]


def train_config(recipe: Recipe) -> TrainConfig:
    """How the recipe optimises."""
    return TrainConfig(
        max_train_steps=recipe.max_train_steps,
        train_batch_size=recipe.train_batch_size,
        learning_rate=recipe.lr,
        lr_warmup_steps=recipe.lr_warmup_steps,
        max_grad_norm=recipe.max_grad_norm,
        weight_decay=recipe.weight_decay,
        use_ema=recipe.use_ema,
        ema_decay=recipe.ema_decay,
        random_flip=bool(recipe.random_flip),
        pair_batch_size=recipe.pair_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        optimizer=recipe.optimizer,
        erase_steps=recipe.erase_steps,
        binding_steps=recipe.binding_steps,
        noise_offset=recipe.noise_offset,
        mixed_precision=recipe.mixed_precision,
        seed=recipe.seed,
    )
