"""What a run would do, without doing it."""

from __future__ import annotations

from typing import Any

from stillhouse.engine.log import RunLog
from stillhouse.launch import check_sides, default_folder, open_job, open_splits
from stillhouse.method import Method, StudentTraining
from stillhouse.net import Net
from stillhouse.recipe import (
    GIVEN,
    Recipe,
)
from stillhouse.recipe_models import (
    KNOWS_NOTHING,
    Given,
    RecipeModels,
    knows_nothing,
    open_method,
    plain_about,
)
from stillhouse.tasks import open_task


def plan(recipe: Recipe, *, given: Given | None = None) -> dict[str, Any]:
    """What a run would do, without doing it: data, shapes, parameters, stages, steps."""
    given = given or Given()
    method = open_method(recipe)
    check_sides(recipe, {*recipe.compare, *recipe.sides})
    splits = open_splits(recipe, given)
    task = open_task(str(recipe.task), splits)
    job = open_job(recipe, default_folder(recipe), given=given, task=task, log=RunLog(None))
    found: dict[str, Any] = {
        "method": recipe.method,
        "title": method.card.title,
        "task": task.name,
        "data": {
            "name": recipe.data.name,
            "edition": splits.edition,
            "rows": {split: splits.peek(split) for split in splits},
            **{k: v for k, v in plain_about(splits.about).items() if k in {"input", "hash"}},
        },
        "teacher": _teacher_in_words(recipe, given),
        "stages": _planned_stages(recipe, method),
        "settings": method.config.model_dump(),
        "folder": str(default_folder(recipe)),
        "seeds": recipe.seeds,
        "compare": recipe.compare,
        "models": {},
    }
    if recipe.student is not None or given.student is not None:
        student = job.student()
        task.check(student, None)
        found["models"]["student"] = _model_plan(student, recipe.student)
    teacher = recipe.teacher
    if teacher is not None and teacher.model is not None and given.teacher is None:
        models = RecipeModels(recipe, given)
        net = models._net(models._home(job, teacher), teacher, "teacher")
        models._check_teacher(job, net)
        found["models"]["teacher"] = _model_plan(net, teacher)
        if knows_nothing(teacher, net):
            found["warning"] = KNOWS_NOTHING.format(model=teacher.model)
    if "train" in splits:
        budget = recipe.budget
        order = method.order(job) if isinstance(method, StudentTraining) else job.order("train")
        epoch = len(order)
        found["steps"] = budget.steps or (budget.epochs or 1) * epoch
    return {**found, **method.forecast(job)}


def _teacher_in_words(recipe: Recipe, given: Given) -> str:
    """Where the knowledge comes from, for the plan."""
    spec = recipe.teacher
    if given.teacher is not None:
        return "handed in"
    if spec is None:
        return "none"
    if spec.source == "store":
        assert spec.store is not None
        return f"the store {spec.store.path}"
    if spec.endpoint is not None:
        serve = spec.endpoint.serve
        told = spec.endpoint.base_url or "a server that the run starts"
        if serve is not None:
            told += f" ({serve.rule or serve.replay or serve.model or serve.encoder})"
    elif spec.recipe is not None:
        told = f"{spec.recipe.method} on the same data"
    else:
        told = str(getattr(spec, spec.source))
        told += f", weights {spec.weights}" if spec.weights else ""
    store = spec.store
    kept = f", its outputs stored ({store.form}, {store.dtype})" if store is not None else ""
    return f"{spec.source} {told}{kept}"


def _planned_stages(recipe: Recipe, method: Method) -> list[dict[str, str]]:
    """The card's stages, those of the teacher decided by what the recipe says of it."""
    teacher = recipe.teacher
    stages = [{"name": name, "kind": kind} for name, kind in method.card.stages]
    if teacher is None:
        return stages
    kept = [s for s in stages if s["name"] not in {"teacher?", "capture?"}]
    first: list[dict[str, str]] = []
    if teacher.recipe is not None:
        inner = open_method(teacher.recipe)
        first += [
            {**stage, "name": f"teacher/{stage['name']}"}
            for stage in _planned_stages(teacher.recipe, inner)
        ]
    if teacher.train is not None:
        first.append({"name": "teacher", "kind": "train"})
    named = any(s["name"] in {"capture", "capture-1"} for s in kept)
    if teacher.store is not None and teacher.source != "store" and not named:
        first.append({"name": "capture", "kind": "capture"})
    return [*first, *kept]


def _model_plan(net: Net, spec: Any) -> dict[str, Any]:
    return {
        "model": getattr(spec, "model", GIVEN),
        "class": type(net.module).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
    }
