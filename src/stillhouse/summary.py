"""The summary of a finished run, from which its report is made."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job
from stillhouse.method import Method
from stillhouse.net import Net
from stillhouse.recipe import (
    Recipe,
)


@dataclass
class Side:
    """One finished side at one seed."""

    figures: dict[str, float]
    artifact: Artifact | None
    job: Job | None
    method: Method | None
    record: dict[str, Any]


def summary_of(
    recipe: Recipe,
    folder: Path,
    main: Side,
    sides: dict[str, dict[str, dict[str, float]]],
    seconds: float,
) -> dict[str, Any]:
    """What `run.json` holds: figures of all sides, what was done, on what, and at what cost.

    Args:
        recipe: resolved.
        folder: of the run.
        main: the method at the first seed.
        sides: figures by side and seed.
        seconds: that the whole run has taken.
    """
    from stillhouse.metrics.cost import peak_memory_mb

    assert main.job is not None
    assert main.method is not None
    assert main.artifact is not None
    job, method = main.job, main.method
    trainings = [s for s in job.stages if "teacher_seconds" in s and s["name"] != "teacher"]
    loop = sum(float(s.get("loop_seconds", 0.0)) for s in trainings)
    asked = sum(float(s["teacher_seconds"]) for s in trainings)
    share = asked / loop if loop > 0 and asked > 0 else None
    return {
        "schema": 1,
        "method": recipe.method,
        "title": method.card.title,
        "task": recipe.task,
        "metric": job.task.main_metric,
        "higher_is_better": job.task.higher_is_better,
        "data": {
            "name": recipe.data.name,
            "edition": job.splits.edition,
            "hash": job.splits.about.get("hash", ""),
        },
        "seed": recipe.seed,
        "seeds": list(range(recipe.seed, recipe.seed + recipe.seeds)),
        "versions": versions(),
        "hardware": job.hardware.describe(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "peak_mb": peak_memory_mb(job.device),
        "teacher_share": share,
        "store_saving": _store_saving(recipe, job, share),
        "profile": _profile(recipe, job, main.artifact),
        "stages": job.stages,
        "sides": sides,
        "sizes": _sizes(job, main.artifact),
        "details": _details(job, method, main.artifact),
    }


def _profile(recipe: Recipe, job: Job, artifact: Artifact) -> list[dict[str, Any]]:
    """Where the time of each profiled training went, with advice; empty when none was."""
    from stillhouse.engine.profile import advice

    found = []
    kept = recipe.teacher is not None and recipe.teacher.store is not None
    for stage in job.stages:
        figures = stage.get("profile")
        if not figures or not figures["steps"]:
            continue
        loop = float(stage["loop_seconds"])
        share = float(stage["teacher_seconds"]) / loop if loop else 0.0
        told = advice(
            figures,
            store_saving=_store_saving(recipe, job, share) if share else None,
            workers=recipe.hardware.workers,
            device=job.device.type,
            **_probes(recipe, job, _trained_net(stage["name"], job, artifact), loop),
            labelling=_labelling_probe(recipe, job) if share or kept else None,
        )
        found.append({"stage": stage["name"], **figures, "advice": told})
    return found


LONG_TRAINING = 300.0


def _trained_net(stage: str, job: Job, artifact: Artifact) -> Any:
    """The net that a training moved: the teacher's where it was trained in this run."""
    teacher = getattr(job.models, "teacher_net", None)
    return teacher if stage == "teacher" and teacher is not None else artifact.module


def _probes(recipe: Recipe, job: Job, net: Any, seconds: float) -> dict[str, Any]:
    """What short probes say of a finished net: layout, and compilation of long trainings."""
    from stillhouse.engine import probe

    if not isinstance(net, Net) or "train" not in job.splits:
        return {}
    rows = torch.arange(min(recipe.budget.batch, len(job.splits["train"])))
    batch = job.order(shuffle=False).read(rows, job.views()).to(job.device)
    view = batch.view(job.task.views()[0] if net.view == "x" else net.view)
    found: dict[str, Any] = {}
    if not recipe.hardware.channels_last:
        found["layout"] = probe.channels_last(net, view)
    if not recipe.hardware.compile and seconds >= LONG_TRAINING:
        found["compiled"] = probe.compiled(net, view)
    return found


def _labelling_probe(recipe: Recipe, job: Job) -> dict[str, Any] | None:
    """How many rows at a time a live teacher is asked quickest, when a store is or may be kept."""
    from stillhouse.engine import probe
    from stillhouse.recipe import StoreSpec

    net = getattr(job.models, "teacher_net", None)
    if net is None or "train" not in job.splits:
        return None
    spec = recipe.teacher.store if recipe.teacher is not None else None
    size = (spec or StoreSpec()).batch
    rows = torch.arange(min(4 * size, len(job.splits["train"])))
    batch = job.order(shuffle=False, augment=False).read(rows, job.views()).to(job.device)
    view = batch.view(job.task.views()[0] if net.view == "x" else net.view)
    return probe.labelling(net, view, size)


def _store_saving(recipe: Recipe, job: Job, share: float | None) -> float | None:
    """The share of training time that a store would save.

    Each sample is asked once, not once an epoch. Reading the store is not counted; it takes
    microseconds a row.
    """
    if share is None or "train" not in job.splits:
        return None
    if recipe.teacher is not None and recipe.teacher.store is not None:
        return None
    rows, budget = len(job.splits["train"]), recipe.budget
    epochs = budget.epochs or (budget.steps or 0) * budget.batch / rows
    return share * (1.0 - 1.0 / epochs) if epochs > 1 else 0.0


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"stillhouse": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "torchvision", "timm", "transformers", "lightning-fabric"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sizes(job: Job, artifact: Artifact) -> dict[str, Any]:
    from stillhouse.metrics.cost import measure

    if artifact.predictor is None:
        return {}
    if job.task.example_view() is None:
        return {}
    nets = {"student": artifact.module, "teacher": getattr(job.models, "teacher_net", None)}
    return measure(
        {
            role: (net, job.task.example_view(getattr(net, "view", "x")))
            for role, net in nets.items()
            if net is not None
        }
    )


def _details(job: Job, method: Method, artifact: Artifact) -> dict[str, Any]:
    opened = job.judging()
    found = dict(job.task.details(opened, artifact, getattr(job.models, "teacher_net", None)))
    for key, value in method.details(opened, artifact).items():
        both = isinstance(value, list) and isinstance(found.get(key), list)
        # What the task shows stays beside what the method adds.
        found[key] = [*found[key], *value] if both else value
    return found
