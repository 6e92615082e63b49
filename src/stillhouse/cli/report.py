"""`stillhouse report`: what a run has shown, in the terminal and as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.printing import print_json
from stillhouse.errors import RunFolderError


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    html: Annotated[bool, typer.Option(help="Write report.html anew.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The run's figures.")] = False,
) -> None:
    """Show the report of a run, and write it as one HTML file."""
    summary = run / "run.json"
    if not summary.is_file():
        raise RunFolderError(_lack(run))
    if as_json:
        try:
            print_json(json.loads(summary.read_bytes()))
        except ValueError as error:
            raise RunFolderError(
                f"{summary} is damaged ({error}); make it again from the stages with: stillhouse "
                f"run {run / 'recipe.yaml'} --folder {run}"
            ) from error
        return
    from stillhouse import report as reports

    if html:
        reports.write(run)
    reports.show(run)


def _lack(run: Path) -> str:
    if not run.is_dir():
        return f"there is no run folder {run}"
    if (run / "recipe.yaml").is_file():
        return (
            f"the run in {run} is not finished (run.json is missing); go on with: "
            f"stillhouse run {run / 'recipe.yaml'} --folder {run}"
        )
    return f"{run} is no run folder (run.json is missing)"
