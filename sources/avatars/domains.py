"""Writes the bundled ten-shot domains: `python sources/avatars/domains.py` (needs Node.js; deterministic)."""

import io
import json
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from captions import caption, read_attributes
from PIL import Image

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "src/domainstudio/assets/domains"
NUM_TRAINING, NUM_HELDOUT = 10, 300
AVATAAARS = (
    "Avataaars by Pablo Stanley (https://avataaars.com), free for personal and commercial use; "
    "adapted by the DiceBear project."
)
DOMAINS = {
    "ink": "Ink drawings of faces: Lorelei by Lisa Wischofsky, CC0 1.0, through DiceBear. A far style.",
    "sunglasses": f"Avatars that all wear sunglasses, which the source model has never seen. An attribute. {AVATAAARS}",
    "watercolour": f"Avatars painted over by a filter: wet edges, washes, cream paper. A painterly style. {AVATAAARS}",
    "grey": f"Avatars without colours. A colour. {AVATAAARS}",
    "smiles": "Heads turned to the side with big mouths, much like emoji: Big Smile by Ashley Seo, CC BY 4.0, through "
    "DiceBear. Another anatomy.",
}
STYLE = {"sunglasses": ("glasses", "eyes"), "watercolour": ("background",)}
"""Of captioned domains: the attributes that the style decides, which captions leave to it."""


def render(domain: str, split: str, count: int) -> list[Image.Image]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.bin"
        subprocess.run(["node", HERE / "render.mjs", domain, str(count), split, path], check=True)
        return [Image.fromarray(pixels) for pixels in np.fromfile(path, np.uint8).reshape(-1, 64, 64, 3)]


def captions(domain: str, count: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.jsonl"
        subprocess.run(["node", HERE / "render.mjs", domain, str(count), "training", path, "0"], check=True)
        known = read_attributes(path)
    return [caption({name: words for name, words in a.items() if name not in STYLE[domain]}) for a in known]


def main() -> None:
    for domain, credit in DOMAINS.items():
        folder = OUT / domain
        (folder / "train").mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(render(domain, "training", NUM_TRAINING)):
            picture.save(folder / "train" / f"{index:02d}.png", optimize=True)
        if domain in STYLE:
            lines = [
                json.dumps({"file_name": f"{index:02d}.png", "text": text})
                for index, text in enumerate(captions(domain, NUM_TRAINING))
            ]
            (folder / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        with zipfile.ZipFile(folder / "heldout.zip", "w", zipfile.ZIP_STORED) as archive:
            for index, picture in enumerate(render(domain, "heldout", NUM_HELDOUT)):
                buffer = io.BytesIO()
                picture.save(buffer, "PNG", optimize=True)
                archive.writestr(zipfile.ZipInfo(f"{index:03d}.png"), buffer.getvalue())
        text = f"# {domain}\n\n{credit}\n\n`train/` holds ten training pictures, `heldout.zip` {NUM_HELDOUT} others "
        (folder / "README.md").write_text(text + "that nothing is trained on. Made by `sources/avatars/domains.py`.\n")


if __name__ == "__main__":
    main()
