"""LoRA files: diffusers' and kohya's for Stable Diffusion, and peft's plain names for unconditional models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from domainstudio.errors import UserError
from domainstudio.models.adaptation import EMBEDDING, LoraAdaptation
from domainstudio.models.identifier import load_identifier, read_embedding, save_embedding
from domainstudio.models.model import DiffusionModel
from domainstudio.quiet import quiet

LORA_FILE = "lora.safetensors"
DIFFUSERS_LORA_FILE = "pytorch_lora_weights.safetensors"
_KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_KOHYA_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up"}


def save_lora(adaptation: LoraAdaptation, path: Path) -> None:
    """Writes the adapters of an unconditional model, with rank and alpha in the metadata."""
    metadata = {"format": "pt", "rank": str(adaptation.rank), "lora_alpha": str(adaptation.lora_alpha)}
    save_file(_on_cpu(adaptation.state()), path, metadata=metadata)


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file."""
    return load_file(path)


def save_diffusers_lora(adaptation: LoraAdaptation, folder: Path) -> Path:
    """Writes `pytorch_lora_weights.safetensors` with adapter metadata into `folder`; `load_lora_weights` reads it.

    A new word's embedding goes beside it, into `learned_embeds.safetensors`; `load_textual_inversion` reads that.
    """
    if adaptation.embedding is not None:
        save_embedding(adaptation.embedding, folder)
    parts, metadata = _parts(adaptation.layers()), {}
    for part, tensors in parts.items():
        targets = {name.partition(".lora_")[0] for name in tensors}
        if part == "text_encoder":  # whose layers have a longer path before transformers 5
            targets = {name.rpartition(".")[2] for name in targets}
        config = LoraConfig(r=adaptation.rank, lora_alpha=adaptation.lora_alpha, target_modules=sorted(targets))  # pyright: ignore[reportArgumentType]
        metadata[f"{part}_lora_adapter_metadata"] = {
            name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
        }
    from diffusers import StableDiffusionPipeline  # late: it makes transformers talk about picture processors

    layers: dict[str, Any] = {f"{part}_lora_layers": tensors for part, tensors in parts.items()}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / DIFFUSERS_LORA_FILE


def pass_through_file(adaptation: LoraAdaptation, folder: Path) -> None:
    """Writes the adapters as users get them and reads them back, so that what is drawn next is what the file gives."""
    read = {_place(name): tensor for name, tensor in load_file(save_diffusers_lora(adaptation, folder)).items()}
    state = {name: read[_place(name)] for name in adaptation.layers()}
    if (word := read_embedding(folder)) is not None:
        state[EMBEDDING] = word[1]
    adaptation.load_state(state)


def save_kohya_lora(
    diffusers_file: Path, path: Path, rank: int, lora_alpha: float, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a diffusers LoRA under the names ComfyUI and A1111 read, each layer with its alpha.

    Args:
        metadata: of the file; None for none, as captions and file names may be private.
    """
    tensors = {}
    for part, layers in _parts(load_file(diffusers_file)).items():
        for name, tensor in layers.items():
            layer, _, side = name.removesuffix(".weight").rpartition(".")
            key = _KOHYA_PREFIX[part] + layer.replace(".", "_")
            tensors[f"{key}.{_KOHYA_NAMES[side]}.weight"] = tensor
            tensors[f"{key}.alpha"] = torch.tensor(float(lora_alpha))
    tensors = _on_cpu(tensors)
    if metadata is not None:
        metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(lora_alpha), **metadata}
    save_file(tensors, path, metadata=None if metadata is None else dict(metadata))


def load_lora(model: DiffusionModel, path: Path) -> None:
    """Adds a LoRA file of either kind to the weights of a Stable Diffusion model, for good, and the new word beside it.

    Raises:
        UserError: if it does not fit the model.
    """
    pipeline: Any = model.pipeline
    try:
        with quiet():
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            if not pipeline.get_list_adapters():
                raise ValueError("it has no layer of the UNet or the text encoder")
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            load_identifier(pipeline.tokenizer, pipeline.text_encoder, path.parent)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the LoRA {path} does not fit the model: {error}") from error


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ "unet" and "text_encoder" -> their tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, rest = _place(name)
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _place(name: str) -> tuple[str, str]:
    """The part a tensor belongs to and its name there, as files have it; names without a part are the UNet's."""
    part, _, rest = name.partition(".")
    if part not in _KOHYA_PREFIX:
        return "unet", name
    if part == "text_encoder" and not rest.startswith("text_model."):  # transformers 5 leaves it out, files do not
        rest = f"text_model.{rest}"
    return part, rest


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
