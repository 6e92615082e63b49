"""docs/performance.md, made from results.json and the texts of the experiments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from contest import holds

HEAD = """# What it costs, beside the peers

Made by `python benchmarks/run.py --table` from `benchmarks/results.json`; `make bench` measures
all rows again, `python benchmarks/run.py E1` one of them. Every figure is a ratio of interleaved
processes on one machine, the median of several rounds, with the least and the greatest in
brackets. Times by themselves are not quoted: they mean nothing on a shared machine. All sides
run on one build of torch, on the CPU.
"""


def write_page(path: Path, results: Mapping[str, Any], known: Mapping[str, ModuleType]) -> None:
    """Write the page: a table of all ratios, then a section for each row."""
    lines = [HEAD, "| row | ratio | measured | target | |", "|---|---|---|---|---|"]
    for name, row in results.items():
        lines += [_line(name, row, key) for key in row["ratios"]]
    for name, row in results.items():
        lines += ["", *_section(name, row, known.get(name))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(name: str, row: Mapping[str, Any], key: str) -> str:
    value = row["ratios"][key]
    spread = row["spread"].get(key)
    between = f" [{spread[0]:.3g}, {spread[1]:.3g}]" if spread else ""
    target = row["targets"].get(key, "")
    verdict = "" if not target else "met" if holds(value, target) else "**missed**"
    return f"| {name} | {key} | {value:.3g}{between} | {target} | {verdict} |"


def _section(name: str, row: Mapping[str, Any], module: ModuleType | None) -> list[str]:
    title, _, rest = (module.ABOUT if module else name).partition("\n")
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    lines = [f"## {name}: {title}", ""]
    if rest.strip():
        lines += [rest.strip(), ""]
    lines += [f"- {note}" for note in row["notes"]]
    for key, value in row["figures"].items():
        lines += _figures(key, value)
    when = f"{row['date'][:10]}, {row['hardware']}, {row['seconds']} s"
    return [*lines, f"- `{row['command']}`, {when}; {versions}."]


def _figures(key: str, value: Any) -> list[str]:
    """A list of records as a table; anything else as a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        columns = list(value[0])
        head = ["", key + ":", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        rows = [f"| {' | '.join(_shown(entry.get(c)) for c in columns)} |" for entry in value]
        return [*head, *rows, ""]
    return [f"- {key}: {_shown(value)}"]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return (
        ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
        if isinstance(value, dict)
        else str(value)
    )
