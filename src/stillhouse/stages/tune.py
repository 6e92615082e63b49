"""Choosing settings on validation data: by a few points, or a grid on stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.batch import Source
from stillhouse.engine.job import Job
from stillhouse.errors import RecipeError


def best_of(
    job: Job, name: str, points: Sequence[float], measure: Callable[[Job, float], float]
) -> tuple[float, list[dict[str, float]]]:
    """The point with the highest measure, and the table of all.

    Args:
        job: of the run.
        name: of the stage under which the points are children.
        points: the values tried, each once; the first wins a tie.
        measure: the figure of a point on validation data, higher is better; what it runs are
            stages of the job it is given, so a killed scan goes on.

    Returns:
        `(best, [{"point", "measure"}, ...])`.

    Raises:
        RecipeError: no points.
    """
    if not points:
        raise RecipeError("a scan needs one point at least")
    table: list[dict[str, float]] = []
    for number, point in enumerate(points):
        child = job.child(name, f"point-{number}")
        measured: Any = child.once("measure", _bound(measure, child, point), everywhere=True)
        table.append({"point": float(point), "measure": float(measured)})
    best = max(table, key=lambda row: row["measure"])
    return best["point"], table


def _bound(measure: Callable[[Job, float], float], job: Job, point: float) -> Callable[[], float]:
    return lambda: float(measure(job, point))


def outputs_of(
    job: Job, model: nn.Module, split: str | Source, names: Sequence[str]
) -> dict[str, Tensor]:
    """What a model gives on a split, row by row: settings are then searched without it.

    Every process takes part and gets all rows. As a stage it is
    `job.once("outputs", lambda: outputs_of(...), kind="capture", everywhere=True)`.

    Args:
        job: of the run.
        model: a net of the task.
        split: its name, or a source; must be labelled.
        names: outputs that are kept.

    Returns:
        By name (N, ...), on the CPU; and "target" (N,).
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in (*names, "target")}

    def take(out: Any, batch: Any) -> None:
        for name in names:
            kept[name].append(out[name].detach().float().cpu())
        kept["target"].append(batch["target"].cpu())

    job.walk(model, split, take)
    # Clones: what was made under inference_mode may not enter a graph.
    return {name: torch.cat(_gathered(job, parts)).clone() for name, parts in kept.items()}


def _gathered(job: Job, parts: list[Tensor]) -> list[Tensor]:
    """The parts of all processes in the order of the rows: each batch lies in blocks by rank."""
    world = job.hardware.world
    if world == 1:
        return parts
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, parts)
    steps = max(len(own) for own in found)
    return [own[step] for step in range(steps) for own in found if step < len(own)]
