"""`stillhouse infer`: use what came out, whatever it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.cli.printing import print_fields, print_json
from stillhouse.errors import RecipeError


def infer(
    artifact: Annotated[
        Path, typer.Argument(help="The folder of an artifact, or of the run that made it.")
    ],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files or folders.")],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT | NAME=VALUE",
            help="Where answers are written; with '=', an option of the artifact.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The summary, for programs.")] = False,
) -> None:
    """Answer for files or folders of images, text, JSONL ... as the artifact reads them."""
    output, options = split_options(given or [])
    for path in inputs:
        if not path.exists():
            raise RecipeError(f"there is no input {path}")
    from stillhouse import launch

    summary = launch.infer(artifact, inputs, output, options)
    if as_json:
        print_json(summary)
        return
    rows = summary.pop("rows", [])
    if output is None:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))
    print_fields(summary)


def split_options(given: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """What `-o` was given: an output, and options with values in YAML.

    Raises:
        RecipeError: two outputs, or an option given twice.
    """
    from stillhouse.document import parse_value

    output: Path | None = None
    options: dict[str, Any] = {}
    for text in given:
        named = re.match(r"([A-Za-z_]\w*)=(.*)", text, re.S)
        if named is None:
            if output is not None:
                raise RecipeError(f"two outputs are given: {output} and {text}")
            output = Path(text)
        elif named[1] in options:
            raise RecipeError(f"the option '{named[1]}' is given twice")
        else:
            options[named[1]] = parse_value(named[2], f"-o {text}")
    return output, options
