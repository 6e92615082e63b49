"""The report on the terminal: the same words and figures as the page, without charts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.report.content import Grid, Report
from stillhouse.report.html import NAME
from stillhouse.report.sections import make_report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLE = {"teacher": "bright_black", "alone": "blue", "distilled": "dark_orange3", "other": ""}
MOST_ROWS = 12


def show(run_folder: Path | str, console: Console | None = None) -> None:
    """Print a run's report.

    Args:
        run_folder: of a finished run or one that was stopped.
        console: where; standard output by default. Off a terminal it is plain text.

    Raises:
        RunFolderError: there is no such folder, or no run in it.
    """
    from rich.console import Console

    out = console or Console()
    report = make_report(run_folder)
    _head(report, out)
    if report.results:
        out.print(_results(report))
    for text in report.findings:
        _say(out, text)
    if report.sizes:
        out.print(_table(report.sizes))
    for grid in report.agreement:
        out.print(_table(grid, "agreement with the teacher"))
    for found in report.calibration:
        figures = ", ".join(f"{name} {value}" for name, value in found.figures)
        _say(out, f"calibration, {found.name}: {figures}")
    for grid in report.tables:
        out.print(_table(grid))
    _times(report, out)
    for text in report.warnings:
        _say(out, f"warning: {text}", "yellow")
    path = Path(run_folder) / NAME
    if path.is_file():
        _say(out, f"report: {path}")


def _say(out: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    out.print(Text(text, style=style), soft_wrap=not out.is_terminal)


def _head(report: Report, out: Console) -> None:
    _say(out, report.title, "bold")
    _say(out, f"{report.method}: {report.status}", "" if report.finished else "yellow")
    told = dict(report.about)
    for key in ("data", "teacher", "student", "settings", "budget", "seeds", "hardware"):
        if key in told:
            _say(out, f"  {key}: {told[key]}")


def _results(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text(report.results_note), caption_justify="left")
    table.add_column("")
    for column in report.columns:
        heading = Text(column.name, style=_STYLE.get(column.role, ""))
        table.add_column(heading, justify="right")
    for name, cells in report.results:
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


def _table(grid: Grid, title: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    heading = grid.title or title
    table = Table(title=Text(heading), title_justify="left", caption_justify="left")
    width = max([len(grid.columns), *(len(row) for row in grid.rows)])
    for index in range(width):
        name = grid.columns[index] if index < len(grid.columns) else ""
        table.add_column(Text(name), justify="left" if index == 0 else "right")
    for row in grid.rows[:MOST_ROWS]:
        table.add_row(*(Text(cell) for cell in row))
    left = len(grid.rows) - MOST_ROWS
    caption = f"and {left} more rows on the page" if left > 0 else grid.caption
    table.caption = Text(caption)
    return table


def _times(report: Report, out: Console) -> None:
    for time in report.times:
        _say(out, f"  {time.name} ({time.kind}): {time.detail}")
    for text in report.time_notes:
        _say(out, text)
