"""The pictures of a report, as HTML with every image inside the page."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from domainstudio.evaluation.entry import ReportEntry, percent

LOSSLESS_PX, THUMBNAIL_PX = 64, 160
MAX_NOISES, MAX_SAMPLES, MAX_TRAINING, MAX_PREVIEWS, MAX_PREVIEW_ROWS = 12, 20, 40, 10, 3


def training_gallery(training: Tensor) -> str:
    """The training pictures, (N, 3, H, W) in [-1, 1]."""
    shown = training[:MAX_TRAINING]
    images = "".join(_img(image, f"Training picture {k}") for k, image in enumerate(shown, 1))
    rest = f"<p>The first {len(shown)} of {len(training)}.</p>" if len(shown) < len(training) else ""
    return f'<div class="wall">{images}</div>{rest}'


def noise_gallery(entries: Sequence[ReportEntry]) -> str:
    """Rows: the source, then each result. Columns: the same starting noise."""
    shown = [entry for entry in entries if entry.from_noise and len(entry.images)]
    chosen = [entry for kind in ("source", "result") for entry in shown if entry.kind == kind]
    if not chosen:
        return ""
    columns = min(MAX_NOISES, *(len(entry.images) for entry in chosen))
    rows = "".join(
        f'<h3>{escape(entry.title)}</h3><div class="row">'
        + "".join(_img(image, f"{entry.title}, noise {k}") for k, image in enumerate(entry.images[:columns], 1))
        + "</div>"
        for entry in chosen
    )
    return f'<div class="scroll"><div class="noise">{rows}</div></div>'


def prompt_gallery(entries: Sequence[ReportEntry]) -> str:
    """For each prompt, a row of pictures of each entry that was asked for it."""
    asked = [entry for entry in entries if entry.prompted]
    prompts = dict.fromkeys(prompt for entry in asked for prompt, _ in entry.prompted)
    parts = ""
    for prompt in prompts:
        rows = "".join(
            f'<p class="caption">{escape(entry.title)}</p><div class="row">'
            + "".join(_img(image, f"{entry.title}: {prompt}") for image in images[:MAX_NOISES])
            + "</div>"
            for entry in asked
            for own, images in entry.prompted
            if own == prompt
        )
        parts += f'<h3>{escape(prompt)}</h3><div class="scroll"><div class="noise">{rows}</div></div>'
    return parts


def nearest_gallery(entry: ReportEntry, training: Tensor) -> str:
    """Samples above their nearest training picture, the closest first, suspected copies outlined."""
    if not entry.nearest or not entry.distances:
        return f'<h3>{escape(entry.title)}</h3><p class="missing">Distances to the training pictures: not measured.</p>'
    threshold = entry.number("copy_threshold")
    order = sorted(range(len(entry.images)), key=lambda k: entry.distances[k])
    pairs = "".join(_pair(entry, k, training, threshold) for k in order[:MAX_SAMPLES])
    return (
        f"<h3>{escape(entry.title)}</h3><p>{_nearest_caption(entry, len(order), threshold)}</p>"
        f'<div class="pairs">{pairs}</div>'
    )


def _nearest_caption(entry: ReportEntry, count: int, threshold: float | None) -> str:
    shown = min(count, MAX_SAMPLES)
    text = f"The {shown} closest of {count}." if shown < count else f"All {count}, the closest first."
    if threshold is None:
        return text + " No copy threshold was measured, so none is marked."
    suspected = sum(distance <= threshold for distance in entry.distances)
    share = f" ({percent(suspected / count)})" if suspected else ""
    return f"{text} {suspected or 'None'} of {count}{share} within the copy threshold of {threshold:.3f}."


def _pair(entry: ReportEntry, k: int, training: Tensor, threshold: float | None) -> str:
    distance, neighbour = entry.distances[k], entry.nearest[k]
    suspected = threshold is not None and distance <= threshold
    return (
        f'<figure class="pair{" copy" if suspected else ""}">{_img(entry.images[k], f"{entry.title}, sample {k + 1}")}'
        f"{_img(training[neighbour], f'Its nearest training picture, number {neighbour + 1}')}"
        f"<figcaption>{distance:.3f}{' <b>copy?</b>' if suspected else ''}</figcaption></figure>"
    )


def filmstrip(entry: ReportEntry) -> str:
    """Samples from fixed noise over training: each column is one step, each row one noise."""
    if not entry.previews:
        return ""
    keep = np.unique(
        np.linspace(0, len(entry.previews) - 1, min(len(entry.previews), MAX_PREVIEWS)).round().astype(int)
    )
    frames = ""
    for step, images in (entry.previews[k] for k in keep):
        column = (
            images[:MAX_PREVIEW_ROWS].transpose(0, 1).flatten(1, 2)
        )  # (3, K H, W): the samples of one step, stacked
        alt = f"{entry.title}: {min(len(images), MAX_PREVIEW_ROWS)} samples at step {step}"
        frames += f'<figure class="frame">{_img(column, alt)}<figcaption>{step:,}</figcaption></figure>'
    return f'<div class="scroll"><div class="film">{frames}</div></div>'


def _img(image: Tensor, alt: str) -> str:
    return f'<img src="{_data_uri(image)}" alt="{escape(alt)}">'


def _data_uri(image: Tensor) -> str:
    """(3, H, W) in [-1, 1] as a WebP: small pictures exact, large ones as thumbnails."""
    pixels = ((image.detach().float().cpu().nan_to_num() + 1) * 127.5).clamp(0, 255).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    exact = picture.width <= LOSSLESS_PX
    if picture.width > THUMBNAIL_PX:
        height = round(picture.height * THUMBNAIL_PX / picture.width)
        picture = picture.resize((THUMBNAIL_PX, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=exact, quality=82)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
