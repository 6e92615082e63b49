from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from stillhouse import report

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"


def printed(folder, *, terminal: bool = False, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    report.show(folder, console)
    return out.getvalue()


def test_plain_off_a_terminal_and_coloured_on_it(run_folder):
    folder = run_folder(
        run=run_folder.summary(), log=run_folder.log_lines(), recipe=run_folder.recipe, alone=True
    )
    report.write(folder)
    text = printed(folder)
    assert "\x1b[" not in text
    assert "\x1b[" in printed(folder, terminal=True)
    for expected in (
        "Distilling the Knowledge", "kd: finished", "student distilled", "0.9550 ± 0.0099",
        "better on this data", "Size and speed", "0.05 ×", "agreement with the teacher",
        "calibration, student: ECE 0.031", "teacher 7.4 s", "62 %", "warning: BatchNorm",
        f"report: {folder / 'report.html'}",
    ):  # fmt: skip
        assert expected in text, expected


def test_markup_is_not_obeyed(run_folder):
    folder = run_folder(
        run=run_folder.summary(title="[bold red]x[/bold red]", hardware=HOSTILE),
        recipe=run_folder.recipe,
    )
    text = printed(folder)
    assert "[bold red]x[/bold red]" in text
    assert HOSTILE in text


@pytest.mark.parametrize("kind", ["unfinished", "bare", "single"])
def test_unfinished_bare_and_single(run_folder, kind):
    bare = {"schema": 1, "method": "kd"}
    run = {"unfinished": None, "bare": bare, "single": run_folder.summary(seeds=1)}[kind]
    text = printed(run_folder(run=run, recipe=run_folder.recipe))
    assert "kd" in text
    assert "nan" not in text
    assert "report:" not in text  # no page has been written


def test_narrow_terminal_and_nan(run_folder):
    found = run_folder.summary()
    found["sides"]["distilled"]["0"]["accuracy"] = math.nan
    assert "nan" not in printed(run_folder(run=found, recipe=run_folder.recipe), width=40)


@pytest.mark.parametrize("same", [True, False])
def test_a_figure_of_the_teacher_stands_once_unless_it_was_another_teacher(run_folder, same):
    found = run_folder.summary()
    for seed, figures in found["sides"]["teacher"].items():
        told = figures["accuracy"] if same else 0.125
        found["sides"]["distilled"][seed]["teacher_accuracy"] = told
        found["sides"]["distilled"][seed]["teacher_only_here"] = 0.25
    text = printed(run_folder(run=found, recipe=run_folder.recipe))
    assert ("teacher accuracy" in text) is not same
    assert "teacher only here" in text
