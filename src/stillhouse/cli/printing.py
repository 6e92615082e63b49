"""What every command prints: JSON for programs, plain columns for people."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer


def process() -> int:
    """The number of this process among those of a distributed run; 0 speaks for all."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Iterable):
        return list(value)
    return str(value)


def print_columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table in aligned columns, written without Rich, which is slow to import.

    On a terminal the last column is cut to the width; in a pipe it is whole.
    """
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings) - 1)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text = "  ".join([*cells, line[-1]]).rstrip()
        if room and len(text) > room:
            text = text[: max(1, room - 1)] + "…"
        typer.echo(typer.style(text, bold=True) if number == 0 and room else text)


def print_fields(fields: Mapping[str, Any], indent: str = "") -> None:
    """Nested fields, one per line, aligned; empty ones are left out."""
    kept = {k: v for k, v in fields.items() if v not in (None, "", [], (), {})}
    width = max((len(name) for name, v in kept.items() if not isinstance(v, Mapping)), default=0)
    for name, value in kept.items():
        if isinstance(value, Mapping):
            typer.echo(f"{indent}{name}")
            print_fields(value, indent + "  ")
        else:
            typer.echo(f"{indent}{name.ljust(width)}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)
