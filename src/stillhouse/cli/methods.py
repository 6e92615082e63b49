"""`stillhouse methods`: what there is, and everything about one of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stillhouse import catalogue
from stillhouse.cli.printing import print_columns, print_json
from stillhouse.errors import RecipeError, nearest

methods = typer.Typer(help="List methods and baselines; `show ID` tells all about one.")

Json = Annotated[bool, typer.Option("--json", help="For programs.")]


def complete_id(incomplete: str) -> list[tuple[str, str]]:
    """Ids that begin so, with their summaries, for the shell."""
    return [
        (name, str(entry.card.get("summary", "")))
        for name, entry in catalogue.entries().items()
        if name.startswith(incomplete)
    ]


@methods.callback(invoke_without_command=True)
def table(
    context: typer.Context,
    room: Annotated[str, typer.Option(help="Only those of this room.")] = "",
    yields: Annotated[
        str, typer.Option(help="Only those that yield model, dataset, labels or analysis.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List methods and baselines."""
    if context.invoked_subcommand is not None:
        return
    _refuse_unknown("--room", room, {str(e.card.get("room")) for e in catalogue.entries().values()})
    _refuse_unknown("--yields", yields, {"model", "dataset", "labels", "analysis"})
    chosen = [
        entry
        for entry in catalogue.entries().values()
        if (not room or entry.card.get("room") == room)
        and (not yields or entry.card.get("yields", "model") == yields)
    ]
    if as_json:
        print_json([_listed(entry) for entry in chosen])
    else:
        ordered = sorted(chosen, key=lambda e: (e.kind != "method", e.id))
        print_columns(
            ("id", "kind", "room", "year", "needs", "yields", "what it does"),
            [_row(entry) for entry in ordered],
        )
    for problem in catalogue.problems():
        typer.echo(f"warning: {problem}", err=True)


def _refuse_unknown(option: str, value: str, known: set[str]) -> None:
    if value and value not in known:
        raise RecipeError(f"{option} {value}: there is none of it{nearest(value, known)}")


def _row(entry: catalogue.Entry) -> tuple[str, ...]:
    card = entry.card
    needs = " ".join(card.get("needs", ())) or "-"
    room, year = str(card.get("room") or "-"), str(card.get("year") or "-")
    return (entry.id, entry.kind, room, year, needs, card.get("yields", "model"), card["summary"])


def _listed(entry: catalogue.Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "yields": "model", **entry.card, "file": entry.path}


@methods.command()
def show(
    name: Annotated[str, typer.Argument(metavar="ID", autocompletion=complete_id)],
    as_json: Json = False,
) -> None:
    """Tell all about one: card, settings with help and source, needs, measured results."""
    from stillhouse.cli.methods_show import show_entry

    show_entry(catalogue.find(name), as_json)
