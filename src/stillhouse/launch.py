"""From a recipe to a finished run: data, models, stages, judging, artifact, report.

A run folder holds the main side (the method at the first seed); other seeds and what it is
compared with lie in `sides/`. Each is a job of its own, resumable and never run twice.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse import catalogue
from stillhouse._version import __version__
from stillhouse.artifact import Artifact
from stillhouse.batch import Splits
from stillhouse.data.registry import open_data
from stillhouse.data.roots import cache_folder
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.job import Family, Job, locked
from stillhouse.engine.log import RunLog
from stillhouse.engine.loop import StopRequest
from stillhouse.errors import RecipeError, RunFolderError, TeacherError
from stillhouse.method import Method
from stillhouse.models.loading import load_model
from stillhouse.net import Net
from stillhouse.recipe import (
    ModelSpec,
    Recipe,
    TeacherSpec,
    differences,
    dump_recipe,
    load_recipe,
    settings_of,
)
from stillhouse.task import Task
from stillhouse.tasks import open_task
from stillhouse.teacher import Teacher
from stillhouse.teachers.live import Live

GIVEN = "given"


@dataclass
class Given:
    """Models and data handed in as objects, by people with their own code.

    A recipe names them `given`.

    Attributes:
        student: a module; copied for every side and seed, so that all begin equal.
        teacher: a module or a Teacher.
        splits: the data.
        method: a method class that is not in the catalogue.
    """

    student: nn.Module | None = None
    teacher: Any = None
    splits: Splits | None = None


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


class RecipeModels:
    """Builds what a recipe names: see `engine.job.Models`.

    Args:
        recipe: of the run.
        given: modules handed in as objects.
        teacher_folder: where a nested recipe's run lies.
    """

    def __init__(self, recipe: Recipe, given: Given) -> None:
        self.recipe, self.given = recipe, given
        self.teacher_net: Net | None = None
        self._teachers: dict[str, Teacher] = {}

    def student(self, job: Job, role: str) -> Net:
        """The recipe's student, initialised by the seed (equal for every side)."""
        spec = self.recipe.student
        if self.given.student is not None:
            module = copy.deepcopy(self.given.student).to(job.device)
            return self._arranged(job.task.net(module, spec.taps if spec else {}))
        if spec is None:
            raise RecipeError("the recipe names no student; add student: {model: ...}")
        return self._net(job, spec, role)

    def _net(self, job: Job, spec: ModelSpec | TeacherSpec, role: str) -> Net:
        assert spec.model is not None
        name = spec.model

        def make() -> nn.Module:
            return load_model(
                name, options=spec.options, weights=spec.weights, about=job.task.about
            )

        return self._arranged(job.task.net(job.build(make, role), spec.taps))

    def _arranged(self, net: Net) -> Net:
        """The net laid out and compiled as the recipe's hardware says; its state keeps its keys."""
        if self.recipe.hardware.channels_last:
            net.module.to(memory_format=torch.channels_last)
        if self.recipe.hardware.compile:
            net.module.compile()
        return net

    def teacher(
        self, job: Job, role: str, otherwise: Callable[[Job], Net] | None = None
    ) -> Teacher:
        """The recipe's teacher, made ready once per job path."""
        key = "/".join((*job.path, role))
        if key not in self._teachers:
            self._teachers[key] = self._teacher(job, role, otherwise)
        return self._teachers[key]

    def _teacher(self, job: Job, role: str, otherwise: Callable[[Job], Net] | None) -> Teacher:
        spec = self.recipe.teacher
        if self.given.teacher is not None:
            teacher = self._handed_in(job, self.given.teacher)
        elif spec is not None:
            teacher = self._from_spec(job, spec, role)
        elif otherwise is not None:
            return self._live(job, otherwise(job))
        else:
            raise RecipeError(
                f"'{self.recipe.method}' needs a teacher and the recipe names none; "
                "add teacher: {model: ..., weights: ...} or another source of knowledge"
            )
        if spec is not None and spec.store is not None and spec.source != "store":
            from stillhouse.stages.capture import captured

            teacher = captured(job, teacher, spec.store)
        return teacher

    def _handed_in(self, job: Job, given: nn.Module | Teacher) -> Teacher:
        if not isinstance(given, nn.Module):
            return given
        net = given if isinstance(given, Net) else job.task.net(given, {})
        self._check_teacher(job, net.to(job.device))
        return self._live(job, self._arranged(net))

    def _from_spec(self, job: Job, spec: TeacherSpec, role: str) -> Teacher:
        if spec.source == "model":
            net = self._net(job, spec, role)
            self._check_teacher(job, net)
            if spec.train is not None:
                self._train(job, net, spec)
            return self._live(job, net)
        if spec.source == "artifact":
            from stillhouse.opening import open_artifact

            artifact = open_artifact(Path(str(spec.artifact)))
            module = artifact.module
            if not isinstance(module, Net):
                raise TeacherError(f"the artifact {spec.artifact} holds no model of this task")
            return self._live(job, module.to(job.device))
        if spec.source == "recipe":
            return self._nested(job, spec)
        if spec.source == "store":
            from stillhouse.teachers.stored import Stored

            assert spec.store is not None
            return Stored(Path(str(spec.store.path)))
        if spec.source == "callable":
            from stillhouse.teachers.function import import_callable

            return import_callable(str(spec.callable), fingerprint=spec.fingerprint)
        raise TeacherError(
            f"'{self.recipe.method}' asks for logits or features, which an endpoint cannot give "
            "inside a training: label first, or give the teacher as a model or a store"
        )

    def _check_teacher(self, job: Job, net: Net) -> None:
        """A teacher of logits must know the same classes; others are checked by their wants."""
        if "logits" in catalogue.find(self.recipe.method).card.get("needs", ()):
            job.task.check(None, net)

    def _live(self, job: Job, net: Net) -> Teacher:
        self.teacher_net = net
        return Live(net)

    def _train(self, job: Job, net: Net, spec: TeacherSpec) -> None:
        from stillhouse.stages.supervised import train_supervised

        share = {
            "model": spec.model,
            "options": spec.options,
            "weights": spec.weights,
            "budget": spec.train.model_dump() if spec.train else None,
            "data": job.splits["train"].fingerprint,
            "seed": job.seed,
            "version": __version__,
        }
        train_supervised(job, "teacher", net, budget=spec.train, share=share)

    def _nested(self, job: Job, spec: TeacherSpec) -> Teacher:
        assert spec.recipe is not None
        inner = spec.recipe.model_copy(update={"seed": job.seed})
        models = RecipeModels(inner, Given(splits=self.given.splits))
        child = Job(
            inner,
            job.task,
            job.folder,
            seed=job.seed,
            hardware=job.hardware,
            log=job.log,
            models=models,
            cache=job.cache,
            path=(*job.path, "teacher"),
            stop=job.stop,
            family=job.family,
        )
        method = open_method(inner)
        artifact = method.run(child)
        net = artifact.module
        if not isinstance(net, Net):
            raise TeacherError(f"'{inner.method}' yields no model that could teach")
        live = self._live(job, net)
        own: Teacher | None = method.teacher(child, artifact)
        return own or live

    def artifact(self, job: Job, module: nn.Module) -> Artifact:
        """A model artifact with the task's predictor and the way to build it again."""
        net = module if isinstance(module, Net) else job.task.net(module)
        spec = self.recipe.student
        model: dict[str, Any] = {}
        if self.given.student is None and spec is not None:
            model = {"id": spec.model, "options": spec.options, "taps": spec.taps}
        return Artifact(
            "model",
            predictor=job.task.predictor(net),
            model=model,
            meta={
                "about": _plain_about(job.task.about),
                "task": job.task.name,
                "data": job.splits.edition,
            },
        )


def _plain_about(about: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in about.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        kept[key] = value
    return kept


def open_method(recipe: Recipe) -> Method:
    """The recipe's method with its settings validated.

    Raises:
        RecipeError: unknown method or setting, wrong type or range.
    """
    kind = catalogue.load(recipe.method)
    return kind(settings_of(recipe, kind.Config))


def open_splits(recipe: Recipe, given: Given) -> Splits:
    """The recipe's data."""
    if given.splits is not None:
        return given.splits
    return open_data(recipe.data.name, seed=recipe.seed, options=recipe.data.options)


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
    path = folder / "recipe.yaml"
    if path.exists():
        changed = differences(load_recipe(path), recipe)
        if changed and not redo and _begun(folder):
            raise RunFolderError(
                f"{folder} holds a run of another recipe; changed: {', '.join(changed)}. "
                "Give another --folder, or --redo STAGE to run that stage and all after it again"
            )
        if not changed:
            return
    write_atomic(path, dump_recipe(recipe).encode())


def _begun(folder: Path) -> bool:
    """Whether any stage of a run, or of its sides, has left something in the folder."""
    places = [folder / "stages", folder / "sides"]
    return any(file.is_file() for place in places for file in place.rglob("*"))


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
    return recipe.model_copy(
        update={
            "method": name,
            "variant": variant or None,
            "settings": settings,
            "budget": budget,
            "seed": seed,
            "seeds": 1,
            "compare": [],
        }
    )


@dataclass
class Side:
    """One finished side at one seed."""

    figures: dict[str, float]
    artifact: Artifact | None
    job: Job | None
    method: Method | None
    record: dict[str, Any]


def run_side(
    recipe: Recipe,
    side: str,
    seed: int,
    folder: Path,
    *,
    given: Given | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Run one side at one seed in its own folder, once.

    Args:
        recipe: of the method the side is compared with.
        side: an entry's id, "id/variant", or "teacher" (which is only judged).
        seed: of this side.
        folder: resumable; a finished one is not run again.
        given: models and data handed in as objects.
        progress: show it.

    Returns:
        Figures on the test split, "seconds" and "peak_mb".
    """
    done = _finished(folder)
    if done is not None:
        return dict(done["figures"])
    if side == "teacher":
        chosen = side_recipe(recipe, recipe.method, seed)
    else:
        chosen = side_recipe(recipe, side, seed)
    hardware = open_hardware(chosen)
    log = RunLog(folder, enabled=hardware.is_main, progress=progress)
    try:
        with locked(folder / "run.lock"):
            guard_folder(chosen, folder, ())
            job = open_job(chosen, folder, given=given, hardware=hardware, log=log)
            finished = _judge_teacher(job) if side == "teacher" else _run_job(job)
    finally:
        log.close()
    return finished.figures


def _finished(folder: Path) -> dict[str, Any] | None:
    path = folder / "side.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


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
    """Before any training: does the student fit the data?"""
    models = job.models
    if job.recipe.student is None and getattr(models, "given", Given()).student is None:
        return
    job.task.check(job.student(), None)


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
    folder = Path(folder) if folder is not None else default_folder(recipe)
    given = given or Given()
    again = tuple(redo or ())
    began = time.monotonic()
    hardware = open_hardware(recipe)
    with locked(folder / "run.lock") if hardware.is_main else _unlocked():
        if hardware.is_main:
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
            result = _conclude(recipe, folder, side, given, progress, began)
        finally:
            log.close()
    return result


class _unlocked:  # noqa: N801 - stands beside `locked`
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _conclude(
    recipe: Recipe, folder: Path, main: Side, given: Given, progress: bool, began: float
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
    sides = _all_sides(recipe, folder, main, given, progress)
    summary = _summary(recipe, folder, main, sides, time.monotonic() - began)
    if job.hardware.is_main:
        write_atomic(folder / "run.json", json.dumps(summary, indent=1, default=str).encode())
        from stillhouse import report

        job.log.flush()
        report.write(folder)
    job.hardware.barrier()
    return RunResult(folder, artifact, sides, summary)


OURS, ALONE = "distilled", "alone"


def _all_sides(
    recipe: Recipe, folder: Path, main: Side, given: Given, progress: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by side and seed: the method, what it is compared with, and its teacher."""
    sides: dict[str, dict[str, dict[str, float]]] = {OURS: {str(recipe.seed): main.figures}}
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        for name in (recipe.method, *recipe.compare):
            label = OURS if name == recipe.method else ALONE if name == "supervised" else name
            if str(seed) in sides.get(label, {}):
                continue
            place = folder / "sides" / name.replace("/", "--") / f"seed-{seed}"
            figures = run_side(recipe, name, seed, place, given=given, progress=progress)
            sides.setdefault(label, {})[str(seed)] = figures
    teacher = getattr(main.job.models, "teacher_net", None) if main.job else None
    if teacher is not None and main.job is not None:
        opened = main.job.judging()
        figures = opened.once(
            "judge-teacher",
            lambda: opened.task.judge(opened, teacher),
            kind="judge",
            everywhere=True,
        )
        sides["teacher"] = {str(recipe.seed): dict(figures)}
    return sides


def _summary(
    recipe: Recipe,
    folder: Path,
    main: Side,
    sides: dict[str, dict[str, dict[str, float]]],
    seconds: float,
) -> dict[str, Any]:
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
    found.update(method.details(opened, artifact))
    return found


def plan(recipe: Recipe, *, given: Given | None = None) -> dict[str, Any]:
    """What a run would do, without doing it: data, shapes, parameters, stages, steps."""
    given = given or Given()
    method = open_method(recipe)
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
            **{k: v for k, v in _plain_about(splits.about).items() if k in {"input", "hash"}},
        },
        "stages": [{"name": n, "kind": k} for n, k in method.card.stages],
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
        net = RecipeModels(recipe, given)._net(job, teacher, "teacher")
        task.check(None, net)
        found["models"]["teacher"] = _model_plan(net, teacher)
    if "train" in splits:
        rows, budget = splits.peek("train"), recipe.budget
        epoch = -(-rows // budget.batch)
        found["steps"] = budget.steps or (budget.epochs or 1) * epoch
    return {**found, **method.forecast(job)}


def _model_plan(net: Net, spec: Any) -> dict[str, Any]:
    return {
        "model": getattr(spec, "model", GIVEN),
        "class": type(net.module).__name__,
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable": sum(p.numel() for p in net.parameters() if p.requires_grad),
    }


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
        raise RecipeError(f"an artifact of kind '{opened.kind}' cannot infer")
    known = opened.predictor.options
    for name in options or {}:
        if name not in known:
            raise RecipeError(f"unknown option '{name}'{nearest(name, known)}")
    return opened.predictor.infer(inputs, output, dict(options or {}))
