"""`Job.fit`: from a budget to a training on the one loop, with validation and selection."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from stillhouse.artifact import plain_state
from stillhouse.batch import Order
from stillhouse.clock import Clock
from stillhouse.engine import sharding
from stillhouse.engine.checkpoint import read_state, write_state
from stillhouse.engine.job import Above, Best, Each, Fit, Job, Last
from stillhouse.engine.loop import Stage, loop
from stillhouse.engine.profile import StepProfile
from stillhouse.engine.step import Clip, Factory, Schedule, Training
from stillhouse.errors import RecipeError, nearest
from stillhouse.objective import Objective
from stillhouse.parts import schedule as schedules
from stillhouse.teacher import Teacher, to_device


def optimizer_of(budget: Any) -> Factory:
    """The optimiser that a budget names.

    Raises:
        RecipeError: an unknown name.
    """

    def make(params: Iterable[nn.Parameter]) -> Optimizer:
        params, lr, decay = list(params), budget.lr, budget.weight_decay
        # Nothing else is passed where one kernel does not pay, so that small models keep every bit.
        one = {"fused": True} if _worth_fusing(params) else {}
        if budget.optimizer == "sgd":
            return SGD(
                params,
                lr=lr,
                momentum=budget.momentum,
                nesterov=budget.nesterov,
                weight_decay=decay,
            )
        if budget.optimizer == "adam":
            return Adam(params, lr=lr, betas=(budget.momentum, 0.999), weight_decay=decay, **one)
        if budget.optimizer == "adamw":
            return AdamW(params, lr=lr, betas=(budget.momentum, 0.999), weight_decay=decay, **one)
        known = ("sgd", "adam", "adamw")
        raise RecipeError(
            f"unknown optimizer '{budget.optimizer}'{nearest(budget.optimizer, known)}"
        )

    return make


_FUSED_FROM = 1 << 20  # numbers: below, Adam's dozen passes stay in the cache


def _worth_fusing(params: list[nn.Parameter]) -> bool:
    """Plain float32 parameters on the CPU, more than its caches hold: one pass, not a dozen."""
    plain = all(
        p.device.type == "cpu" and p.dtype == torch.float32 and type(p.data) is torch.Tensor
        for p in params
    )
    return plain and sum(p.numel() for p in params) >= _FUSED_FROM


def schedule_of(budget: Any) -> Schedule:
    """The schedule that a budget names, with its warm-up.

    Raises:
        RecipeError: an unknown name.
    """
    kinds: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: schedules.constant(1.0),
        "cosine": lambda: schedules.cosine(1.0, 0.0),
        "linear": lambda: schedules.linear(1.0, 0.0),
        "step": lambda: schedules.steps(
            budget.milestones, budget.gamma, "step" if budget.epochs is None else "epoch"
        ),
    }
    if budget.schedule not in kinds:
        raise RecipeError(f"unknown schedule '{budget.schedule}'{nearest(budget.schedule, kinds)}")
    return schedules.warmed_up(kinds[budget.schedule](), budget.warmup)


def steps_of(order: Order, steps: int | None, epochs: float | None, budget: Any) -> int:
    """How many steps a training makes.

    Raises:
        RecipeError: neither steps nor epochs are given, or they come to nothing.
    """
    if steps is None and epochs is None and budget is not None:
        steps, epochs = budget.steps, budget.epochs
    if steps is None:
        if epochs is None:
            raise RecipeError("the budget names neither steps nor epochs")
        # Where epochs differ in length, the order says how many steps they are.
        steps_in = getattr(order, "steps_in", lambda epochs: round(epochs * len(order)))
        steps = int(steps_in(epochs))
    if steps < 1:
        raise RecipeError(f"the budget comes to {steps} steps")
    return steps


class _Selection:
    """Validation at its times, and the state that is kept by it; saved with the training."""

    def __init__(
        self,
        job: Job,
        training: Training,
        stage: Stage,
        validate: Callable[[], dict[str, float]] | None,
        every: int | None,
        keep: Last | Best | Above | Each,
        total: int,
    ) -> None:
        self.job, self.training, self.stage, self.keep = job, training, stage, keep
        self.validate, self.every, self.total = validate, every, total
        self.scores: dict[str, float] = {}
        self.best: float | None = None
        self.best_step = 0
        self.snapshots: list[str] = []
        self.stopped = ""
        self.done = self.below = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "training": self.training.state_dict(),
            "scores": self.scores,
            "best": self.best,
            "best_step": self.best_step,
            "snapshots": self.snapshots,
            "stopped": self.stopped,
            "done": self.done,
            "below": self.below,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints of before trainings could end early do not hold these three.
        self.stopped, self.done = state.get("stopped", ""), state.get("done", 0)
        self.below = state.get("below", 0)
        self.training.load_state_dict(state["training"])
        self.scores, self.best = state["scores"], state["best"]
        self.best_step, self.snapshots = state["best_step"], state["snapshots"]

    def __call__(self, _: Any, clock: Clock) -> None:
        if isinstance(self.keep, Each) and clock.step == 0:
            self._snapshot(0)
        if isinstance(self.keep, Above) and clock.step == 0:
            self._write_kept()
        self.training(None, clock)
        self.done = done = clock.step + 1
        ends = isinstance(self.keep, Each) and clock.ends_epoch
        if ends and clock.epoch % self.keep.epochs == 0:  # type: ignore[union-attr]
            self._snapshot(clock.epoch)
        if self.every and (done % self.every == 0 or done == self.total):
            self._validate(clock, done)

    def _snapshot(self, epoch: int) -> None:
        path = self.stage.folder / "snapshots" / f"epoch-{epoch:06d}.state"
        export = self.training.objective.export()
        state = sharding.full_state(export) if self.training.sharded else plain_state(export)
        if self.job.hardware.is_main:
            write_state(path, state)
        self.snapshots = [s for s in self.snapshots if s != path.name] + [path.name]

    def _validate(self, clock: Clock, done: int) -> None:
        training = self.training
        training.check_finite()
        objective = training.objective
        average_statistics(objective, self.job)
        with _averaged(training):
            scores = self.validate() if self.validate else self._default()
        objective.train()
        self.stage.log.validation(self.stage.label, done, scores)
        objective.after_validation(scores, clock)
        if not isinstance(self.keep, (Best, Above)):
            self.scores = scores
            return
        metric = self.keep.metric or self.job.task.main_metric
        if metric not in scores:
            raise RecipeError(
                f"the best state is chosen by '{metric}', which validation does not give"
                f"{nearest(metric, scores)}"
            )
        sign = 1.0 if self.job.task.higher_is_better else -1.0
        if isinstance(self.keep, Above):
            better = sign * scores[metric] >= sign * self.keep.least
            self.below = 0 if better else self.below + 1
            if self.below >= self.keep.patience or (self.below and done == self.total):
                self.stopped = (
                    f"{metric} {scores[metric]:.4g} at step {done} is beyond the floor of "
                    f"{self.keep.least:.4g}; the state of step {self.best_step} is kept"
                )
                self.job.log.write("warning", text=f"{self.stage.label}: {self.stopped}")
        else:
            better = self._is_better(sign * scores[metric], done)
        if better:
            self.best, self.best_step, self.scores = scores[metric], done, scores
            self._write_kept()

    def _is_better(self, figure: float, done: int) -> bool:
        """Whether a state is the best so far; ends a training that waits too long for one."""
        keep = self.keep
        assert isinstance(keep, Best)
        higher = self.job.task.higher_is_better
        best = None if self.best is None else self.best if higher else -self.best
        reached = best is None or figure >= best
        self.below = 0 if reached else self.below + 1
        if keep.patience is not None and self.below >= keep.patience and done < self.total:
            self.stopped = (
                f"no validation in {keep.patience} reached the best figure; the state of step "
                f"{self.best_step} is kept"
            )
            self.job.log.write("stopped", stage=self.stage.label, text=self.stopped)
        return best is None or figure > best or (keep.latest and reached)

    def _write_kept(self) -> None:
        with _averaged(self.training):
            state = self.training.objective_state()
        if self.job.hardware.is_main:
            write_state(self._best_path, state)

    @property
    def _best_path(self) -> Path:
        return self.stage.folder / "best.state"

    def _default(self) -> dict[str, float]:
        split = self.keep.split if isinstance(self.keep, (Best, Above)) else "val"
        return self.job.evaluate(self.training.objective.export(), split)

    def final(self) -> dict[str, Any]:
        """The state that is kept, and what `Fit` tells."""
        objective = self.training.objective
        average_statistics(objective, self.job)
        if self.stopped or (isinstance(self.keep, Best) and self.best is not None):
            self.job.hardware.barrier()
            kept = read_state(self._best_path)
        else:
            self.best_step = self.done
            with _averaged(self.training):
                kept = {k: v.detach().clone() for k, v in self.training.objective_state().items()}
        return {
            "objective": kept,
            "scores": self.scores,
            "best_step": self.best_step,
            "snapshots": self.snapshots,
            "stopped": self.stopped,
            "steps": self.done,
        }


class _averaged:  # noqa: N801 - reads as a phrase: `with _averaged(training)`
    """Inside the block the student holds its averaged weights, when an average is kept."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.saved: dict[str, Any] | None = None

    def __enter__(self) -> None:
        if self.training.ema is not None:
            student = self.training.objective.student
            self.saved = {k: v.detach().clone() for k, v in student.state_dict().items()}
            student.load_state_dict(self.training.ema)

    def __exit__(self, *_: object) -> None:
        if self.saved is not None:
            self.training.objective.student.load_state_dict(self.saved)


def average_statistics(module: nn.Module, job: Job) -> None:
    """Average the running statistics of normalisation layers over processes."""
    if job.hardware.world == 1:
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for buffer in (layer.running_mean, layer.running_var):
                if buffer is not None:
                    job.hardware.total(buffer).div_(job.hardware.world)


def run_fit(job: Job, name: str, objective: Objective, data: Order, **given: Any) -> Fit:
    """See `Job.fit`."""
    budget = job.budget
    share, keep = given["share"], given["keep"] or _keep_of(budget)
    total = steps_of(data, given["steps"], given["epochs"], budget)
    validate_every = given["validate_every"]
    wanted = isinstance(keep, (Best, Above)) or getattr(budget, "validate_every", None)
    if validate_every is None and wanted:
        validate_every = _validation_steps(budget, len(data), total)
    if isinstance(keep, (Best, Above)) and "val" not in job.splits and given["validate"] is None:
        what = "select: best" if isinstance(keep, Best) else "a floor on a figure"
        raise RecipeError(f"{what} needs a validation split; add data.options.val")
    stamp = {
        "steps": total,
        "data": getattr(data.source, "fingerprint", "none"),
        "teacher": getattr(given["teacher"], "fingerprint", "none"),
        "shapes": _shapes(objective),
    }
    stage = job.stage(name, given["kind"], stamp=stamp, share=share)
    objective.to(job.device)
    rng_state = torch.get_rng_state()
    try:
        with job._open(stage, share is not None):
            if stage.finished:
                result = stage.result()
            else:
                result = _train(
                    job, stage, name, objective, data, given, keep, total, validate_every
                )
    finally:
        torch.set_rng_state(rng_state)
    objective.load_state_dict(result["objective"])
    objective.eval()
    job._done(stage)
    return Fit(
        # Shared results of before trainings could end early do not hold these two.
        steps=result.get("steps", total),
        stopped=result.get("stopped", ""),
        scores=result["scores"],
        best_step=result["best_step"],
        snapshots=[stage.folder / "snapshots" / s for s in result["snapshots"]],
        seconds=stage.seconds,
        teacher_seconds=float(stage.figures.get("teacher_seconds", 0.0)),
    )


def _validation_steps(budget: Any, epoch: int, total: int) -> int:
    """Steps between validations: the budget counts in epochs or in steps."""
    if budget.validate_every:
        return int(budget.validate_every) * (1 if budget.epochs is None else epoch)
    return max(1, total // 10) if budget.epochs is None else max(1, epoch)


def _train(
    job: Job,
    stage: Stage,
    name: str,
    objective: Objective,
    data: Order,
    given: Mapping[str, Any],
    keep: Last | Best | Above | Each,
    total: int,
    validate_every: int | None,
) -> dict[str, Any]:
    budget, teacher = job.budget, given["teacher"]
    if job.hardware.strategy == "fsdp" and job.hardware.world > 1:
        objective = sharding.sharded(objective, job.hardware)
    _warn_about_statistics(job, objective)
    _bind(teacher, objective, job, data)
    objective.train()
    clock = job.clock(name)
    output = getattr(job.recipe, "output", None)
    hardware_spec = getattr(job.recipe, "hardware", None)
    training = Training(
        objective,
        data,
        teacher=teacher,
        optim=given["optim"] or optimizer_of(budget),
        schedule=given["schedule"] or (schedule_of(budget) if budget is not None else None),
        gradient=given["gradient"],
        accumulate=given["accumulate"] or getattr(budget, "accumulate", 1),
        clip=_clip_of(given["clip"], budget),
        hardware=job.hardware,
        log=job.log,
        stage=stage.label,
        clock=clock,
        log_every=getattr(output, "log_every", 50),
        ema=given["ema"] if given["ema"] is not None else getattr(budget, "ema", None),
        prefetch=getattr(hardware_spec, "workers", 0),
        profile=StepProfile(job.device) if job.family.profiled else None,
    )
    state = _Selection(job, training, stage, given["validate"], validate_every, keep, total)
    stage.begin()
    began = time.monotonic()
    try:
        loop(
            stage,
            state,
            state,
            total,
            clock,
            figures=training.figures,
            before_save=training.check_finite,
            ended=lambda: bool(state.stopped),
        )
    finally:
        training.close()
    stage.figures.update(
        steps=state.done or total,
        teacher_seconds=round(training.teacher_time(), 4),
        path=job.hardware.path,
        loop_seconds=round(time.monotonic() - began, 4),
    )
    if training.profile is not None:
        stage.figures["profile"] = training.profile.figures()
    result: dict[str, Any] = stage.finish(state.final())
    return result


def _bind(teacher: Teacher | None, objective: Objective, job: Job, data: Order) -> None:
    if teacher is not None:
        teacher.bind(objective.wants, job.task)
        reads = getattr(teacher, "reads", None)
        if reads is not None:
            reads(data, job.views().seed)
        to_device(teacher, job.device)
    for guest in objective.guests():
        guest.to(job.device)


def _warn_about_statistics(job: Job, objective: Objective) -> None:
    if job.hardware.world == 1:
        return
    kinds = nn.modules.batchnorm._BatchNorm
    if any(isinstance(m, kinds) for m in objective.modules()):
        job.log.write(
            "warning",
            text="BatchNorm sees only this process's rows, so several processes do not equal one; "
            "on GPUs convert with torch.nn.SyncBatchNorm.convert_sync_batchnorm",
        )


def _keep_of(budget: Any) -> Last | Best:
    select = getattr(budget, "select", "last")
    if select != "last":
        return Best(
            metric=getattr(budget, "metric", None) or "",
            latest=select == "latest-best",
            patience=getattr(budget, "patience", None),
        )
    return Last()


def _clip_of(clip: Clip | float | None, budget: Any) -> Clip | None:
    if clip is None:
        clip = getattr(budget, "clip", None)
    return Clip(norm=float(clip)) if isinstance(clip, (int, float)) else clip


def _shapes(objective: Objective) -> str:
    import hashlib

    entries = itertools.chain(objective.named_parameters(), objective.named_buffers())
    text = ";".join(f"{name}{tuple(value.shape)}" for name, value in entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
