"""One run while it runs: its folder, seed, hardware, log, and its stages.

A stage returns the same thing whether it ran or was read back, so a method's `run` may
loop, branch and read values. A finished stage is never run twice; a killed one goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, nn

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Order, Shuffled, Source, Splits, Streams
from stillhouse.clock import Clock, Name, Views, generator, seed_of
from stillhouse.engine.checkpoint import read_state, write_state
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.log import RunLog
from stillhouse.engine.loop import Stage, State, StopRequest, loop
from stillhouse.engine.step import Clip, Factory, Gradient, Schedule
from stillhouse.errors import RecipeError, RunFolderError
from stillhouse.net import Net, Output, in_eval_mode
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Teacher


@dataclass(frozen=True)
class Last:
    """Keep the state of the last step."""


@dataclass(frozen=True)
class Best:
    """Keep the state with the best figure on a split (never the test split).

    Attributes:
        metric: by name; the task's main metric when empty.
        split: "val" by default.
        latest: of equal figures the last state counts, not the first.
        patience: validations in a row that do not reach the best figure, after which the training
            ends; None: it goes on to its end.
    """

    metric: str = ""
    split: str = "val"
    latest: bool = False
    patience: int | None = None


@dataclass(frozen=True)
class Above:
    """Keep the last state whose figure is not below a floor; a training that sinks is ended.

    The initial state counts as one above it.

    Attributes:
        least: the floor: the lowest figure that is accepted (the highest, where lower is better).
        patience: validations in a row below it that end the training; a dip that is shorter is
            passed over, unless the training ends in it.
        metric: by name; the task's main metric when empty.
        split: "val" by default.
    """

    least: float
    metric: str = ""
    split: str = "val"
    patience: int = 1


@dataclass(frozen=True)
class Each:
    """Keep the last state, and leave a snapshot of the export after every n epochs."""

    epochs: int = 1


@dataclass
class Fit:
    """What a training leaves beside the trained objective.

    Attributes:
        steps: that were made.
        stopped: why the training ended before its time; empty when it did not.
        scores: figures of the kept state on the validation split, when there was one.
        best_step: the step whose state was kept.
        snapshots: files of `Each`, in order of epochs (the initial state first).
        seconds: of training.
        teacher_seconds: of them, spent asking the teacher.
    """

    steps: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    snapshots: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    stopped: str = ""


class Models(Protocol):
    """Builds what a recipe names; given to the job by the floor above."""

    def has(self, role: str) -> bool: ...

    def student(self, job: Job, role: str) -> Net: ...

    def teacher(self, job: Job, role: str, otherwise: Callable[[Job], Net] | None) -> Teacher: ...

    def trainable_teacher(self, job: Job, role: str, trained: bool) -> Net: ...

    def teaching(self, job: Job, net: Net) -> Teacher: ...

    def artifact(self, job: Job, module: nn.Module, role: str) -> Artifact: ...


class Into(Protocol):
    """Where `Job.map` puts its results: a store or a journal."""

    def __contains__(self, key: Any) -> bool: ...

    def put(self, key: Any, value: Any) -> None: ...

    def flush(self) -> None: ...


class Job:
    """One run, or a child of one.

    Args:
        recipe: the resolved recipe.
        task: with its splits.
        folder: of the run.
        seed: of the run.
        hardware: where it computes.
        log: of the run.
        models: builds students and teachers.
        cache: where shared stages lie.
        path: of a child.
        stop: who listens to signals.
        family: what all jobs of the run share.
    """

    def __init__(
        self,
        recipe: Any,
        task: Task,
        folder: Path,
        *,
        seed: int,
        hardware: Hardware,
        log: RunLog,
        models: Models,
        cache: Path,
        path: tuple[str, ...] = (),
        stop: StopRequest | None = None,
        family: Family | None = None,
    ) -> None:
        self.recipe, self.task, self.folder, self.seed = recipe, task, folder, seed
        self.hardware, self.log, self.models, self.cache = hardware, log, models, cache
        self.path = path
        self.stop = stop or StopRequest()
        self.family = family or Family()

    @property
    def splits(self) -> Splits:
        """The data."""
        return self.task.splits

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self.hardware.device

    @property
    def budget(self) -> Any:
        """The recipe's budget."""
        return self.recipe.budget

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages that have finished, in order, with kind, steps and seconds."""
        return self.family.stages

    def rng(self, *path: Name) -> Generator:
        """A generator that is a function of the seed, the job's path and `path`."""
        return generator(self.seed, self.path, *path)

    def clock(self, name: str) -> Clock:
        """A clock for a stage of this name."""
        return Clock(
            seed=self.seed,
            path=(*self.path, name),
            rank=self.hardware.rank,
            world=self.hardware.world,
        )

    def views(self) -> Views:
        """The chance of reading data, equal in all stages of the run."""
        return Views(seed_of(self.seed, "views"))

    # ---- models and data -----------------------------------------------------------------

    def has(self, role: str) -> bool:
        """Whether the recipe names a "student" or "teacher", or one was handed in."""
        return self.models.has(role)

    def student(self, role: str = "student") -> Net:
        """The recipe's student (or another role), freshly initialised by the seed."""
        return self.models.student(self, role)

    def teacher(
        self, role: str = "teacher", otherwise: Callable[[Job], Net] | None = None
    ) -> Teacher:
        """The recipe's teacher; trained as a stage where the recipe says so or brings none."""
        return self.models.teacher(self, role, otherwise)

    def trainable_teacher(self, role: str = "teacher", *, trained: bool = True) -> Net:
        """The recipe's teacher as a network that a method may train: its own copy, unfrozen.

        Args:
            role: of the teacher.
            trained: after the training that the recipe asks for it (a stage), or before.

        Raises:
            TeacherError: the teacher only answers, and is no network here.
            RecipeError: the recipe names none.
        """
        return self.models.trainable_teacher(self, role, trained)

    def teaching(self, net: Net) -> Teacher:
        """A network that this run has made, as the teacher of what follows.

        It is frozen, its answers are kept in a store where the recipe's teacher asks for one,
        and the report shows it as the teacher.
        """
        return self.models.teaching(self, net)

    @property
    def teacher_split(self) -> str:
        """The split that teachers are trained on: "full" where students see a part of train."""
        return "full" if "full" in self.splits else "train"

    def model_artifact(self, module: nn.Module, role: str = "student") -> Artifact:
        """A model artifact of an exported module, with the task's predictor.

        Args:
            module: the network.
            role: "student" or "teacher": by which of them in the recipe it was built.
        """
        return self.models.artifact(self, module, role)

    def build(self, make: Callable[[], nn.Module], *name: Name) -> nn.Module:
        """A module whose initial weights are a function of the seed and `name`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, self.path, "init", *name))
            module = make()
        return module.to(device=self.device, dtype=self.hardware.dtype)

    def order(self, split: str = "train", batch: int | None = None, **settings: Any) -> Order:
        """The shuffled order of a split, in batches of the budget."""
        size = batch or self.budget.batch
        settings = {**self._draws(), **settings}
        return Shuffled(self.splits[split], size, collate=self.task.collate, **settings)

    def streams(self, streams: Mapping[str, tuple[str, int]], **settings: Any) -> Streams:
        """Several splits read side by side.

        Args:
            streams: name of each stream to (split, rows of its global batch).
            settings: of `Streams`, such as `drive`.
        """
        sources = {name: (self.splits[split], size) for name, (split, size) in streams.items()}
        return Streams(sources, collate=self.task.collate, **{**self._draws(), **settings})

    def _draws(self) -> dict[str, Any]:
        store = getattr(getattr(self.recipe, "teacher", None), "store", None)
        # Every side of a comparison then reads the same augmentations, stored or not.
        return {"draws": store.draws} if store is not None and store.draws else {}

    # ---- stages ----------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        kind: str,
        *,
        stamp: Mapping[str, Any] | None = None,
        share: Mapping[str, Any] | None = None,
        elsewhere: bool = False,
    ) -> Stage:
        """Open a stage: the primitive under all others; see `Stage` for the arguments.

        Raises:
            RecipeError: the name was used before under this path; the second stage would
                silently get the first one's result.
        """
        if (*self.path, name) in self.family.names:
            raise RecipeError(
                f"the stage '{'/'.join((*self.path, name))}' is begun twice in one run; "
                "give each round its own child: job.child('round', i)"
            )
        self.family.names.add((*self.path, name))
        folder = self.folder / "stages" / Path(*(_safe(p) for p in (*self.path, name)))
        again = self.family.redoes(name)
        if share is not None:
            key = hashlib.sha256(json.dumps(share, sort_keys=True, default=str).encode())
            folder = self.cache / "shared" / f"{_safe(name)}-{key.hexdigest()[:20]}"
            # It depends on nothing but `share`, so it is run again only when it is named itself.
            again = again and self.family.names_redo(name)
        elif again and self.hardware.is_main and folder.exists():
            _remove(folder)
        self.hardware.barrier()
        output = getattr(self.recipe, "output", None)
        return Stage(
            name,
            kind,
            folder,
            (*self.path, name),
            log=self.log,
            hardware=self.hardware,
            stop=self.stop,
            stamp=stamp,
            checkpoint_seconds=60.0 * getattr(output, "checkpoint_minutes", 1.0),
            keep=getattr(output, "keep", 2),
            anew=again,
            elsewhere=elsewhere,
        )

    @contextlib.contextmanager
    def _open(self, stage: Stage, shared: bool) -> Iterator[None]:
        if not shared:
            with self.stop.listening():
                yield
            return
        # One process of the run holds the lock for all of them; the others wait for it here.
        main = self.hardware.is_main
        held = locked(stage.folder / "lock", wait=True) if main else contextlib.nullcontext()
        with held, self.stop.listening():
            stage.forget()
            self.hardware.barrier()
            yield

    def _done(self, stage: Stage, **figures: Any) -> None:
        self.family.stages.append(
            {
                "name": stage.label,
                "kind": stage.kind,
                "seconds": round(stage.seconds, 3),
                **stage.figures,
                **figures,
            }
        )

    def loop(
        self,
        name: str,
        state: State,
        body: Callable[[Any, Clock], Any],
        n: int,
        *,
        kind: str = "synthesis",
        stamp: Mapping[str, Any] | None = None,
        share: Mapping[str, Any] | None = None,
        save_each: bool = False,
    ) -> Any:
        """Run `body(state, clock)` n times; returns the state, restored from the end.

        Args:
            name: of the stage.
            state: what the body changes.
            body: one step.
            n: number of steps.
            kind: of the stage.
            stamp: what must be equal when the stage is resumed.
            share: everything the result depends on; the stage then lies in the cache.
            save_each: a checkpoint after every step, whatever the recipe says: for long steps
                that others take part in, such as rounds.
        """
        stage = self.stage(name, kind, stamp={"steps": n, **(stamp or {})}, share=share)
        if save_each:
            stage.checkpoint_seconds = 0.0
        with self._open(stage, share is not None):
            if stage.finished:
                state.load_state_dict(stage.result())
            else:
                stage.begin()
                loop(stage, state, body, n, self.clock(name))
                stage.figures["steps"] = n
                state.load_state_dict(stage.finish(state.state_dict()))
        self._done(stage)
        return state

    def once(
        self,
        name: str,
        fn: Callable[[], Any],
        *,
        kind: str = "closed",
        share: Mapping[str, Any] | None = None,
        everywhere: bool = False,
    ) -> Any:
        """The value of `fn`, computed once: tensors, numbers, strings and nests of them.

        Args:
            name: of the stage.
            fn: makes the value.
            kind: of the stage.
            share: everything the result depends on; the stage then lies in the cache.
            everywhere: `fn` holds stages or evaluations, in which all processes take part, so
                all run it; the first one's value counts.

        Returns:
            What was read back, also the first time.
        """
        stage = self.stage(name, kind, share=share)
        with self._open(stage, share is not None):
            if stage.finished:
                value = stage.result()
            else:
                stage.begin()
                made = fn() if everywhere else self.hardware.first(fn)
                value = stage.finish(self.hardware.broadcast(made))
        self._done(stage)
        return value

    def map(
        self,
        name: str,
        items: Iterable[tuple[Any, Any]],
        fn: Callable[[Any], Any],
        *,
        into: Into,
        kind: str = "capture",
        flush_every: int = 64,
    ) -> Any:
        """Put `fn(item)` into a store or journal under each item's key, once.

        Args:
            name: of the stage.
            items: (key, item) pairs; those whose key is in `into` are passed over.
            fn: one item to its value.
            into: where results go; it makes resuming possible, whatever the order.
            kind: of the stage.
            flush_every: items between flushes.

        Returns:
            `into`.
        """
        stage = self.stage(name, kind, elsewhere=True)
        with self._open(stage, False):
            # A store in the cache may have lost records since the stage was finished.
            if not stage.finished or not getattr(into, "complete", True):
                stage.begin()
                done = 0
                for key, item in items:
                    if key not in into:
                        into.put(key, fn(item))
                        done += 1
                        if done % flush_every == 0 or self.stop.asked is not None:
                            into.flush()
                            stage.leave_if_asked()
                into.flush()
                stage.figures["items"] = done
                stage.finish({})
            else:
                stage.result()
        self._done(stage)
        return into

    def budgeted(self, budget: Any) -> Job:
        """This job with another budget, for a training that has its own."""
        other = self.child()
        other.recipe = self.recipe.model_copy(update={"budget": budget})
        return other

    def child(self, *path: Name) -> Job:
        """A job of its own within this one: expert i, client k, round r, fresh network j."""
        return Job(
            self.recipe,
            self.task,
            self.folder,
            seed=self.seed,
            hardware=self.hardware,
            log=self.log,
            models=self.models,
            cache=self.cache,
            path=(*self.path, *(str(p) for p in path)),
            stop=self.stop,
            family=self.family,
        )

    def fit(
        self,
        name: str,
        objective: Objective,
        data: Order,
        *,
        teacher: Teacher | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        optim: Factory | Mapping[str, Factory] | None = None,
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        gradient: Gradient | None = None,
        accumulate: int | None = None,
        clip: Clip | float | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
        validate_every: int | None = None,
        keep: Last | Best | Above | Each | None = None,
        ema: float | None = None,
        share: Mapping[str, Any] | None = None,
        kind: str = "train",
    ) -> Fit:
        """Train an objective: the loop with an optimiser.

        Whatever is not given comes from the recipe's budget. The objective is restored in
        place when done, in eval mode.

        Args:
            name: of the stage.
            objective: what is trained.
            data: what is read, in which order.
            teacher: asked for every batch.
            steps: number of steps; or `epochs`.
            epochs: number of epochs, may be a fraction.
            optim: a factory of an optimiser, or factories by glob of parameter names.
            schedule: of the learning rate, as a factor of it.
            gradient: how the gradients of terms are combined; their sum by default.
            accumulate: micro-batches of a step.
            clip: limits on the gradient; a number limits the whole norm.
            validate: gives the figures of the present state; the task's metrics on the
                validation split by default.
            validate_every: steps between validations.
            keep: which state is kept.
            ema: decay of an average of the student's weights, which then is what is kept.
            share: everything the result depends on; the stage then lies in the cache.
            kind: of the stage.

        Raises:
            RecipeError: the budget is missing or contradicts itself.
            TrainingError: a term is no longer finite.
        """
        from stillhouse.engine.fitting import run_fit

        return run_fit(
            self,
            name,
            objective,
            data,
            teacher=teacher,
            steps=steps,
            epochs=epochs,
            optim=optim,
            schedule=schedule,
            gradient=gradient,
            accumulate=accumulate,
            clip=clip,
            validate=validate,
            validate_every=validate_every,
            keep=keep,
            ema=ema,
            share=share,
            kind=kind,
        )

    # ---- judging ---------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, split: str | Source, batch: int | None = None
    ) -> dict[str, float]:
        """The task's figures of a model over a split, in eval mode under inference_mode.

        Args:
            model: a Net of the task.
            split: its name, or a source.
            batch: rows of a batch; the task's own number when not given.
        """
        metrics = self.task.metrics()

        def update(out: Output, batch: Batch) -> None:
            for metric in metrics.values():
                metric.update(out, batch)

        self.walk(model, split, update, batch)
        figures: dict[str, float] = {}
        for metric in metrics.values():
            if self.hardware.world > 1:
                metric.take(self.hardware.total(metric.totals().to(self.device)))
            figures.update(metric.compute())
        return figures

    def walk(
        self,
        model: nn.Module,
        split: str | Source,
        take: Callable[[Output, Batch], None],
        batch: int | None = None,
    ) -> None:
        """Hand the outputs of a model on a split to `take`, batch by batch, in order.

        Args:
            model: called in eval mode under inference_mode.
            split: its name, or a source; several processes share its rows.
            take: called with outputs and batch.
            batch: rows of a batch; the task's own number when not given.
        """
        source = self.splits[split] if isinstance(split, str) else split
        size = batch or self.task.evaluation_batch
        order = Shuffled(source, size, shuffle=False, augment=False, collate=self.task.collate)
        own = getattr(model, "view", "x")
        view = self.task.views()[0] if own == "x" else own
        with in_eval_mode(model), torch.inference_mode(), self.hardware.autocast():
            for rows in order.epoch(0, lambda: generator(0)):
                batch_of = self._own(order, rows)
                if batch_of is None:
                    continue
                take(model(batch_of.view(view)), batch_of)

    def _own(self, order: Order, rows: Any) -> Batch | None:
        world, rank = self.hardware.world, self.hardware.rank
        own = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        if len(own) == 0:
            return None
        return order.read(own, Views(0)).to(self.device)

    def judging(self) -> Job:
        """This job with the test split open; only the judge's caller makes one."""
        opened = self.child()
        opened.task = type(self.task)(self.splits.judging())
        return opened


class Family:
    """What all jobs of one run share.

    Args:
        redo: stages that are run again.

    Attributes:
        stages: those that have finished, in order.
        names: of all that were begun.
        profiled: trainings measure where a step's time goes.
    """

    def __init__(self, redo: Iterable[str] = ()) -> None:
        self.stages: list[dict[str, Any]] = []
        self.names: set[tuple[str, ...]] = set()
        self.redo = {_safe(name) for name in redo}
        self.profiled = False
        self._begun = False

    def redoes(self, name: str) -> bool:
        """Whether this stage, or one begun before it, is to be run again."""
        self._begun = self._begun or self.names_redo(name)
        return self._begun

    def names_redo(self, name: str) -> bool:
        """Whether this very stage was named."""
        return _safe(name) in self.redo


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a file lock; it goes with the process, however that ends.

    Raises:
        RunFolderError: another process holds it, and we do not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunFolderError(
                f"{path.parent} is in use by {holder}; wait for it, or choose another --folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


__all__ = [
    "Above",
    "Best",
    "Clip",
    "Each",
    "Fit",
    "Job",
    "Last",
    "locked",
    "read_state",
    "write_state",
]
