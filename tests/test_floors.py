"""Imports go downwards only, along the floors that docs/architecture.md draws."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "stillhouse"
DOORS = {"__init__", "__main__"}  # they hand on what lies below, wherever it is


def floors() -> dict[str, int]:
    """Room or file to its floor, the lowest 0, as the page's first block says."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"## Floors.*?```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    drawn = [line.split("   ")[0].split() for line in block[1].splitlines()]
    # A line that begins with blanks only goes on with the words beside the one above.
    drawn = [names for names in drawn if names]
    return {name: number for number, names in enumerate(reversed(drawn)) for name in names}


FLOORS = floors()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of our own, those for type checkers apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "stillhouse":
            names = [f"stillhouse.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.startswith("stillhouse.") and not name.startswith("stillhouse._"):
                yield node.lineno, name.split(".")[1]


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


ROOMS = sorted({room_of(path) for path in SOURCE.rglob("*.py")} - DOORS - {"_version"})


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_stands_on_a_floor_and_imports_nothing_above_it(room: str):
    assert room in FLOORS, f"{room} is missing among the floors of docs/architecture.md"
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in SOURCE.rglob("*.py")
        if room_of(path) == room
        for line, other in imported(path)
        if FLOORS[other] > FLOORS[room]
    ]
    assert not upwards


def test_methods_import_neither_each_other_nor_baselines():
    for path in (SOURCE / "methods").rglob("*.py"):
        assert not {"methods", "baselines"} & {room for _, room in imported(path)}, path
