"""Audits of models that draw images: is a class gone, under every condition, and for good?

The classifier that decides is trained on real images alone (`tasks.image_generation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.batch import Shuffled, Subset, read_rows
from stillhouse.engine.fitting import optimizer_of, schedule_of
from stillhouse.errors import RecipeError, TeacherError
from stillhouse.metrics.generation import taken_for
from stillhouse.tasks.image_generation import (
    Denoising,
    ImageGeneration,
    Judged,
    NoiseNet,
    draw_images,
    independent_classifier,
    seen_classes,
)
from stillhouse.teachers.live import weights_hash

_EACH = 100  # images of a condition


def noise_predictor(job: Any) -> NoiseNet:
    """The recipe's teacher as a frozen noise predictor.

    Raises:
        TeacherError: it only answers, or predicts something else.
    """
    net = job.teacher().guest().module
    if not isinstance(net, NoiseNet):
        raise TeacherError(
            f"the teacher {type(net).__name__} predicts no noise: the task must be "
            f"image-generation, here it is {job.task.name}"
        )
    job.task.check(None, net)
    return net


def drawing_artifact(job: Any, net: nn.Module, **told: Any) -> Artifact:
    """A model artifact of a noise predictor that has the form of the recipe's teacher.

    Args:
        job: of the run.
        net: a NoiseNet.
        told: what its description says beside, under "unlearning".
    """
    artifact: Artifact = job.model_artifact(net, "teacher")
    rebuilt = getattr(getattr(net, "module", None), "rebuilt", None)
    if rebuilt is not None:
        # All that it takes to build it again, not the folder that it came from.
        artifact.model = rebuilt()
    artifact.meta["unlearning"] = told
    return artifact


def checked_class(job: Any, setting: str, value: int | None) -> None:
    """Refuse a class number that the data has not.

    A class to forget that the data has no image of is warned of: no classifier knows it then.

    Raises:
        RecipeError: names the setting, its line and the classes.
    """
    classes = job.task.classes
    if value is not None and value >= len(classes):
        raise job.recipe.refusal(
            f"settings.{setting}",
            f"class {value} of {len(classes)}: they are numbered from 0 "
            f"({', '.join(classes[:12])})",
        )
    if setting == "forget" and value is not None and value not in seen_classes(job):
        job.log.write(
            "warning",
            text=f"the data has no image of '{classes[value]}', the class to forget: the "
            "classifier that judges cannot know it, so whether it is gone (ua) is not told",
        )


def checked_budget(job: Any) -> None:
    """Refuse, before anything is trained, to choose a state by figures that are not there.

    Raises:
        RecipeError: names the field and its line.
    """
    for field in ("select", "validate_every"):
        if getattr(job.budget, field, None) not in (None, "last"):
            raise job.recipe.refusal(
                f"budget.{field}",
                "drawn images have no figure by row, by which a state could be chosen while it is "
                f"trained: leave out budget.{field}",
            )


def judged_forgetting(
    job: Any, model: nn.Module, forget: int, *, override: int | None = None
) -> dict[str, float]:
    """Figures of a model on the test split, with one class that should be gone.

    Args:
        job: with the test split open.
        model: a NoiseNet.
        forget: the class.
        override: the one that took its place, where there is one.
    """
    task: ImageGeneration = job.task
    return task.audited(job, model, forget=forget, override=override)


def judged_once(job: Any, model: NoiseNet, forget: int) -> dict[str, float]:
    """`judged_forgetting` of a model that many sides have in common; a shared stage."""
    share = {
        "path": job.path,
        "model": weights_hash(model.module),
        "sampler": [asdict(model.sampler), model.guidance],
        "forget": forget,
        "data": [job.splits[s].fingerprint for s in (job.teacher_split, "test")],
        "seed": job.seed,
        "version": __version__,
    }
    told: dict[str, float] = job.once(
        "teacher-audit",
        lambda: judged_forgetting(job, model, forget),
        kind="judge",
        share=share,
        everywhere=True,
    )
    return told


def conditioning_table(job: Any, nets: Mapping[str, Any], forget: int) -> dict[str, Any]:
    """What each condition draws: does another one, or none, still give the class?

    Args:
        job: with the test split open.
        nets: by the name of their columns.
        forget: the class.

    Returns:
        A table of the report: for each condition and net the class that most images are taken
        for, and the share that is taken for the forgotten one.
    """
    task: ImageGeneration = job.task
    classes = task.classes
    classifier = independent_classifier(job.child("audit"))
    null = next(iter(nets.values())).null
    conditions = [*range(len(classes)), *([] if null is None else [null])]
    asked = torch.tensor(conditions).repeat_interleave(_EACH)
    columns = ["condition"]
    rows = [["no class" if c == null else classes[c]] for c in conditions]
    for name, net in nets.items():
        images = draw_images(net, asked, task.shape, job.rng("conditions"))
        found = Judged(classifier, images).probabilities.argmax(1)
        shares = taken_for(found, asked, forget, conditions)
        columns += [f"{name}: mostly taken for", f"{name}: taken for {classes[forget]}"]
        for row, condition, share in zip(rows, conditions, shares, strict=True):
            own = found[asked == condition]
            most = int(own.bincount(minlength=len(classes)).argmax())
            row += [f"{classes[most]} ({float((own == most).float().mean()):.0%})", f"{share:.0%}"]
    return {
        "title": f"What each condition draws ({_EACH} images)",
        "columns": columns,
        "rows": rows,
    }


def retrained(job: Any, forget: int) -> NoiseNet:
    """The teacher's network trained anew on real images without one class; a shared stage.

    Raises:
        RecipeError: the recipe does not say how its teacher is trained.
    """
    spec = job.recipe.teacher
    if spec is None or spec.train is None:
        raise RecipeError(
            "retraining without a class needs to know how the teacher is trained: "
            "teacher: {model: ..., train: {...}}"
        )
    net: NoiseNet = job.trainable_teacher(trained=False)
    split, budget = job.teacher_split, spec.train
    source = job.splits[split]
    targets = read_rows(source, torch.arange(len(source)), None, job.task.collate)["target"]
    kept = Subset(source, (targets != forget).nonzero().flatten())
    share = {
        "path": job.path,
        "without": forget,
        "start": weights_hash(net.module),
        "budget": budget.model_dump(exclude={"data"}),
        "data": kept.fingerprint,
        "seed": job.seed,
        "version": __version__,
    }
    job.fit(
        "retrained",
        Denoising(net),
        Shuffled(kept, budget.batch, collate=job.task.collate),
        steps=budget.steps,
        epochs=budget.epochs,
        optim=optimizer_of(budget),
        schedule=schedule_of(budget),
        clip=budget.clip,
        ema=budget.ema,
        share=share,
    )
    return net
