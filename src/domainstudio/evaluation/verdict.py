"""The verdict of a report: what the numbers say, in plain words, whoever is better."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from domainstudio.evaluation.entry import (
    ReportEntry,
    diversity_gap,
    find_real,
    is_copying,
    percent,
    plain,
    real_copy_rate,
)
from domainstudio.evaluation.watch import MANY_UNADAPTED

Tone = Literal["good", "bad", "neutral"]

FEW_IMAGES = 200
MARKED_GAP = 0.25  # of the real pictures' diversity
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True)
class Verdict:
    """A headline and the findings behind it, each with a tone."""

    headline: str
    findings: tuple[tuple[Tone, str], ...]


def judge(entries: Sequence[ReportEntry], num_training: int) -> Verdict:
    """Compare the results of a report by likeness (KID), diversity (Intra-LPIPS) and copying."""
    real = find_real(entries)
    results = [entry for entry in entries if entry.kind == "result"]
    source = next((entry for entry in entries if entry.kind == "source"), None)
    findings = [_finding(entry, real, source, num_training) for entry in results]
    return Verdict(_headline(results, real, source), (*findings, *_caveats(results, real)))


def _headline(results: list[ReportEntry], real: ReportEntry | None, source: ReportEntry | None) -> str:
    if not results:
        return "There is no adapted model to judge: only anchors are shown."
    if not any(_is_measured(entry) for entry in results):
        return "Nothing was measured, so there is no verdict: the pictures below must speak."
    copying = [is_copying(entry, real) for entry in results]
    eligible = [entry for entry, copies in zip(results, copying, strict=True) if not copies]
    if eligible and all(_is_behind(entry, source) for entry in eligible):
        if len(results) == 1:
            return f"{results[0].title} is no closer to the domain than the source before training."
        return "No model without copies is closer to the domain than the source before training."
    if len(results) == 1:
        return _headline_of_one(results[0], copying[0])
    if not eligible:
        return "Every adapted model hands back training pictures."
    if len(eligible) == 1:
        return _headline_of_last(eligible[0], is_copying(eligible[0], real))
    comparison, is_sure = _comparison(eligible, real), None not in copying
    if len(eligible) < len(results):
        return f"Among the models {'that do not' if is_sure else 'not shown to'} copy, {comparison}."
    return _capital(comparison) + ("." if is_sure else " – but not every model was checked for copying.")


def _headline_of_one(entry: ReportEntry, copies: bool | None) -> str:
    if copies is None:
        return f"{entry.title} was measured, but not for copying."
    if copies:
        return f"{entry.title} hands back training pictures."
    unadapted = _marked_unadapted(entry)
    but = f", but {percent(unadapted)} of its pictures still look like the source's" if unadapted else ""
    return f"{entry.title} does not copy{but}."


def _headline_of_last(entry: ReportEntry, copies: bool | None) -> str:
    if copies is None:
        return f"All models hand back training pictures but {entry.title}, which was not checked for it."
    return f"{entry.title} is the only adapted model that does not copy."


def _comparison(eligible: list[ReportEntry], real: ReportEntry | None) -> str:
    """Who is closest to the real pictures in likeness (KID) and in diversity (the gap of Intra-LPIPS).

    Level are those that differ by less than their standard errors, together. Pictures that are left in the source's
    domain are unlike the others: who leaves many there cannot win in diversity.
    """

    def gap(entry: ReportEntry) -> float | None:
        signed = diversity_gap(entry, real)
        return None if signed is None or _marked_unadapted(entry) else abs(signed)

    alike = _leaders(eligible, "kid", lambda entry: entry.number("kid"))
    varied = _leaders(eligible, "intra_lpips", gap)
    if not alike and not varied:
        return "the models cannot be compared: neither KID nor diversity is known for two of them"
    if len(alike) == len(varied) == 1 and alike[0] is varied[0]:
        return f"{alike[0].title} is closest to the real pictures, in likeness and in diversity"
    if len(alike) == len(varied) == len(eligible):
        return f"{_names(alike)} are level, in likeness and in diversity"
    if not varied:
        return _lead(alike, "looks most like the real pictures", "look equally like the real pictures")
    if not alike:
        return (
            _lead(varied, "comes closest to the diversity", "are equally close to the diversity") + " of real pictures"
        )
    likeness = _lead(alike, "looks most like the real pictures", "look equally like the real pictures")
    return f"{likeness}; " + _lead(varied, "comes closest to their diversity", "are equally close to their diversity")


def _lead(leaders: list[ReportEntry], one: str, several: str) -> str:
    return f"{_names(leaders)} {one if len(leaders) == 1 else several}"


def _leaders(entries: list[ReportEntry], name: str, score: Callable[[ReportEntry], float | None]) -> list[ReportEntry]:
    """The entry with the lowest score of the metric `name`, and those level with it; none where fewer than two have
    one."""
    scored = [(value, entry.error(name) or 0.0, entry) for entry in entries if (value := score(entry)) is not None]
    if len(scored) < 2:
        return []
    best, its_error, _ = min(scored, key=lambda item: item[0])
    return [entry for value, error, entry in scored if value - best <= math.hypot(error, its_error)]


def _finding(
    entry: ReportEntry, real: ReportEntry | None, source: ReportEntry | None, num_training: int
) -> tuple[Tone, str]:
    if not _is_measured(entry):
        return "neutral", f"{entry.title}: nothing was measured."
    copies, rate, kid = is_copying(entry, real), entry.number("copy_rate"), entry.number("kid")
    if copies and rate is not None:
        one = f"one of the {_count(num_training)}" if num_training > 1 else "the training picture"
        text = f"{entry.title} hands back training pictures: {percent(rate)} of its samples are closer to {one} "
        flattered = f" That flatters its KID ({plain(kid)}), which is set aside." if kid is not None else ""
        return "bad", text + _than_real(real) + flattered
    parts = [f"KID {plain(kid)}" if kid is not None else "KID not measured", _diversity(entry, real)]
    parts.append(f"{percent(rate)} copies" if rate is not None else "copying not measured")
    text, remark = f"{entry.title}: {', '.join(parts)}.", _unadapted_remark(entry) or _diversity_remark(entry, real)
    if _is_behind(entry, source):
        return "bad", f"{text}{remark} Its KID is no better than that of the source before training."
    return ("good" if copies is False and not remark else "neutral"), text + remark


def _is_behind(entry: ReportEntry, source: ReportEntry | None) -> bool:
    """Whether the KID of `entry` is known to be no better than that of the un-adapted source."""
    own, start = entry.number("kid"), source.number("kid") if source else None
    return own is not None and start is not None and own >= start


def _than_real(real: ReportEntry | None) -> str:
    if real is None or real.number("copy_rate") is None:
        return "than the copy threshold allows."
    percentile = round(100 * real_copy_rate(real))
    return f"than {100 - percentile} in 100 real pictures are." if percentile else "than any real picture is."


def _diversity(entry: ReportEntry, real: ReportEntry | None) -> str:
    own, wanted = entry.number("intra_lpips"), real.number("intra_lpips") if real else None
    if own is None:
        return "diversity not measured"
    return f"diversity {own:.2f}" + (f" (real pictures: {wanted:.2f})" if wanted is not None else "")


def _diversity_remark(entry: ReportEntry, real: ReportEntry | None) -> str:
    gap, wanted = diversity_gap(entry, real), real.number("intra_lpips") if real else None
    if gap is None or not wanted or abs(gap) < MARKED_GAP * wanted:
        return ""
    if gap < 0:
        return " Its pictures are clearly less varied than real ones."
    return " Its pictures are more varied than real ones, which often means that it has not arrived in the domain."


def _marked_unadapted(entry: ReportEntry) -> float | None:
    """The share of pictures that still look like the source's, where it is large; of models that were adapted."""
    rate = entry.number("unadapted_rate")
    return rate if entry.kind == "result" and rate is not None and rate > MANY_UNADAPTED else None


def _unadapted_remark(entry: ReportEntry) -> str:
    rate = _marked_unadapted(entry)
    return f" {percent(rate)} of them still look like the source's, which flatters its diversity." if rate else ""


def _caveats(results: list[ReportEntry], real: ReportEntry | None) -> list[tuple[Tone, str]]:
    caveats: list[tuple[Tone, str]] = []
    if results and real is None:
        caveats.append(
            ("neutral", "No held-out real pictures were given, so nothing says how varied the domain itself is.")
        )
    counts = [count for entry in results if _is_measured(entry) and (count := entry.number("num_images"))]
    if counts and min(counts) < FEW_IMAGES:
        caveats.append(("neutral", f"Only {min(counts):.0f} images were measured: small differences mean nothing."))
    return caveats


def _is_measured(entry: ReportEntry) -> bool:
    return any(entry.number(name) is not None for name in ("kid", "fid", "intra_lpips", "copy_rate"))


def _names(entries: list[ReportEntry]) -> str:
    titles = [entry.title for entry in entries]
    return titles[0] if len(titles) == 1 else ", ".join(titles[:-1]) + " and " + titles[-1]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:] if sentence.startswith("the models") else sentence


def _count(number: int) -> str:
    return _WORDS[number] if number < len(_WORDS) else str(number)
