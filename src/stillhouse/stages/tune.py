"""Choosing a setting by a few points, on validation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
