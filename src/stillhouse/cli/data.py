"""`stillhouse data`: which data sets can be named, and what one of them may be told."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from stillhouse.cli.printing import print_columns, print_fields, print_json
from stillhouse.data.data_set import DataCard
from stillhouse.data.registry import find_card, list_data, load_data
from stillhouse.data.roots import find_file
from stillhouse.errors import RecipeError, nearest


def complete_name(incomplete: str) -> list[tuple[str, str]]:
    """Names that begin so, with what they are, for the shell."""
    return [(card.name, card.title) for card in list_data() if card.name.startswith(incomplete)]


def data(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", autocompletion=complete_name, show_default=False)
    ] = "",
    task: Annotated[str, typer.Option(help="Only those of this task.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List data sets; with NAME tell all about one: where it is, and its options."""
    if name:
        _show(find_card(name), as_json)
        return
    cards = list_data()
    known = sorted({kind for card in cards for kind in card.tasks})
    if task and task not in known:
        raise RecipeError(f"--task {task}: there is none of it{nearest(task, known)}")
    chosen = [card for card in cards if not task or task in card.tasks]
    if as_json:
        print_json([{**asdict(card), "here": _here(card)} for card in chosen])
        return
    rows = [
        (card.name, " ".join(card.tasks) or "-", "" if _here(card) else "not here", card.title)
        for card in chosen
    ]
    print_columns(("name", "task", "", "what it is"), rows)


def _here(card: DataCard) -> bool:
    """Whether its file is found; what is the user's own, embedded or made needs none."""
    return not card.files or find_file(card.files) is not None


def _show(card: DataCard, as_json: bool) -> None:
    options = list(options_of(load_data(card.name).Options))
    if as_json:
        print_json({**asdict(card), "here": _here(card), "options": options})
        return
    typer.echo(typer.style(f"{card.name}: {card.title}", bold=True))
    place = find_file(card.files) if card.files else None
    print_fields(
        {
            "tasks": list(card.tasks),
            "licence": card.licence,
            "source": card.source,
            "files": " or ".join(card.files),
            "here": str(place) if place else "no" if card.files else "",
            "how to get it": card.get if card.files and not place else "",
        },
        "  ",
    )
    typer.echo("\n" + typer.style("Options (-o data.options.NAME=VALUE)", bold=True))
    for option in options:
        default = "required" if option["required"] else json.dumps(option["default"], default=str)
        bounds = f", {option['range']}" if option["range"] else ""
        typer.echo(f"  {option['name']}: {option['type']} = {default}{bounds}")
        if option["help"]:
            typer.echo(
                textwrap.fill(option["help"], 98, initial_indent=" " * 6, subsequent_indent=" " * 8)
            )


def options_of(options: Any) -> Iterator[Mapping[str, Any]]:
    """Name, type, default, range and help of each option.

    Args:
        options: the pydantic model of a data set; its own options come first.
    """
    own = inspect.get_annotations(options)
    ordered = sorted(options.model_fields.items(), key=lambda pair: pair[0] not in own)
    for name, field in ordered:
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield {
            "name": name,
            "type": _type(field.annotation),
            "required": field.is_required(),
            "default": default,
            "range": ", ".join(_bounds(field.metadata)),
            "help": field.description or "",
        }


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("stillhouse.", "")


def _bounds(metadata: Any) -> Iterator[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    for rule in metadata:
        for name, sign in signs.items():
            limit = getattr(rule, name, None)
            if limit is not None:
                yield f"{sign} {limit:g}"
