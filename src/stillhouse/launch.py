"""From a recipe to a finished run: data, models, stages, judging, artifact, report.

A run folder holds the main side (the method at the first seed); other seeds and what it is
compared with lie in `sides/`. Each is a job of its own, resumable and never run twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillhouse import catalogue
from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.batch import Splits, Subset
from stillhouse.data.registry import open_data
from stillhouse.data.roots import cache_folder
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.job import Family, Job, locked
from stillhouse.engine.log import RunLog
from stillhouse.engine.loop import STAMP, StopRequest
from stillhouse.errors import (
    OptionError,
    RecipeError,
    RunFolderError,
    StillhouseError,
    TeacherError,
    nearest,
)
from stillhouse.method import Method
from stillhouse.net import Net
from stillhouse.recipe import (
    Recipe,
    differences,
    dump_recipe,
    load_recipe,
    settings_of,
)
from stillhouse.recipe_models import Given, RecipeModels, open_method
from stillhouse.summary import Side, summary_of
from stillhouse.task import Task
from stillhouse.tasks import open_task
from stillhouse.writing import full_disk_told

if TYPE_CHECKING:
    from stillhouse.stages.federation import Remembering


@dataclass
class RunResult:
    """What a run left.

    Attributes:
        folder: of the run.
        artifact: of the main side.
        sides: side to seed to figures.
        summary: the content of `run.json`.
    """

    folder: Path
    artifact: Artifact
    sides: dict[str, dict[str, dict[str, float]]]
    summary: dict[str, Any] = field(default_factory=dict)

    def report(self) -> None:
        """Show the report in the terminal."""
        from stillhouse import report

        report.show(self.folder)


def open_splits(recipe: Recipe, given: Given) -> Splits:
    """The recipe's data."""
    if given.splits is not None:
        return given.splits
    try:
        return open_data(recipe.data.name, seed=recipe.seed, options=recipe.data.options)
    except OptionError as error:
        lines = [
            recipe.placed(f"data.options.{option}" if option else "data.options", what)
            for option, what in error.wrong.items()
        ]
        raise RecipeError("\n".join(lines)) from error


def open_job(
    recipe: Recipe,
    folder: Path,
    *,
    given: Given | None = None,
    hardware: Hardware | None = None,
    log: RunLog | None = None,
    task: Task | None = None,
    stop: StopRequest | None = None,
    redo: tuple[str, ...] = (),
    profiled: bool = False,
) -> Job:
    """A job for a recipe, ready for a method's `run`.

    Args:
        recipe: resolved.
        folder: of the run.
        given: models and data handed in as objects.
        hardware: opened by the recipe when not given.
        log: opened in the folder when not given.
        task: opened by the recipe when not given.
        stop: who listens to signals.
        redo: stages to run again, with all that follow.
        profiled: trainings measure where a step's time goes.
    """
    given = given or Given()
    hardware = hardware or open_hardware(recipe)
    task = task or open_task(str(recipe.task), open_splits(recipe, given))
    family = Family(redo)
    family.profiled = profiled
    return Job(
        recipe,
        task,
        folder,
        seed=recipe.seed,
        hardware=hardware,
        log=log or RunLog(folder, enabled=hardware.is_main),
        models=RecipeModels(recipe, given),
        cache=cache_folder(),
        stop=stop,
        family=family,
    )


def federated_client(
    recipe: Recipe, name: str, folder: Path, *, given: Given | None = None
) -> Remembering:
    """One client of a federated recipe, built in whatever process it lives in.

    Only its own data is opened, where the data set can be opened for one client.

    Args:
        recipe: resolved; the same one that the server runs.
        name: of the client.
        folder: of this client; its memory and log lie here.
        given: models and data handed in as objects.

    Raises:
        RecipeError: the recipe's method is not federated, or has no such client.
    """
    from stillhouse.data.clients import open_client
    from stillhouse.stages.federation import FederatedMethod, Remembering

    method = open_method(recipe)
    if not isinstance(method, FederatedMethod):
        raise RecipeError(f"'{recipe.method}' is not federated: it has no clients")
    given = given or Given()
    if given.splits is None:
        own = open_client(recipe.data.name, name, seed=recipe.seed, options=recipe.data.options)
        given = replace(given, splits=own)
    job = open_job(recipe, folder, given=given)
    return Remembering(name, method.client(job, name), recipe.seed, folder / "memory")


def open_hardware(recipe: Recipe) -> Hardware:
    """The recipe's hardware; sets the number of threads."""
    spec = recipe.hardware
    if spec.threads:
        torch.set_num_threads(spec.threads)
    return Hardware(
        accelerator=spec.accelerator,
        devices=spec.devices,
        nodes=spec.nodes,
        strategy=spec.strategy,
        precision=spec.precision,
    )


def default_folder(recipe: Recipe) -> Path:
    """`runs/METHOD-DATA` unless the recipe says otherwise."""
    if recipe.output.folder:
        return Path(recipe.output.folder)
    data = recipe.data.name.rpartition(":")[2].replace("/", "-")
    return Path("runs") / f"{recipe.method}-{data}"


def guard_folder(recipe: Recipe, folder: Path, redo: tuple[str, ...]) -> None:
    """Refuse a folder that holds another recipe's run, naming the fields.

    A run that failed before its first stage left nothing to protect: its recipe is replaced.

    Raises:
        RunFolderError: the recipe was changed and no stage is to be redone.
    """
    changed = _changed(recipe, folder)
    if changed == []:
        return
    if changed and not redo and _begun(folder):
        raise RunFolderError(
            f"{folder} holds a run of another recipe; changed: {', '.join(changed)}. "
            "Give another --folder, or --redo STAGE to run that stage and all after it again"
        )
    write_atomic(folder / "recipe.yaml", dump_recipe(recipe).encode())


def _changed(recipe: Recipe, folder: Path) -> list[str] | None:
    """The fields that differ from the recipe in a folder; None where there is no recipe."""
    path = folder / "recipe.yaml"
    if not path.exists():
        return None
    try:
        return differences(load_recipe(path), recipe)
    except StillhouseError as error:
        return [f"the record of it, which cannot be read ({error})"]


def guard_redo(recipe: Recipe, folder: Path, redo: tuple[str, ...]) -> None:
    """Refuse to redo a stage that neither the method's card nor the folder knows.

    Raises:
        RecipeError: names the stages that can be redone.
    """
    known = {"judge", "judge-teacher"}
    inner: Recipe | None = recipe
    while inner is not None:
        card = catalogue.find(inner.method).card
        known |= {str(name).rstrip("?") for name, _ in card.get("stages", ())}
        inner = inner.teacher.recipe if inner.teacher is not None else None
    # A finished or begun stage holds a stamp; rounds and children lie deeper.
    known |= {stamp.parent.name for stamp in (folder / "stages").rglob(STAMP)}
    for name in redo:
        if name not in known:
            raise RecipeError(
                f"--redo {name}: '{recipe.method}' has no such stage{nearest(name, known)}"
            )


def _begun(folder: Path) -> bool:
    """Whether any stage of a run, or of its sides, has left more than its stamp in the folder."""
    files = [f for place in ("stages", "sides") for f in (folder / place).rglob("*.state")]
    return any(file.name != STAMP for file in files)


# ---- sides ---------------------------------------------------------------------------------


def side_recipe(recipe: Recipe, side: str, seed: int) -> Recipe:
    """The recipe of one side of a comparison: same data, models, budget; another method.

    Args:
        recipe: of the method.
        side: an entry's id, or "id/variant".
        seed: of this side.
    """
    name, _, variant = side.partition("/")
    entry = catalogue.find(name)
    own = name == recipe.method
    settings = dict(recipe.settings)
    if not own:
        settings = catalogue.shared_settings(recipe.method, name, settings)
    budget = recipe.budget
    if variant:
        if variant not in entry.variants:
            raise RecipeError(f"'{name}' has no variant '{variant}'")
        chosen = entry.variants[variant]
        settings.update(chosen.get("set", {}))
        changes = dict(chosen.get("budget", {}))
        if "steps" in changes or "epochs" in changes:
            changes = {"steps": None, "epochs": None, **changes}
        budget = budget.model_copy(update=changes)
    settings.update(recipe.sides.get(side, {}))
    return recipe.model_copy(
        update={
            "method": name,
            "variant": variant or None,
            "settings": settings,
            "budget": budget,
            "seed": seed,
            "seeds": 1,
            "compare": [],
            "sides": {},
        }
    )


def check_sides(recipe: Recipe, sides: Iterable[str]) -> None:
    """Refuse settings that a side of a comparison does not know, before anything is trained.

    Args:
        recipe: of the method.
        sides: names as in `side_recipe`.

    Raises:
        RecipeError: an unknown setting, wrong type or range, with its line.
    """
    for side in sides:
        chosen = side_recipe(recipe, side, recipe.seed)
        settings_of(chosen, catalogue.load(chosen.method).Config, ("sides", side))


def run_side(
    recipe: Recipe,
    side: str,
    seed: int,
    folder: Path,
    *,
    given: Given | None = None,
    progress: bool = False,
    redo: bool = False,
) -> dict[str, float]:
    """Run one side at one seed in its own folder, once.

    Args:
        recipe: of the method the side is compared with.
        side: an entry's id, "id/variant", or "teacher" (which is only judged).
        seed: of this side.
        folder: resumable; a finished one is not run again.
        given: models and data handed in as objects.
        progress: show it.
        redo: a side that an earlier recipe has left is run anew; else it is refused.

    Returns:
        Figures on the test split, "seconds" and "peak_mb".

    Raises:
        RunFolderError: the folder holds a side of another recipe.
    """
    chosen = side_recipe(recipe, recipe.method if side == "teacher" else side, seed)
    changed = _changed(chosen, folder)
    done = _finished(folder)
    if done is not None and not changed:
        return dict(done["figures"])
    hardware = open_hardware(chosen)
    log = RunLog(folder, enabled=hardware.is_main, progress=progress)
    try:
        with locked(folder / "run.lock"):
            if changed and redo and hardware.is_main:
                shutil.rmtree(folder / "stages", ignore_errors=True)
                (folder / "side.json").unlink(missing_ok=True)
            guard_folder(chosen, folder, ())
            job = open_job(chosen, folder, given=given, hardware=hardware, log=log)
            finished = _judge_teacher(job) if side == "teacher" else _run_job(job)
    finally:
        log.close()
    return finished.figures


def _finished(folder: Path) -> dict[str, Any] | None:
    """The record of a finished side; a damaged one is made again from its stages."""
    try:
        found: dict[str, Any] = json.loads((folder / "side.json").read_bytes())
        return {**found, "figures": dict(found["figures"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _judge_teacher(job: Job) -> Side:
    began = time.monotonic()
    job.models.teacher(job, "teacher", None)
    net = getattr(job.models, "teacher_net", None)
    if net is None:
        raise TeacherError("this teacher is no model, so it cannot be judged itself")
    opened = job.judging()
    figures = opened.once(
        "judge-teacher", lambda: opened.task.judge(opened, net), kind="judge", everywhere=True
    )
    return _close_side(job, figures, None, None, began)


def _run_job(job: Job) -> Side:
    """Run the method of a job, judge what it made, and note its figures."""
    began = time.monotonic()
    method = open_method(job.recipe)
    _check(job)
    artifact = method.run(job)
    opened = job.judging()
    figures = opened.once(
        "judge", lambda: method.judge(opened, artifact), kind="judge", everywhere=True
    )
    return _close_side(job, figures, artifact, method, began)


def _check(job: Job) -> None:
    """Before any training: do the data fit the task, and the student the data?"""
    job.task.check(None, None)
    _check_classes_axis(job)
    models = job.models
    if job.recipe.student is None and getattr(models, "given", Given()).student is None:
        return
    student = job.student()
    job.task.check(student, None)
    _check_selection(job, student)


def _check_classes_axis(job: Job) -> None:
    """Losses on logits take classes last; where a task has them elsewhere, methods must know.

    Raises:
        RecipeError: a method of logits that was written for another task.
    """
    recipe, task = job.recipe, job.task
    card = catalogue.find(recipe.method).card
    if task.class_axis == -1 or "logits" not in card.get("needs", ()):
        return
    own = str(card.get("task", "classification"))
    if own != task.name:
        others = [
            entry.id
            for entry in catalogue.entries().values()
            if entry.card.get("task") == task.name and "logits" in entry.card.get("needs", ())
        ]
        raise recipe.refusal(
            "method",
            f"'{recipe.method}' compares logits whose classes come last, as in {own}; those of "
            f"{task.name} are maps with classes second: use {' or '.join(sorted(others))}",
        )


def _check_selection(job: Job, student: Net) -> None:
    """Can the state that is kept be chosen as the budget says? Told before a teacher is trained.

    Raises:
        RecipeError: no validation data, or a figure that validation does not give.
    """
    budget, recipe = job.recipe.budget, job.recipe
    if budget.select == "last" or not catalogue.find(recipe.method).trains_student:
        return
    if "val" not in job.splits:
        raise recipe.refusal(
            "budget.select",
            f"{budget.select} needs validation data, and there is none: set data.options.val",
        )
    if budget.metric is not None:
        val = job.splits["val"]
        figures = job.evaluate(student, Subset(val, torch.arange(min(2, len(val)))))
        if budget.metric not in figures:
            what = f"validation gives no figure '{budget.metric}'"
            raise recipe.refusal("budget.metric", what + nearest(budget.metric, figures))


def _close_side(
    job: Job,
    figures: dict[str, Any],
    artifact: Artifact | None,
    method: Method | None,
    began: float,
) -> Side:
    from stillhouse.metrics.cost import peak_memory_mb

    numbers = {k: float(v) for k, v in figures.items()}
    spent = sum(float(s["seconds"]) for s in job.stages if s["kind"] != "judge")
    numbers["seconds"] = round(spent, 3)
    peak = peak_memory_mb(job.device)
    if peak is not None:
        numbers["peak_mb"] = round(float(peak), 1)
    record = {"figures": numbers, "stages": job.stages, "wall": time.monotonic() - began}
    if job.hardware.is_main:
        write_atomic(job.folder / "side.json", json.dumps(record, indent=1).encode())
    return Side(numbers, artifact, job, method, record)


# ---- the run -------------------------------------------------------------------------------


def run(
    recipe: Recipe,
    *,
    redo: tuple[str, ...] | list[str] | None = None,
    folder: Path | None = None,
    progress: bool = True,
    given: Given | None = None,
    profiled: bool = False,
) -> RunResult:
    """Run a recipe to its end, or go on where it was stopped.

    Args:
        recipe: resolved.
        redo: stages to run again, with all that follow.
        folder: of the run; see `default_folder`.
        progress: show progress on stderr.
        given: models and data handed in as objects.
        profiled: trainings of the run itself (not of what it is compared with) measure where a
            step's time goes; what to do about it is in the summary's `profile`.

    Returns:
        The artifact, the figures of all sides, and where everything lies.

    Raises:
        StillhouseError: told before any training where possible.
    """
    check_sides(recipe, {*recipe.compare, *recipe.sides})
    folder = Path(folder) if folder is not None else default_folder(recipe)
    with full_disk_told(folder):
        return _run(recipe, tuple(redo or ()), folder, progress, given or Given(), profiled)


def _run(
    recipe: Recipe,
    again: tuple[str, ...],
    folder: Path,
    progress: bool,
    given: Given,
    profiled: bool,
) -> RunResult:
    began = time.monotonic()
    hardware = open_hardware(recipe)
    with locked(folder / "run.lock") if hardware.is_main else _unlocked():
        if hardware.is_main:
            guard_redo(recipe, folder, again)
            guard_folder(recipe, folder, again)
            if again:
                (folder / "side.json").unlink(missing_ok=True)
        hardware.barrier()
        log = RunLog(
            folder,
            enabled=hardware.is_main,
            loggers=tuple(recipe.output.loggers),
            progress=progress,
        )
        try:
            log.write("run", method=recipe.method, seed=recipe.seed, hardware=hardware.describe())
            main = recipe.model_copy(update={"seeds": 1})
            job = open_job(
                main, folder, given=given, hardware=hardware, log=log, redo=again, profiled=profiled
            )
            side = _run_job(job)
            result = _conclude(recipe, folder, side, given, progress, began, bool(again))
        finally:
            log.close()
    return result


class _unlocked:  # noqa: N801 - stands beside `locked`
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _conclude(
    recipe: Recipe,
    folder: Path,
    main: Side,
    given: Given,
    progress: bool,
    began: float,
    redo: bool,
) -> RunResult:
    assert main.artifact is not None
    assert main.job is not None
    assert main.method is not None
    artifact, job = main.artifact, main.job
    artifact.meta.update(
        method=recipe.method,
        title=main.method.card.title,
        summary=main.method.card.summary,
        figures=main.figures,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )
    if job.hardware.is_main:
        artifact.save(folder / "artifact")
    sides = _all_sides(recipe, folder, main, given, progress, redo)
    summary = summary_of(recipe, folder, main, sides, time.monotonic() - began)
    if job.hardware.is_main:
        write_atomic(folder / "run.json", json.dumps(summary, indent=1, default=str).encode())
        from stillhouse import report

        job.log.flush()
        report.write(folder)
    job.hardware.barrier()
    return RunResult(folder, artifact, sides, summary)


OURS, ALONE = "distilled", "alone"
TEACHER_FIGURE = "teacher_"


def _all_sides(
    recipe: Recipe, folder: Path, main: Side, given: Given, progress: bool, redo: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by side and seed: the method, what it is compared with, and its teacher."""
    sides: dict[str, dict[str, dict[str, float]]] = {OURS: {str(recipe.seed): main.figures}}
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        for name in (recipe.method, *recipe.compare):
            label = OURS if name == recipe.method else ALONE if name == "supervised" else name
            if str(seed) in sides.get(label, {}):
                continue
            place = folder / "sides" / name.replace("/", "--") / f"seed-{seed}"
            figures = run_side(recipe, name, seed, place, given=given, progress=progress, redo=redo)
            sides.setdefault(label, {})[str(seed)] = figures
    teacher = getattr(main.job.models, "teacher_net", None) if main.job else None
    if main.method is not None and main.method.judges_teacher:
        told = {k: v for k, v in main.figures.items() if k.startswith(TEACHER_FIGURE)}
        if told:
            own = {k.removeprefix(TEACHER_FIGURE): v for k, v in told.items()}
            sides["teacher"] = {str(recipe.seed): own}
    elif teacher is not None and main.job is not None:
        opened = main.job.judging()
        figures = opened.once(
            "judge-teacher",
            lambda: opened.task.judge(opened, teacher),
            kind="judge",
            everywhere=True,
        )
        sides["teacher"] = {str(recipe.seed): dict(figures)}
    return sides


def infer(
    artifact: Path,
    inputs: list[Path],
    output: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Use what came out: the artifact's predictor on files or folders.

    Args:
        artifact: a folder that a run has left (the run's own folder will do).
        inputs: files or folders.
        output: a file or folder, as the predictor writes.
        options: of the predictor.

    Returns:
        A summary for the terminal.
    """
    from stillhouse.errors import nearest
    from stillhouse.opening import open_artifact

    opened = open_artifact(artifact)
    if opened.predictor is None:
        held = ", ".join(opened.tensors) or opened.kind
        raise RecipeError(
            f"an artifact of kind '{opened.kind}' holds no model that could answer: it holds "
            f"{held} (in Python: stillhouse.load('{artifact}'))"
        )
    known = opened.predictor.options
    for name in options or {}:
        if name not in known:
            raise RecipeError(f"unknown option '{name}'{nearest(name, known)}")
    return opened.predictor.infer(inputs, output, dict(options or {}))
