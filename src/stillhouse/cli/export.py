"""`stillhouse export`: take a distilled model to another library."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.cli.printing import print_fields, print_json
from stillhouse.errors import RecipeError


class Form(StrEnum):
    """Where a model may go."""

    onnx = "onnx"
    torch = "torch"
    hf = "hf"
    timm = "timm"
    sentence_transformers = "sentence-transformers"
    diffusers = "diffusers"


def _sizes(text: str) -> list[int] | None:
    parts = [part.strip() for part in text.replace("x", ",").split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"--shape {text}: sizes are whole numbers, such as 3,32,32")
    return [int(part) for part in parts] or None


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or an artifact's.")],
    to: Annotated[Form, typer.Option(help="The form.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A folder, or NAME.onnx; else RUN/export/FORM."),
    ] = None,
    shape: Annotated[
        str, typer.Option(metavar="3,32,32", help="Of one input, where the artifact is silent.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Write the model of a run for another library, checked against its own answers."""
    from stillhouse.exporting import export_artifact

    summary = export_artifact(run, to.value, output, shape=_sizes(shape))
    if as_json:
        print_json(summary)
    else:
        print_fields(summary)
