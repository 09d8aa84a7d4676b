"""Lines of docs/benchmarks/*.jsonl, an object a measurement; how they are read, averaged and written as tables."""

import json
import statistics
import sys
import tomllib
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def write_row(path: Path, key: Row, result: Row) -> None:
    row = key | result | {"torch": torch.__version__, "date": str(date.today())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def name_of(method: str, settings: dict[str, Any]) -> str:
    return method + "".join(f" {key}={value}" for key, value in sorted(settings.items()))


def parse_entry(text: str) -> tuple[str, dict[str, Any], list[int]]:
    """ "studio image_weight=0.05 @ 200,300" -> method, settings, steps to measure at."""
    entry, _, steps = text.partition("@")
    method, *pairs = entry.split()
    settings = {key: tomllib.loads(f"value = {value}")["value"] for key, value in (p.split("=") for p in pairs)}
    return method, settings, [int(step) for step in steps.split(",")]


def mean_of(rows: list[Row], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def spread(rows: list[Row], name: str, digits: int, scale: float = 1) -> str:
    """Mean, and standard deviation where there are several."""
    values = [scale * row[name] for row in rows]
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def by_step(rows: list[Row], name: str) -> dict[int, list[Row]]:
    """The measurements of one method: step -> a row a seed."""
    groups = defaultdict(list)
    for row in rows:
        if row["name"] == name:
            groups[row["step"]].append(row)
    return dict(sorted(groups.items()))


def write_tables(results: Path, title: str, text: str) -> None:
    """Beside the results, with the extension .md."""
    note = f"Written by `python benchmarks/{Path(sys.argv[0]).name} --table`; how to read it: [README.md](README.md)."
    results.with_suffix(".md").write_text(f"# {title}\n\n{note}\n{text.rstrip()}\n")
