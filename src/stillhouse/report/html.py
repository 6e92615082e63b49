"""The report as one HTML file: inline style and SVG, no script, nothing from the network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from stillhouse.engine.checkpoint import write_atomic
from stillhouse.report import charts
from stillhouse.report.sections import make_report

NAME = "report.html"


def write(run_folder: Path | str) -> Path:
    """Write `report.html` into a run folder.

    Args:
        run_folder: of a finished run or one that was stopped.

    Returns:
        The file.

    Raises:
        RunFolderError: there is no such folder, or no run in it.
        CheckpointError: the disk refuses.
    """
    path = Path(run_folder) / NAME
    write_atomic(path, render(run_folder).encode())
    return path


def render(run_folder: Path | str) -> str:
    """The page. All that comes from the run is escaped; a policy in it forbids scripts."""
    report = make_report(run_folder)
    return _environment().get_template("page.html.j2").render(report=report)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stillhouse.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sizes: dict[str, Any] = {
        "width": charts.WIDTH,
        "height": charts.HEIGHT,
        "left": charts.LEFT,
        "right": charts.RIGHT,
        "top": charts.TOP,
        "bottom": charts.BOTTOM,
    }
    environment.globals["area"] = sizes
    return environment
