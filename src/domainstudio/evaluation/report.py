"""The report: one self-contained HTML page that shows a run and says plainly what its numbers mean."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from torch import Tensor

from domainstudio.evaluation.charts import line_charts
from domainstudio.evaluation.entry import ReportEntry, diversity_gap, find_real, is_copying, percent, plain
from domainstudio.evaluation.gallery import filmstrip, nearest_gallery, noise_gallery, prompt_gallery, training_gallery
from domainstudio.evaluation.verdict import judge
from domainstudio.evaluation.watch import choose, tell

__all__ = ["ReportEntry", "write_report"]

_METRICS = {
    "kid": "KID ×10³",
    "fid": "FID",
    "intra_lpips": "Intra-LPIPS",
    "nearest_lpips": "Nearest distance",
    "copy_rate": "Copies",
    "unadapted_rate": "Unadapted",
    "num_images": "Images",
}
_MORE_METRICS = {
    **{"precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"},
    **{"vendi": "Vendi", "cmmd": "CMMD ×10³", "fd_dino": "FD-DINOv2"},
    **{"clip_image": "CLIP, to the training pictures", "clip_text": "CLIP, to the prompts"},
}
"""Shown folded, and where measured alone."""
_HOW_TO_READ = {
    "KID, FID": "How far the pictures are from held-out pictures of the domain. Lower is better – among models that do "
    "not copy: a copier scores excellently, and it means nothing. Compare KID; FID is biased when images are few.",
    "Intra-LPIPS": "How much pictures that resemble the same training picture differ from each other. Good is to equal "
    "the real pictures, not to be high: below them, variety was lost; above them, the model has often not adapted yet. "
    "The last small number is the gap to the real pictures.",
    "±": "The standard error, as far as the measured pictures say: how much the number would differ for others of the "
    "same model. Smaller differences mean nothing. How much another training run would differ it does not say.",
    "Nearest distance": "The mean LPIPS distance from a picture to its nearest training picture. Near zero: copies.",
    "Copies": "The share of pictures closer to a training picture than almost any real picture is. Real pictures have "
    "a small share too; only what clearly exceeds it, given the number of images, is called copying.",
    "Unadapted": "The share of pictures that look more like what the source draws than like the training pictures. "
    "They are unlike all others, so that they raise Intra-LPIPS.",
}
_HOW_TO_READ_MORE = (
    "Precision and density: do the pictures look real. Recall and coverage: is everything real among them. Vendi: the "
    "effective number of different pictures, to be read beside that of as many real ones. CMMD and FD-DINOv2: like KID "
    "and FID, as newer networks see it. The likeness to the training pictures is highest for a copier."
)


def write_report(
    path: Path,
    *,
    title: str,
    summary: str,
    training: Tensor,
    entries: Sequence[ReportEntry],
    details: Mapping[str, str],
) -> None:
    """Write the report as one HTML file that needs nothing but itself.

    Args:
        path: the file to write; its folder is made.
        title: the name of the run.
        summary: one or two sentences below it.
        training: (N, 3, H, W) in [-1, 1], the pictures the model was adapted to.
        entries: models and anchors, in the order of the table.
        details: settings of the run; values under a name that starts with "command" are shown as how to reproduce it.
    """
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=escape(summary),
        verdict=_verdict(entries, len(training)),
        sections="".join(_sections(training, entries, details)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _sections(training: Tensor, entries: Sequence[ReportEntry], details: Mapping[str, str]) -> list[str]:
    judged = [entry for kind in ("result", "real") for entry in entries if entry.kind == kind]
    nearest = "".join(nearest_gallery(entry, training) for entry in judged if entry.kind == "result" or entry.nearest)
    noise, prompted = noise_gallery(entries), prompt_gallery(entries)
    return [
        _section("Training pictures", "All that the models were given of the domain.", training_gallery(training)),
        _section("The numbers", "", _numbers(entries)) if entries else "",
        _section(
            "Same noise, side by side",
            "Each column starts from the same noise. A good adaptation keeps what the source drew and changes "
            "how it is drawn; a sample that has become a training picture was memorised.",
            noise,
        )
        if noise
        else "",
        _section(
            "Asked for something else",
            "What each model draws of other prompts, from the same noise: a good adaptation follows the words in the "
            "new style.",
            prompted,
        )
        if prompted
        else "",
        _section(
            "Samples and their nearest training pictures",
            "Above: a sample. Below: the training picture it is nearest to, and the LPIPS distance between them.",
            nearest,
        )
        if nearest
        else "",
        _training_section(entries),
        _details(details),
    ]


def _section(heading: str, lead: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{f'<p>{lead}</p>' if lead else ''}{body}</section>"


def _verdict(entries: Sequence[ReportEntry], num_training: int) -> str:
    verdict = judge(entries, num_training)
    findings = "".join(f'<li class="{tone}">{escape(text)}</li>' for tone, text in verdict.findings)
    return f"<p>{escape(verdict.headline)}</p>" + (f"<ul>{findings}</ul>" if findings else "")


def _numbers(entries: Sequence[ReportEntry]) -> str:
    measured = {n: label for n, label in _MORE_METRICS.items() if any(e.number(n) is not None for e in entries)}
    more = ""
    if measured:
        more = (
            f"<details><summary>More numbers</summary>{_table(entries, measured)}<p>{_HOW_TO_READ_MORE}</p></details>"
        )
    return _table(entries, _METRICS) + _how_to_read() + more + _protocols(entries)


def _table(entries: Sequence[ReportEntry], metrics: Mapping[str, str]) -> str:
    """Entries as rows, metrics as columns; a missing number is a dash with a footnote that says why."""
    real, reasons = find_real(entries), dict[str, int]()
    rows = ""
    for entry in entries:
        flag = ' class="flag"' if _copies(entry, real) and entry.number("copy_rate") else ""
        cells = "".join(
            f'<td data-label="{label}"{flag if name == "copy_rate" else ""}>{_cell(entry, name, real, reasons)}</td>'
            for name, label in metrics.items()
        )
        rows += (
            f'<tr class="{entry.kind}"><th scope="row">{escape(entry.title)}'
            f"<small>{escape(entry.note)}</small></th>{cells}</tr>"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in metrics.values())
    notes = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th scope="col">Model</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>" + (f'<ol class="reasons">{notes}</ol>' if notes else "")
    )


def _cell(entry: ReportEntry, name: str, real: ReportEntry | None, reasons: dict[str, int]) -> str:
    value = entry.number(name)
    if value is None:
        mark = reasons.setdefault(entry.reason(name), len(reasons) + 1)
        return f"–<sup>{mark}</sup>"
    if name == "intra_lpips":
        gap = diversity_gap(entry, real) if entry is not real else None
        small = f"<small>{gap:+.3f}</small>".replace("-", "−") if gap is not None else ""
        return f"{value:.3f}{_plus_minus(entry, name, '{:.3f}'.format)}{small}"
    whole = "{:,.0f}".format
    formats = {"copy_rate": percent, "unadapted_rate": percent, "num_images": whole} | dict.fromkeys(
        ("kid", "fid", "vendi", "cmmd", "fd_dino"), plain
    )
    text = formats.get(name, "{:.3f}".format)(value) + _plus_minus(entry, name, plain)
    return f"<s>{text}</s>" if name in ("kid", "fid") and _copies(entry, real) else text


def _plus_minus(entry: ReportEntry, name: str, shown: Callable[[float], str]) -> str:
    error = entry.error(name)
    return "" if error is None else f"<small>±\u00a0{shown(error)}</small>"


def _copies(entry: ReportEntry, real: ReportEntry | None) -> bool:
    return entry is not real and (entry.kind == "copier" or is_copying(entry, real) is True)


def _how_to_read() -> str:
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _HOW_TO_READ.items())
    return f'<dl class="reading">{items}</dl>'


def _protocols(entries: Sequence[ReportEntry]) -> str:
    """How each metric was measured, once where all entries agree, else by entry with a warning; then the notes."""
    users: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        for key, text in entry.metrics.items():
            if key.endswith("_protocol") and text:
                users.setdefault(key.removesuffix("_protocol"), {}).setdefault(str(text), []).append(entry.title)
    lines = []
    for name, protocols in users.items():
        label = _METRICS.get(name, name.replace("_", " ").capitalize())
        if len(protocols) == 1:
            lines.append(f"{label}: {next(iter(protocols))}")
        else:
            each = "; ".join(f"{text} ({', '.join(titles)})" for text, titles in protocols.items())
            lines.append(f"{label} was measured in different ways, so these rows do not compare: {each}")
    lines += dict.fromkeys(str(note) for entry in entries for note in entry.metrics.get("notes") or ())
    return '<p class="protocols">' + "<br>".join(escape(line) for line in lines) + "</p>" if lines else ""


def _training_section(entries: Sequence[ReportEntry]) -> str:
    parts = [_training(entry) for entry in entries if entry.losses or entry.previews]
    lead = (
        "The bold line is a moving average, the faint one what was logged; each chart has its own scale. A falling "
        "loss is no proof of a good model: memorising lowers it too."
    )
    if any(entry.readings for entry in entries):
        lead += " The dashed line is the checkpoint that the watch chose."
    return _section("Over training", lead, "".join(parts)) if parts else ""


def _training(entry: ReportEntry) -> str:
    charts, film = line_charts(entry.losses), filmstrip(entry)
    watched = ""
    if entry.readings:
        best = choose(entry.readings)
        curves = line_charts([reading.curves() for reading in entry.readings], best.step if best else None)
        watched = f'<p><strong>{escape(tell(entry.readings))}</strong></p><div class="charts">{curves}</div>'
    return (
        f"<h3>{escape(entry.title)}</h3>{watched}"
        + (f'<div class="charts">{charts}</div>' if charts else "")
        + (f'<p class="caption">Samples from fixed noise, by training step</p>{film}' if film else "")
    )


def _details(details: Mapping[str, str]) -> str:
    commands = [value for name, value in details.items() if name.lower().startswith("command")]
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in details.items()
        if not name.lower().startswith("command")
    )
    how = "".join(f"<pre><code>{escape(command)}</code></pre>" for command in commands)
    again = how or "<p>Train again with the settings and the seed above.</p>"
    table = f'<table class="details"><tbody>{rows}</tbody></table>' if rows else ""
    return _section("Run details", "", f"{table}<h3>How to reproduce</h3>{again}") if details else ""
