"""Tiny Stable Diffusion models under the names of the original repository, as single-file checkpoints keep them."""

import re
from typing import Any

from torch import Tensor


def ldm_state(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a pipeline as one checkpoint."""
    state = {}
    for name, tensor in pipeline.unet.state_dict().items():
        state[f"model.diffusion_model.{_unet_name(name, pipeline.unet)}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        own = _vae_name(name, len(pipeline.vae.config.block_out_channels))
        projects = re.search(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight", own)  # by convolutions of 1 x 1
        state[f"first_stage_model.{own}"] = tensor[:, :, None, None] if projects else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        own = name.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.text_model.{own}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _unet_name(name: str, unet: Any) -> str:
    layers = unet.config.layers_per_block + 1
    kinds = {"resnets": 0, "attentions": 1}

    def down(match: re.Match) -> str:
        return f"input_blocks.{1 + int(match[1]) * layers + int(match[3])}.{kinds[match[2]]}"

    def up(match: re.Match) -> str:
        return f"output_blocks.{int(match[1]) * layers + int(match[3])}.{kinds[match[2]]}"

    def upsample(match: re.Match) -> str:
        place = 2 if hasattr(unet.up_blocks[int(match[1])], "attentions") else 1
        return f"output_blocks.{int(match[1]) * layers + layers - 1}.{place}.conv"

    name = re.sub(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", down, name)
    name = re.sub(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", up, name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.conv", upsample, name)
    name = re.sub(
        r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * layers}.0.op", name
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle_block.1")
    return _replaced(
        name,
        {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
        | {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
        | {".norm1": ".in_layers.0", ".conv1": ".in_layers.2", ".norm2": ".out_layers.0", ".conv2": ".out_layers.3"}
        | {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
        keep="transformer_blocks",
    )


def _vae_name(name: str, blocks: int) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    return _replaced(
        name,
        {"mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
        | {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    )


def _replaced(name: str, words: dict[str, str], keep: str = "\n") -> str:
    for old, new in words.items() if keep not in name else ():
        name = name.replace(old, new)
    return name
