"""A model of Stable Diffusion 1.x's size: `python benchmarks/stable_diffusion.py` (CPU, 24 GB; or CUDA).

Makes the pipeline with random weights (UNet 860M, VAE, CLIP text) once, under --folder; then loads it, draws source
samples, trains LoRA steps of both kinds (learning, binding) at full size, draws a preview and exports the LoRA: once
for each `space` of the image terms, with and without gradient checkpointing, each in a process of its own. One JSON
object a variant is appended to docs/benchmarks/stable_diffusion.jsonl: seconds a step and peak memory (of the process,
or of the GPU).
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from PIL import Image

from domainstudio.app.export import export_run
from domainstudio.app.memory import process_peak_bytes
from domainstudio.app.opened import train_config
from domainstudio.app.recipe import build_recipe
from domainstudio.app.runs import train_run

RESULTS = Path(__file__).parents[1] / "docs/benchmarks/stable_diffusion.jsonl"


def make_pipeline(folder: Path) -> None:
    """Stable Diffusion 1.x's shapes, random weights, half precision on disk."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    letters = [chr(i) for i in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as words:
        (Path(words) / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        (Path(words) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(f"{words}/vocab.json", f"{words}/merges.txt", model_max_length=77)
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, skip_prk_steps=True
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def measure(args: argparse.Namespace) -> dict:
    """One variant, in this process."""
    began, finished = time.perf_counter(), []
    pictures = Path(tempfile.mkdtemp())
    try:
        for index in range(4):
            noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).resize((512, 512)).save(pictures / f"{index}.png")
        recipe = build_recipe(
            None,
            {
                "pretrained_model_name_or_path": str(args.folder),
                "instance_data_dir": str(pictures),
                "output_dir": str(pictures / "run"),
                "instance_prompt": "a <v> dog",
                "class_prompt": "a dog",
                "method": args.method,
                "adapter": "lora",
                "space": args.space,
                "gradient_checkpointing": args.checkpointing,
                "mixed_precision": args.mixed_precision,
                "train_batch_size": args.batch_size,
                "pair_batch_size": max(3, args.batch_size),
                "num_class_images": max(3, args.batch_size),
                "max_train_steps": args.steps,
                "binding_steps": args.steps // 2 if args.method == "studio" else 0,
                "watch": False,
                "validation_steps": args.steps,
                "num_validation_images": 1,
                "num_inference_steps": 1,
                "lr_warmup_steps": 0,
            },
        )

        def watch(event) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            finished.append(time.perf_counter())

        run = train_run(recipe, observers=(watch,))
        size = export_run(run.path, "kohya", pictures / "lora.safetensors").stat().st_size
    finally:
        shutil.rmtree(pictures)
    seconds = [after - before for before, after in itertools.pairwise(finished)][:-1]  # the last has the preview, too
    learning = train_config(recipe).learning_steps
    binding = seconds[learning:]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    process_peak = process_peak_bytes()
    return {
        "method": args.method,
        "space": args.space,
        "gradient_checkpointing": args.checkpointing,
        "mixed_precision": args.mixed_precision,
        "batch": args.batch_size,
        "pair_batch": max(3, args.batch_size),
        "seconds_a_step": round(statistics.median(seconds[:learning]), 1),
        "seconds_a_binding_step": round(statistics.median(binding), 1) if binding else None,
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "peak_process_gib": None if process_peak is None else round(process_peak / 2**30, 2),
        "peak_gpu_gib": round(peak / 2**30, 2) if peak else None,
        "lora_mib": round(size / 2**20, 1),
        "device": torch.cuda.get_device_name() if peak else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": str(date.today()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/stable-diffusion-random"))
    parser.add_argument("--spaces", nargs="+", default=["model", "crop", "pixel"])
    parser.add_argument("--methods", nargs="+", default=["studio"])
    parser.add_argument("--batch-size", type=int, default=4 if torch.cuda.is_available() else 1)
    parser.add_argument("--steps", type=int, default=4, help="at least 2; half of them bind; the last is not timed")
    parser.add_argument("--mixed-precision", default="bf16")
    parser.add_argument("--without", action="store_true", help="without gradient checkpointing too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "SPACE", "CHECKPOINTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.method, args.space, args.checkpointing = args.one[0], args.one[1], args.one[2] == "True"
        print(json.dumps(measure(args)))
        return
    if not (args.folder / "model_index.json").exists():
        make_pipeline(args.folder)
    for method in args.methods:
        for space in args.spaces:
            for checkpointing in (True, False) if args.without else (True,):
                command = [sys.executable, __file__, "--folder", args.folder, "--batch-size", args.batch_size]
                command += ["--steps", args.steps, "--mixed-precision", args.mixed_precision]
                command += ["--one", method, space, checkpointing]
                done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
                print(row := done.stdout.splitlines()[-1], flush=True)
                with args.results.open("a") as file:
                    file.write(row + "\n")


if __name__ == "__main__":
    main()
