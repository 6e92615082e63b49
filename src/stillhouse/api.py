"""The Python front door, for people with their own modules, data and loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from stillhouse import catalogue
from stillhouse.artifact import Artifact
from stillhouse.data.torch_dataset import splits_of
from stillhouse.errors import RecipeError
from stillhouse.launch import RunResult, run
from stillhouse.method import StudentTraining
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.opening import open_artifact
from stillhouse.recipe import GIVEN, load_recipe, settings_of
from stillhouse.recipe_models import Given
from stillhouse.tasks import open_task
from stillhouse.teacher import Teacher
from stillhouse.teachers.live import Live
from stillhouse.teachers.text_vectors import Embed, TextVectors


def distill(
    teacher: nn.Module | Teacher | Embed,
    student: nn.Module,
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    method: str = "kd",
    task: str | None = None,
    classes: Sequence[str] | int | None = None,
    settings: Mapping[str, Any] | None = None,
    taps: Mapping[str, str] | None = None,
    store: bool | Path | str | Mapping[str, Any] | None = None,
    compare: Sequence[str] = ("supervised",),
    seed: int = 0,
    seeds: int = 1,
    folder: Path | str | None = None,
    progress: bool = True,
    **budget: Any,
) -> RunResult:
    """Distil a teacher into a student with plain modules and loaders.

    Args:
        teacher: a module that gives logits for the same classes, any Teacher, or a function
            from texts to vectors.
        student: a module; it is copied, and the trained copy is in the result.
        train: DataLoader, Dataset or Source of (x, target) or mappings. A loader's batch size
            is taken over unless `batch` is given. Or Splits, or one graph with its masks
            (PyTorch Geometric's `Data`), whole.
        val: likewise; for selection, and judged on when there is no `test`.
        test: likewise.
        method: id of a method.
        task: kind of problem; the method's own by default.
        classes: names or number of classes.
        settings: of the method.
        taps: alias to module path of the student.
        store: keep the teacher's outputs on disk: True, a folder, or the settings of a recipe's
            `teacher.store` (`{"draws": 4}` for augmented data).
        compare: what is run beside, at equal steps.
        seed: of everything random.
        seeds: how many seeds are run.
        folder: of the run, which makes it resumable; `runs/METHOD-given` by default.
        progress: show progress.
        budget: epochs or steps, lr, optimizer, batch ... as in a recipe.

    Returns:
        The result; `result.artifact.module` is the trained student, `result.report()` shows
        teacher, student alone and distilled student.

    Raises:
        StillhouseError: what does not fit, before training.
    """
    if "batch" not in budget and getattr(train, "batch_size", None):
        budget["batch"] = train.batch_size
    spec: dict[str, Any] = {
        "method": method,
        "data": {"name": f"stillhouse.api:{GIVEN}"},
        "settings": dict(settings or {}),
        "budget": budget,
        "compare": list(compare),
        "seed": seed,
        "seeds": seeds,
        "student": {"model": GIVEN, "taps": dict(taps or {})},
    }
    if task is not None:
        spec["task"] = task
    if store is not None and store is not False:
        kept = str(store) if isinstance(store, Path) else store
        spec["teacher"] = {"model": GIVEN, "store": kept}
    recipe = load_recipe(spec)
    names = classes if isinstance(classes, int) or classes is None else list(classes)
    given = Given(student=student, teacher=teacher, splits=splits_of(train, val, test, names))
    where = Path(folder) if folder is not None else Path("runs") / f"{method}-given"
    return run(recipe, folder=where, progress=progress, given=given)


def objective(
    method: str,
    student: nn.Module,
    *,
    teacher: Teacher | None = None,
    classes: Sequence[str] | int = 2,
    task: str | None = None,
    taps: Mapping[str, str] | None = None,
    **settings: Any,
) -> Objective:
    """The objective of a method around your student, for a loop of your own.

    `loss = sum(objective.terms(batch, teacher).values())`; then `objective.after_step(clock)`
    after the optimiser's step, and `objective.export()` is the student to deploy.

    Args:
        method: id of a method that is one training of a student.
        student: your module; its weights are used in place.
        teacher: bound to what the method wants, when given.
        classes: names or number of classes.
        task: kind of problem; the method's own by default.
        taps: alias to module path.
        settings: of the method.

    Raises:
        RecipeError: the method is not one training, or a setting is wrong.
    """
    from stillhouse.batch import Splits

    kind = catalogue.load(method)
    if not issubclass(kind, StudentTraining):
        raise RecipeError(
            f"'{method}' is a sequence of stages, not one objective; run it as a whole"
        )
    recipe = load_recipe(
        {"method": method, "data": f"stillhouse.api:{GIVEN}", "settings": settings}
    )
    names = [str(c) for c in range(classes)] if isinstance(classes, int) else list(classes)
    opened = open_task(task or kind.card.task, Splits({}, "own data", {"classes": names}))
    net = student if isinstance(student, Net) else opened.net(student, taps)
    made = kind(settings_of(recipe, kind.Config)).objective(_Bare(opened), net, teacher)
    if teacher is not None:
        teacher.bind(made.wants, opened)
    return made


class _Bare:
    """What an objective may ask of a job when there is none: its task."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.recipe = None

    def __getattr__(self, name: str) -> Any:
        raise RecipeError(
            f"this method's objective needs a job ({name}); run it with stillhouse.distill"
        )


def teacher(
    module: nn.Module | Teacher | Embed | Path | str,
    *,
    taps: Mapping[str, str] | None = None,
    answer: str = "logits",
) -> Teacher:
    """A teacher from a module, a function of texts, a store's folder, or an artifact's folder.

    Args:
        module: what knows.
        taps: alias to module path.
        answer: what a single returned tensor is called.

    Raises:
        RecipeError: nothing of that kind.
    """
    if isinstance(module, (str, Path)):
        folder = Path(module)
        if (folder / "header.json").exists():
            from stillhouse.teachers.stored import Stored

            return Stored(folder)
        net = load(folder).module
        if not isinstance(net, Net):
            raise RecipeError(f"the artifact {folder} holds no model that could teach")
        return Live(net)
    if isinstance(module, nn.Module):
        net = module if isinstance(module, Net) else Net(module, answer=answer)
        for alias, path in (taps or {}).items():
            net.add_tap(alias, path)
        return Live(net)
    if callable(module) and not hasattr(module, "knowledge"):
        return TextVectors(module)
    given: Teacher = module  # type: ignore[assignment]
    return given


def load(folder: Path | str, module: nn.Module | None = None) -> Artifact:
    """Reopen what a run has left: its folder, or the artifact's within it."""
    return open_artifact(folder, module)


def given(**options: Any) -> Any:
    """Stands in recipes for data that was handed in as objects.

    Raises:
        RecipeError: the recipe is run without them.
    """
    raise RecipeError(
        "this recipe belongs to a run whose models and data were handed in from Python; "
        "call stillhouse.distill again"
    )


__all__ = ["distill", "load", "objective", "run", "teacher"]
