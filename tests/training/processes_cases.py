"""Runs that one process and several have to make alike. As a script: one process of a company, which makes them all."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import is_initialized
from training_kit import adapt, make_images, make_prior, perturb

from domainstudio.errors import UserError
from domainstudio.models.adaptation import FullAdaptation
from domainstudio.models.load import load_model
from domainstudio.models.model import DiffusionModel
from domainstudio.models.sharded import ShardedAdaptation, in_one_piece
from domainstudio.training import ant
from domainstudio.training.binding import Binding
from domainstudio.training.config import TrainConfig
from domainstudio.training.methods import build_objective
from domainstudio.training.objective import Batch, Prompts
from domainstudio.training.optimisation import Training
from domainstudio.training.processes import leave, open_accelerator
from domainstudio.training.train import StopTraining, train


@dataclass(frozen=True)
class Case:
    """Two steps of a method."""

    method: str
    adapter: str
    pipeline: str
    objective: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    text_encoder: bool = False
    checkpointing: bool = False

    @property
    def name(self) -> str:
        extras = {**self.objective, **self.config}
        flags = [flag for flag in ("text_encoder", "checkpointing") if getattr(self, flag)]
        return " ".join((self.method, self.adapter, self.pipeline, *(f"{k}={v}" for k, v in extras.items()), *flags))


CASES = [
    *(Case("finetune", adapter, "pixel_flow", config={"random_flip": True}) for adapter in ("full", "lora")),
    *(Case("studio", adapter, "latent_v", config={"random_flip": True}) for adapter in ("full", "lora")),
    *(Case("ddpm_pa", adapter, "pixel_epsilon") for adapter in ("full", "lora")),
    *(Case("domainstudio", adapter, "pixel_learned") for adapter in ("full", "lora")),
    *(Case("domainstudio_released", adapter, "pixel_learned") for adapter in ("full", "lora")),
    *(Case("dreambooth", adapter, "sd1_epsilon") for adapter in ("full", "lora")),
    *(Case("domainstudio", adapter, "sd2_v") for adapter in ("full", "lora")),  # on decoded pictures
    *(Case("studio", adapter, "sd1_epsilon") for adapter in ("full", "lora")),
    *(Case("ant", adapter, "pixel_epsilon", {"adversarial_steps": 2}) for adapter in ("full", "lora")),
    Case("domainstudio", "full", "latent_v", {"space": "crop", "pairing": "source_samples"}),
    Case("studio", "lora", "sd1_epsilon", {"space": "pixel", "with_prior_preservation": True}, {}, True, True),
    Case("studio", "lora", "latent_v", {"feature_weight": 1.0}),
    Case("studio", "full", "pixel_x0", config={"gradient_accumulation_steps": 2, "noise_offset": 0.1}),
    Case("studio", "lora", "sd1_epsilon", config={"erase_steps": 1, "train_batch_size": 4, "pair_batch_size": 5}),
    Case("studio", "lora", "sd1_epsilon", config={"binding_steps": 1}, text_encoder=True),
    Case("finetune", "fsdp", "pixel_learned", config={"use_ema": False}),
    Case("studio", "fsdp", "latent_v", {"feature_weight": 1.0}, {"gradient_accumulation_steps": 2}),
    Case("domainstudio", "fsdp", "sd2_v", checkpointing=True),
    Case("ant", "fsdp", "pixel_epsilon", {"adversarial_steps": 2}),
]
TOO_MANY = Case("finetune", "lora", "pixel_epsilon", config={"train_batch_size": 1})
STOPPED = Case("finetune", "lora", "pixel_epsilon")
WORDS = ("a portrait", "a dog", "red hair", "a man", "a woman", "blue hair")


def prompts(model: DiffusionModel) -> Prompts:
    return Prompts(model.encode_prompts([f"{word}, xyz style" for word in WORDS]), model.encode_prompts(WORDS))


def run_case(case: Case, folder: Path, observers=(), steps: int = 2) -> tuple[Training, list[dict[str, float]], Any]:
    """The finished run, each step's metrics, and the first step's gradients (a tenth: Adam's first average)."""
    model = load_model(folder)
    for part in model.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()  # so that no rounding stands between them
    binds = "binding_steps" in case.config
    if binds:
        model.add_identifier("<ink>")
    if case.text_encoder:
        model = model.with_text_encoder("<ink>" if binds else None)
    if case.checkpointing:
        model.checkpoint_gradients()
    if case.adapter != "fsdp":
        adaptation = adapt(model, case.adapter)
    else:
        adaptation = (ShardedAdaptation if is_initialized() else FullAdaptation)(model.network)
    adaptation.network.double()  # adapters are made in float32
    perturb(adaptation, 0.05)
    objective = build_objective(case.method, model, **case.objective)  # pyright: ignore[reportArgumentType]
    settings = {"train_batch_size": 5, "pair_batch_size": 4, "learning_rate": 1e-3, "max_grad_norm": 1e9, **case.config}
    config = TrainConfig(max_train_steps=steps, **settings)
    told = prompts(model) if model.condition else None
    needs_prior = objective.needs_prior or config.erase_steps or config.binding_steps
    prior = Batch(make_prior(model).x0.double(), told or Prompts()) if needs_prior else None
    binding = None
    if binds:
        unnamed = Prompts(model.encode_prompts(["<ink>"]), model.encode_prompts([""]))
        binding = Binding(unnamed, prompts(model))
    metrics, gradients = [], []

    def note(event) -> None:
        if event.metrics:
            metrics.append(event.metrics)
        if event.step == 1:
            gradients.extend(s["exp_avg"].clone() for s in event.state().optimizer["state"].values())

    images = make_images(model).double()
    run = train(model, adaptation, images, objective, config, prior, told, (note, *observers), binding=binding)
    return run, metrics, gradients


def steps_of(case: Case, folder: Path) -> dict[str, Any]:
    run, metrics, gradients = run_case(case, folder)
    return {"metrics": metrics, "gradients": gradients, "weights": weights(run)}


def weights(run: Training) -> list[Tensor]:
    return [in_one_piece(p.detach()).clone() for p in run.parameters]


def stopped_by_main(case: Case, folder: Path, rank: int) -> int:
    """The step at which this process ends, when the first one wants to end at step 2."""

    def stop(event) -> None:
        if rank == 0 and event.step == 2:
            raise StopTraining

    return run_case(case, folder, [stop], steps=5)[0].step


def main(folders: dict[str, str], rank: int, output: Path) -> None:
    ant.NUM_NOISINGS = ant.FIT_STEPS = 50  # as in conftest.py
    open_accelerator("no")
    results: dict[str, Any] = {case.name: steps_of(case, Path(folders[case.pipeline])) for case in CASES}
    results["stopped"] = stopped_by_main(STOPPED, Path(folders[STOPPED.pipeline]), rank)
    try:
        run_case(TOO_MANY, Path(folders[TOO_MANY.pipeline]))
    except UserError as error:
        results["refused"] = str(error)
    torch.save(results, output)
    leave()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
