"""Trains the bundled avatar source: `python sources/avatars/train.py all` (resumes; uses a GPU if there is one).

Stages, each with its checkpoint under --build: render (Node.js), vae, latents, then decoder and unet, which need
nothing of each other and may run side by side, and export. `--continue-from PIPELINE` begins with the weights of an
exported pipeline: its encoder, and so its latents, stay as they are. Every stage keeps an exponential moving average
with a length tied to the run; the learning rate warms up and falls linearly to zero over the last two fifths.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from domainstudio.evaluation.features import load_lpips

HERE = Path(__file__).parent
DOMAINS = ["sunglasses", "watercolour", "ink", "grey", "smiles"]
STYLES = [*DOMAINS, "adventurer", "bigSmile", "dylan", "micah", "notionists", "openPeeps", "personas", "toonHead"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU, the backward pass of plain attention over 64 places is twice as fast as that of the fused kernel.
KERNELS = [SDPBackend.MATH] if DEVICE == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Latents that a diffusion model draws are never exact: the decoder learns to make clean pictures of noisy ones.
MAX_LATENT_NOISE = 0.1


def render(build: Path) -> None:
    """40,000 avatars for the diffusion model; 3,000 of every other style so that the codec knows them all."""
    for name, count, split in [("avatars", 40_000, "train")] + [(style, 3_000, "vae") for style in STYLES]:
        render_set(build / f"{name}.bin", name, count, split)


def render_set(path: Path, name: str, count: int, split: str, px: int = 64) -> None:
    """Writes `count` pictures of a set, or with 0 pixels what is in each of them; does nothing if they are there."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        subprocess.run(["node", HERE / "render.mjs", name, str(count), split, partial, str(px)], check=True)
        partial.rename(path)


def pictures(path: Path) -> np.ndarray:
    """(N, 64, 64, 3) uint8, memory-mapped."""
    return np.memmap(path, np.uint8, "r").reshape(-1, 64, 64, 3)


def to_tensor(batch: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float().div(127.5).sub(1).to(DEVICE)


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
    ).to(DEVICE)


def new_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 192),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        attention_head_dim=64,
    ).to(DEVICE)


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def fit(
    name: str,
    network: nn.Module,
    parameters: list[nn.Parameter],
    loss: Callable[[float], Tensor],
    steps: int,
    lr: float,
    build: Path,
) -> None:
    """AdamW with warm-up and final decay, EMA, a checkpoint a minute; leaves the EMA weights in `network`.

    `loss` is told which part of the steps is done.
    """
    path = build / f"{name}.pt"
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average, step, saved = [p.detach().clone() for p in parameters], 0, time.time()
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        network.load_state_dict(state["network"])
        average, step = state["average"], state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        state = {"network": network.state_dict(), "average": average, "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)

    smoothed = None
    while step < steps:
        torch.manual_seed(1_000_003 * step + 17)
        rate = lr * min(1, (step + 1) / 300, 2.5 * (1 - step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(DEVICE, torch.bfloat16), sdpa_kernel(KERNELS):
            value = loss(step / steps)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, 1 - 1 / (0.08 * step + 1))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        smoothed = value.item() if smoothed is None else 0.98 * smoothed + 0.02 * value.item()
        if step % 50 == 0:
            print(f"{name} {step}/{steps} loss {smoothed:.4f} lr {rate:.2e} {time.strftime('%H:%M:%S')}", flush=True)
        if time.time() - saved > 60:
            save()
            saved = time.time()
    save()
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)


def batches(build: Path, size: int, more: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """Half avatars, half other styles (two in three of them of the bundled domains and `more`), mirrored at random.

    Drawn from torch's generator, so a resumed run is the same.
    """
    names = [*4 * [*DOMAINS, *more], *STYLES, *more]
    avatars, others = pictures(build / "avatars.bin"), [pictures(build / f"{name}.bin") for name in names]
    while True:
        rows = [avatars[int(i)] for i in torch.randint(len(avatars), (size // 2,))]
        styles = [others[i] for i in torch.randint(len(others), (size - size // 2,))]
        rows += [style[int(torch.randint(len(style), ()))] for style in styles]
        batch = to_tensor(np.stack(rows))
        yield torch.where(torch.rand(size, 1, 1, 1, device=DEVICE) < 0.5, batch.flip(-1), batch)


def train_vae(vae: AutoencoderKL, build: Path, steps: int) -> None:
    lpips, source = load_lpips("alex").to(DEVICE), batches(build, 16)

    def loss(_: float) -> Tensor:
        images = next(source)
        posterior = vae.encode(images).latent_dist
        return picture_error(lpips, vae.decode(posterior.sample()).sample, images) + 3e-4 * posterior.kl().mean() / 1024

    fit("vae", vae, list(vae.parameters()), loss, steps, 1e-3, build)


def picture_error(lpips: nn.Module, decoded: Tensor, images: Tensor) -> Tensor:
    """L1 and LPIPS."""
    perceptual = (lpips(decoded).float() - lpips(images).float()).square().sum(1).mean()
    return (decoded.float() - images).abs().mean() + 0.4 * perceptual


def polish_decoder(
    vae: AutoencoderKL, build: Path, steps: int, name: str = "decoder", more: tuple[str, ...] = ()
) -> None:
    """Trains the decoder alone: the latents stay what they were, so the diffusion model stays valid."""
    lpips, source = load_lpips("alex").to(DEVICE), batches(build, 8, more)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]

    def loss(_: float) -> Tensor:
        images = next(source)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        noise = MAX_LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=DEVICE) * torch.randn_like(latents)
        return picture_error(lpips, vae.decode(latents + noise).sample, images)

    fit(name, vae, parameters, loss, steps, 7e-4, build)


@torch.no_grad()
def encode(vae: AutoencoderKL, build: Path) -> tuple[Tensor, Tensor, float]:
    """Posterior mean and standard deviation of every avatar, and the scale that gives latents unit variance."""
    path = build / "latents.pt"
    if not path.exists():
        mean, std = posteriors(vae, pictures(build / "avatars.bin")[:40_000])
        torch.save((mean, std, 1 / (mean.float().var() + std.float().square().mean()).sqrt().item()), path)
    return torch.load(path, weights_only=True)


def posteriors(vae: AutoencoderKL, data: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every picture's posterior, in half precision on the CPU."""
    means, stds = [], []
    for start in range(0, len(data), 500):
        posterior = vae.encode(to_tensor(data[start : start + 500])).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(stds)


def draw_latents(mean: Tensor, std: Tensor, rows: Tensor, scale: float) -> Tensor:
    """A sample of the posterior of each of `rows`, scaled to unit variance."""
    x0 = mean[rows].float().to(DEVICE)
    return scale * (x0 + std[rows].float().to(DEVICE) * torch.randn_like(x0))


@dataclass(frozen=True)
class Noised:
    """A batch of clean latents with noise: x_t (B, C, h, w) at time steps t (B,)."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    velocity: Tensor

    def error(self, output: Tensor) -> Tensor:
        """L_simple in v."""
        return F.mse_loss(output.float(), self.velocity)

    def estimate(self, output: Tensor) -> Tensor:
        """The clean latents that an output in v means."""
        return self.alpha * self.x_t - self.sigma * output


def noiser() -> Callable[[Tensor], Noised]:
    """Adds noise to clean latents (B, C, h, w), at levels spread over the whole schedule."""
    alphas_cumprod = new_scheduler().alphas_cumprod
    alphas, sigmas = alphas_cumprod.sqrt().to(DEVICE), (1 - alphas_cumprod).sqrt().to(DEVICE)

    def noised(x0: Tensor) -> Noised:
        # Stratified time steps: the same distribution, less variance of the loss.
        t = ((torch.arange(len(x0)) + torch.rand(len(x0))) / len(x0) * 1000).long().clamp(max=999).to(DEVICE)
        alpha, sigma, noise = alphas[t].view(-1, 1, 1, 1), sigmas[t].view(-1, 1, 1, 1), torch.randn_like(x0)
        return Noised(alpha * x0 + sigma * noise, t, alpha, sigma, alpha * noise - sigma * x0)

    return noised


def train_unet(
    unet: UNet2DModel, latents: tuple[Tensor, Tensor, float], build: Path, steps: int, batch_size: int, lr: float
) -> None:
    (mean, std, scale), noised = latents, noiser()

    def loss(_: float) -> Tensor:
        batch = noised(draw_latents(mean, std, torch.randint(len(mean), (batch_size,)), scale))
        return batch.error(unet(batch.x_t, batch.t).sample)

    fit("unet", unet, list(unet.parameters()), loss, steps, lr, build)


def export(vae: AutoencoderKL, unet: UNet2DModel, scale: float, out: Path) -> None:
    """An ordinary diffusers `LDMPipeline` folder in float16."""
    vae.register_to_config(scaling_factor=scale)
    LDMPipeline(vqvae=vae.half(), unet=unet.half(), scheduler=new_scheduler()).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["render", "vae", "latents", "decoder", "unet", "all"])
    parser.add_argument("--build", type=Path, default=Path("build/avatars"))
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "src/domainstudio/assets/models/avatars")
    parser.add_argument("--continue-from", type=Path, help="pipeline folder whose weights are trained further")
    parser.add_argument("--vae-steps", type=int, default=3_000)
    parser.add_argument("--decoder-steps", type=int, default=14_000)
    parser.add_argument("--unet-steps", type=int, default=12_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    args.build.mkdir(parents=True, exist_ok=True)
    render(args.build)
    if args.stage == "render":
        return
    vae, unet = new_vae(), new_unet()
    if args.continue_from:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.continue_from, subfolder="vqvae").state_dict())
        unet.load_state_dict(UNet2DModel.from_pretrained(args.continue_from, subfolder="unet").state_dict())
    else:
        train_vae(vae, args.build, args.vae_steps)
    if args.stage == "vae":
        return
    latents = encode(vae, args.build)
    if args.stage in ("unet", "all"):
        train_unet(unet, latents, args.build, args.unet_steps, args.batch_size, args.lr)
    if args.stage in ("decoder", "all"):
        polish_decoder(vae, args.build, args.decoder_steps)
    if args.stage == "all":
        export(vae, unet, latents[2], args.out)
        print(json.dumps({"latent_scale": latents[2], "unet_parameters": sum(p.numel() for p in unet.parameters())}))


if __name__ == "__main__":
    main()
