"""The command line called in this process, as a user calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from stillhouse.cli.main import main


class Called(NamedTuple):
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Call = Callable[..., Called]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    """`call("run", "x.yaml")` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STILLHOUSE_TRACEBACK", raising=False)
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> Called:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *words])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capfd.readouterr()
        return Called(code, out, err)

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe that runs in a second, with teacher and student."""
    recipe = {
        "method": "kd",
        "data": {"name": "generated", "options": {"kind": "vectors"}},
        "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "budget": {"steps": 4, "batch": 16, "lr": 0.05},
        "compare": [],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
