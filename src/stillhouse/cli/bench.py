"""`stillhouse bench`: a method and what it is compared with, side by side over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.methods import complete_id
from stillhouse.cli.printing import print_json
from stillhouse.cli.run import Overrides


def bench(
    name: Annotated[
        str, typer.Argument(metavar="ID", help="The method.", autocompletion=complete_id)
    ],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0..N-1; else 3, or 5 where a side is quick.")
    ] = None,
    sides: Annotated[
        list[str] | None,
        typer.Option(help="Compare with these, as ID, ID/VARIANT or /VARIANT; commas separate."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe other than the method's own.")
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[Path | None, typer.Option(help="Where the runs lie.")] = None,
    results: Annotated[Path | None, typer.Option(help="Where ID.json is written.")] = None,
    note: Annotated[str, typer.Option(help="What a reader of the results must know.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compare a method with its baselines and judge its claims; resumable."""
    from stillhouse import catalogue

    catalogue.find(name)
    named = [side.strip() for given in sides or () for side in given.split(",") if side.strip()]
    from stillhouse.bench import runner, show

    found = runner.run(
        name,
        seeds=seeds,
        sides=named or None,
        recipe=recipe,
        overrides=overrides or (),
        folder=folder,
        results_folder=results,
        note=note,
    )
    if as_json:
        print_json(found.as_dict())
    else:
        show.show(found)
