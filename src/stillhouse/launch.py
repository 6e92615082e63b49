"""From a recipe to a finished run: data, models, stages, judging, artifact, report.

A run folder holds the main side (the method at the first seed); other seeds and what it is
compared with lie in `sides/`. Each is a job of its own, resumable and never run twice.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
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
from stillhouse.artifact import Artifact, alterations_of
from stillhouse.batch import Splits, Subset
from stillhouse.data.registry import open_data
from stillhouse.data.roots import cache_folder
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.job import Family, Job, locked
from stillhouse.engine.log import RunLog
from stillhouse.engine.loop import STAMP, StopRequest
from stillhouse.errors import (
    ModelError,
    OptionError,
    RecipeError,
    RunFolderError,
    StillhouseError,
    TeacherError,
    nearest,
)
from stillhouse.method import Method, StudentTraining
from stillhouse.models.loading import load_model
from stillhouse.net import Net
from stillhouse.recipe import (
    GIVEN,
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
from stillhouse.writing import full_disk_told


@dataclass
class Given:
    """Models and data handed in as objects, by people with their own code.

    A recipe names them `given`.

    Attributes:
        student: a module; copied for every side and seed, so that all begin equal.
        teacher: a module or a Teacher.
        splits: the data.
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

    Attributes:
        teacher_net: the network that teaches, once `teacher` has been called and it is one.
    """

    def __init__(self, recipe: Recipe, given: Given) -> None:
        self.recipe, self.given = recipe, given
        self.teacher_net: Net | None = None
        self._built: dict[str, dict[str, Any]] = {}
        self._teachers: dict[str, Teacher] = {}

    def has(self, role: str) -> bool:
        """Whether there is a "student" or "teacher", in the recipe or handed in."""
        named = (getattr(self.recipe, role, None), getattr(self.given, role, None))
        return any(value is not None for value in named)

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

        try:
            return self._arranged(job.task.net(job.build(make, role), spec.taps))
        except ModelError as error:
            section = "student" if spec is self.recipe.student else "teacher"
            raise ModelError(self.recipe.placed(section, str(error))) from error

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
        if spec is not None and spec.store is not None and spec.source != "store":
            from stillhouse.stages.capture import refuse_other_data

            refuse_other_data(job, spec.store)
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
            home = self._home(job, spec)
            net = self._net(home, spec, role)
            self._check_teacher(job, net)
            if spec.train is not None:
                self._train(home, net, spec)
            elif _knows_nothing(spec, net):
                job.log.write("warning", text=KNOWS_NOTHING.format(model=spec.model))
            return self._live(job, net)
        if spec.source == "artifact":
            return self._live(job, self._opened(job, spec))
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

    def _opened(self, job: Job, spec: TeacherSpec) -> Net:
        from stillhouse.opening import open_artifact

        artifact = open_artifact(Path(str(spec.artifact)))
        module = artifact.module
        if not isinstance(module, Net):
            raise TeacherError(f"the artifact {spec.artifact} holds no model of this task")
        self._check_classes(job, artifact, str(spec.artifact))
        self._check_teacher(job, module.to(job.device))
        self._built["teacher"] = artifact.model
        return module

    def _home(self, job: Job, spec: TeacherSpec) -> Job:
        """The job on the data that the teacher is trained on: its own, where it has any."""
        if spec.train is None or spec.train.data is None:
            return job
        own = spec.train.data
        splits = open_data(own.name, seed=job.seed, options=own.options)
        return Job(
            job.recipe,
            open_task(job.task.name, splits),
            job.folder,
            seed=job.seed,
            hardware=job.hardware,
            log=job.log,
            models=self,
            cache=job.cache,
            path=job.path,
            stop=job.stop,
            family=job.family,
        )

    def _check_teacher(self, job: Job, net: Net) -> None:
        """A teacher of logits must know the same classes; others are checked by their wants."""
        if "logits" in catalogue.find(self.recipe.method).card.get("needs", ()):
            job.task.check(None, net)

    def trainable_teacher(self, job: Job, role: str, trained: bool) -> Net:
        """The recipe's teacher as a network of the method's own; see `Job.trainable_teacher`."""
        given, spec = self.given.teacher, self.recipe.teacher
        if given is not None:
            module = given.net if isinstance(given, Live) else given
            if not isinstance(module, nn.Module):
                raise self._no_net("object that answers")
            # What was handed in stays as it is.
            module = copy.deepcopy(module)
            net = module if isinstance(module, Net) else job.task.net(module, {})
            net = self._arranged(net.to(job.device))
        elif spec is None:
            raise RecipeError(
                f"'{self.recipe.method}' trains the teacher and the recipe names none; "
                "add teacher: {model: ..., train: {...}}"
            )
        elif spec.source == "model":
            net = self._net(job, spec, role)
            self._check_teacher(job, net)
            if trained and spec.train is not None:
                self._train(job, net, spec)
        elif spec.source == "artifact":
            net = self._opened(job, spec)
        elif spec.source == "recipe":
            _, _, net, artifact = self._run_nested(job, spec)
            self._built["teacher"] = artifact.model
        else:
            raise self._no_net(spec.source)
        self._check_teacher(job, net)
        if not any(p.requires_grad for p in net.parameters()):
            net.requires_grad_(True)  # it was frozen as a teacher before
        return net

    def _no_net(self, what: str) -> TeacherError:
        return TeacherError(
            f"'{self.recipe.method}' trains the teacher itself, which is no network as {what}: "
            "give teacher: {model: ...}, an artifact or another recipe"
        )

    def teaching(self, job: Job, net: Net) -> Teacher:
        """A network made in this run as its teacher; see `Job.teaching`."""
        teacher, spec = self._live(job, net), self.recipe.teacher
        if spec is not None and spec.store is not None and spec.source != "store":
            from stillhouse.stages.capture import captured

            return captured(job, teacher, spec.store)
        return teacher

    def _check_classes(self, job: Job, artifact: Artifact, where: str) -> None:
        """As many classes are not enough: they must be the same, in the same order."""
        taught = list(artifact.meta.get("about", {}).get("classes") or ())
        wanted = [str(name) for name in job.task.about.get("classes") or ()]
        if taught and wanted and taught != wanted:
            at = next((i for i, (a, b) in enumerate(zip(taught, wanted)) if a != b), None)
            first = ""
            if at is not None:
                first = f"; class {at} is '{taught[at]}' there, '{wanted[at]}' here"
            raise TeacherError(
                f"the teacher {where} was made for {len(taught)} classes of "
                f"'{artifact.meta.get('data', 'other data')}', the run reads {len(wanted)} of "
                f"'{job.splits.edition}'{first}"
            )

    def _live(self, job: Job, net: Net) -> Teacher:
        self.teacher_net = net
        return Live(net)

    def _train(self, job: Job, net: Net, spec: TeacherSpec) -> None:
        from stillhouse.stages.supervised import train_supervised

        share = {
            "model": spec.model,
            "options": spec.options,
            "weights": spec.weights,
            "budget": spec.train.model_dump(exclude={"data"}) if spec.train else None,
            "data": job.splits[job.teacher_split].fingerprint,
            "seed": job.seed,
            "version": __version__,
        }
        train_supervised(
            job, "teacher", net, split=job.teacher_split, budget=spec.train, share=share
        )

    def _nested(self, job: Job, spec: TeacherSpec) -> Teacher:
        method, child, net, artifact = self._run_nested(job, spec)
        live = self._live(job, net)
        own: Teacher | None = method.teacher(child, artifact)
        return own or live

    def _run_nested(self, job: Job, spec: TeacherSpec) -> tuple[Method, Job, Net, Artifact]:
        """The teacher's own recipe, run as a child on what teachers are trained on."""
        assert spec.recipe is not None
        inner = spec.recipe.model_copy(update={"seed": job.seed})
        models = RecipeModels(inner, Given(splits=self.given.splits))
        whole = job.splits.of_teachers()
        child = Job(
            inner,
            job.task if whole is job.splits else type(job.task)(whole),
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
        return method, child, net, artifact

    def artifact(self, job: Job, module: nn.Module, role: str = "student") -> Artifact:
        """A model artifact with the task's predictor and the way to build it again."""
        net = module if isinstance(module, Net) else job.task.net(module)
        spec: ModelSpec | TeacherSpec | None = self.recipe.student
        given: Any = self.given.student
        if role == "teacher":
            spec, given = self.recipe.teacher, self.given.teacher
        model = self._built.get(role, {})
        if given is None and spec is not None and spec.model is not None:
            model = {"id": spec.model, "options": spec.options, "taps": spec.taps}
        changes = alterations_of(net.module)
        if changes:
            model = {**model, "altered": [*model.get("altered", ()), *changes]}
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


KNOWS_NOTHING = (
    "the teacher {model} has neither weights nor train: it is freshly initialised and knows nothing"
)


def _knows_nothing(spec: TeacherSpec, net: Net) -> bool:
    """Whether a teacher would be asked as the seed has left it. A folder brings its weights."""
    if spec.train is not None or spec.weights is not None or spec.model is None:
        return False
    parameters = any(True for _ in net.parameters())
    return parameters and not Path(spec.model).expanduser().is_dir()


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
    models = job.models
    if job.recipe.student is None and getattr(models, "given", Given()).student is None:
        return
    student = job.student()
    job.task.check(student, None)
    _check_selection(job, student)


def _check_selection(job: Job, student: Net) -> None:
    """Can the state that is kept be chosen as the budget says? Told before a teacher is trained.

    Raises:
        RecipeError: no validation data, or a figure that validation does not give.
    """
    budget, recipe = job.recipe.budget, job.recipe
    if budget.select != "best" or not catalogue.find(recipe.method).trains_student:
        return
    if "val" not in job.splits:
        raise recipe.refusal(
            "budget.select", "best needs validation data, and there is none: set data.options.val"
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
        if _knows_nothing(teacher, net):
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
