"""Distilling a data set by matching expert trajectories: what such methods share.

Experts, first set, matching, judging. A subclass says how experts are trained, what the set
begins with, and where on the trajectories it is matched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch.optim import SGD

from stillhouse.artifact import Artifact
from stillhouse.clock import Clock
from stillhouse.engine.job import Job
from stillhouse.engine.step import Factory, Gradient
from stillhouse.errors import RecipeError
from stillhouse.method import MethodConfig
from stillhouse.net import Net
from stillhouse.parts.augment import DSA
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.schedule import Schedule
from stillhouse.parts.trajectories import Trajectories
from stillhouse.parts.trajectory_matching import TrajectoryMatching
from stillhouse.parts.unroll import FlatNet
from stillhouse.stages.experts import (
    ExpertTraining,
    Training,
    expert_accuracies,
    open_trajectories,
    train_experts,
    training_rows,
)
from stillhouse.stages.fresh_nets import fresh_net, network_factory
from stillhouse.stages.initial_set import Init, RealImages
from stillhouse.stages.judge_distilled_set import Protocol
from stillhouse.stages.set_distillation import SetConfig, SetDistillation, distilled_of

Known = TypeVar("Known")

ITERATIONS = 5000
_FEW = 20  # iterations of a finished stage before a share of skipped ones says anything
_BUFFER = "released buffer scripts"


class TrajectoryConfig(SetConfig):
    """Settings of trajectory matching. Iterations are `budget.steps`, 5000 by default."""

    # Not the pixel learning rate: that of other losses is of another size.
    shared: ClassVar[frozenset[str]] = SetConfig.shared | {
        "experts", "expert_epochs", "expert_batch", "expert_lr", "expert_store", "experts_from",
        "span", "inner_steps", "batch_syn", "lr_init", "lr_lr", "momentum_lr", "lr_least",
        "align_corners", "memory", "experts_per_step", "evaluate_nets",
    }  # fmt: skip

    space: Literal["mean_std", "zca", "none"] = Field(
        "zca",
        description="network-input space, in which the synthetic images live",
        json_schema_extra={"source": "zca on CIFAR and Tiny-ImageNet in all released configs"},
    )
    experts: int = Field(
        100,
        ge=1,
        description="networks trained on the real data",
        json_schema_extra={"source": _BUFFER},
    )
    expert_epochs: int = Field(
        50,
        ge=1,
        description="epochs of each, with a snapshot after every one",
        json_schema_extra={"source": f"{_BUFFER}; DATM: 100"},
    )
    expert_batch: int = Field(
        256,
        ge=1,
        description="their batch; take 32-64 on a few thousand images, or they stay unfinished",
        json_schema_extra={"source": _BUFFER},
    )
    expert_lr: float = Field(
        0.01,
        gt=0,
        description="their learning rate (SGD without momentum or weight decay)",
        json_schema_extra={"source": _BUFFER},
    )
    expert_store: Literal["float32", "float16"] = Field(
        "float32",
        description="precision of the snapshots on disk; float16 takes half of it",
        json_schema_extra={"source": "released buffers: float32"},
    )
    experts_from: str | None = Field(
        None,
        description="folder of experts that exist already (snapshots of this library; see "
        "stages.experts.convert_released for replay buffers); none are trained then",
        json_schema_extra={"source": "released codes read a buffer folder"},
    )
    span: int = Field(
        2,
        ge=1,
        description="M, epochs of the expert that the student has to cover",
        json_schema_extra={"source": "released configs: 2 or 3"},
    )
    inner_steps: int = Field(
        20,
        ge=1,
        description="N, steps of the unrolled student",
        json_schema_extra={"source": "released configs, by set size"},
    )
    batch_syn: int = Field(
        0,
        ge=0,
        description="synthetic images of an inner step; 0: all",
        json_schema_extra={"source": "released configs, by set size"},
    )
    lr_init: float = Field(
        0.01,
        gt=0,
        description="learning rate of the student at the beginning; it is learned",
        json_schema_extra={"source": "released codes, lr_teacher"},
    )
    lr_img: float = Field(
        1000.0,
        gt=0,
        description="pixel learning rate",
        json_schema_extra={"source": "released configs, 50 to 10000"},
    )
    momentum_img: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="of the pixel SGD",
        json_schema_extra={"source": "released codes"},
    )
    lr_lr: float = Field(
        1e-5,
        ge=0,
        description="learning rate of the learning rate",
        json_schema_extra={"source": "released configs"},
    )
    momentum_lr: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="of its SGD",
        json_schema_extra={"source": "released codes"},
    )
    lr_least: float | None = Field(
        1e-4,
        gt=0,
        description="the learned learning rate is kept above it; none: it may become negative",
        json_schema_extra={"source": "house setting; released codes do not guard it"},
    )
    align_corners: bool = Field(
        True,
        description="of the augmentation's resampling",
        json_schema_extra={"source": "released codes of trajectory matching"},
    )
    memory: Literal["whole", "constant"] = Field(
        "whole",
        description="whole: through all inner steps; constant: one step at a time, an "
        "approximation (TESLA)",
        json_schema_extra={"source": "released DATM.py and DATM_tesla.py"},
    )
    experts_per_step: int = Field(
        1,
        ge=1,
        description="experts matched in an iteration, whose losses are averaged; several "
        "processes share them",
        json_schema_extra={"source": "released codes: 1"},
    )
    evaluate_nets: int = Field(
        1,
        ge=1,
        description="fresh networks per evaluation on validation data, every "
        "budget.validate_every iterations when that is given",
        json_schema_extra={"source": "released codes: 1 or 5 every 100 to 1000 iterations"},
    )

    def protocol(self) -> Protocol:
        """How the judge trains on a small set."""
        return replace(super().protocol(), align_corners=self.align_corners)

    def full_protocol(self) -> Protocol:
        """How the judge trains on the full data."""
        return replace(super().full_protocol(), align_corners=self.align_corners)


@dataclass(frozen=True)
class Window:
    """Where students begin, and for how long.

    Attributes:
        lowest: first epoch.
        upper: the epoch before which they begin, by the clock.
        steps: iterations.
        threshold: see `TrajectoryMatching`.
    """

    lowest: int
    upper: Schedule
    steps: int
    threshold: float | None = None


class TrajectoryDistillation(SetDistillation):
    """Base of methods that match trajectories. A subclass writes `window`, and what differs.

    Attributes:
        trajectories: of the experts, once `run` has opened them.
        real: the real images, likewise.
    """

    Config: ClassVar[type[MethodConfig]] = TrajectoryConfig

    def __init__(self, config: MethodConfig | None = None) -> None:
        super().__init__(config)
        self.trajectories: Trajectories | None = None
        self.real: RealImages | None = None

    # ---- what a subclass says --------------------------------------------------------------

    def window(self, steps: int) -> Window:
        """Where students begin, over so many iterations."""
        raise NotImplementedError(f"{type(self).__name__} does not define window")

    def expert_gradient(self) -> Gradient | None:
        """How an expert's gradient is made; the plain one by default."""
        return None

    def init(self) -> Init:
        """What the set begins with, when `start_set` is not overridden."""
        return "real"

    def start_set(self, job: Job, real: RealImages, trajectories: Trajectories) -> DistilledSet:
        """The set before matching: random real images with hard labels."""
        return self.initial_set(job, real, self.init())

    def optimizers(self, objective: TrajectoryMatching) -> dict[str, Any]:
        """A factory for each of what is learnt."""
        config = self.config
        return {
            "pixels": sgd(config.lr_img, config.momentum_img),
            "lr": sgd(config.lr_lr, config.momentum_lr),
        }

    # ---- the procedure ---------------------------------------------------------------------

    def run(self, job: Job) -> Artifact:
        """Experts; the first set; matching."""
        real, trajectories = self.opened(job)
        start = self.start_set(job, real, trajectories)
        distilled, told = self.matched(
            job, start, trajectories, self.window(job.budget.steps or ITERATIONS)
        )
        return self.artifact_of(job, distilled, **told, experts=self.experts_told(job))

    def opened(self, job: Job) -> tuple[RealImages, Trajectories]:
        """Real images and experts.

        Raises:
            RecipeError: pixels are not averaged here.
        """
        if job.budget.ema is not None:
            raise RecipeError("pixels are not averaged here: remove budget.ema")
        shape = FlatNet(fresh_net(job, 0))
        real = self.real_images(job)
        if self.config.experts_from:
            self.trajectories = open_trajectories(
                Path(self.config.experts_from).expanduser(), shape, device=job.device
            )
        else:
            files = self._train(job, real)
            self.trajectories = open_trajectories(files, shape, device=job.device)
        self.real = real
        return real, self.trajectories

    def _train(self, job: Job, real: RealImages) -> list[list[Path]]:
        config = self.config
        rows, rest = training_rows(job, real)
        protocol = Protocol(augment=config.augment, align_corners=config.align_corners)
        training = Training(
            config.experts,
            [(config.expert_epochs, sgd(config.expert_lr, 0.0))],
            batch=config.expert_batch,
            gradient=self.expert_gradient(),
        )
        return train_experts(
            job,
            lambda number: expert_net(job, number),
            rows,
            lambda net, first: ExpertTraining(net, protocol, rest, config.expert_store),
            training,
            self.expert_share(job),
        )

    def expert_share(self, job: Job) -> dict[str, Any] | None:
        """Everything an expert depends on beside its number."""
        share, config = self.share(job), self.config
        if share is None:
            return None
        names = (
            "space", "mean", "std", "augment", "align_corners", "expert_epochs", "expert_batch",
            "expert_lr", "expert_store",
        )  # fmt: skip
        return {
            **share,
            "what": "expert",
            "settings": {name: getattr(config, name) for name in names},
            "gradient": repr(self.expert_gradient()),
            "data": job.splits["train"].fingerprint,
            "seed": job.seed,
            "precision": job.hardware.precision,
        }

    def built(
        self, start: DistilledSet, trajectories: Trajectories, window: Window
    ) -> TrajectoryMatching:
        """The objective; its window is checked from the first to the last iteration."""
        config = self.config
        objective = TrajectoryMatching(
            start if start.lr is not None else start.replace(lr=config.lr_init),
            trajectories,
            span=config.span,
            steps=config.inner_steps,
            batch_syn=config.batch_syn,
            lowest=window.lowest,
            upper=window.upper,
            augment=DSA(config.augment, align_corners=config.align_corners),
            threshold=window.threshold,
            lr_least=config.lr_least,
            memory=config.memory,
            experts_per_step=config.experts_per_step,
        )
        for step in (0, window.steps - 1):
            objective.window(Clock(step=step, total=window.steps))
        return objective

    def matched(
        self, job: Job, start: DistilledSet, trajectories: Trajectories, window: Window
    ) -> tuple[DistilledSet, dict[str, Any]]:
        """The set after matching, as the stage "match", and what is told of it."""
        objective = self.built(start, trajectories, window)
        self.match(job, objective, window.steps, self.optimizers(objective))
        objective.refuse_standstill(_FEW)
        told = {
            "iterations": window.steps,
            "skipped": objective.skip_rate,
            "lr_clamped": int(objective.clamped),
        }
        return objective.distilled(), told

    # ---- what is told ----------------------------------------------------------------------

    def experts_told(self, job: Job) -> dict[str, Any]:
        """Experts on disk and in time; accuracy on validation data and steps by epoch."""
        trajectories = self._known(self.trajectories)
        made = [s for s in job.stages if s["name"].startswith("experts/expert-")]
        measured: dict[str, Any] = job.once("buffer", lambda: self._buffer(job), everywhere=True)
        return {
            "count": len(trajectories),
            "epochs": trajectories.epochs,
            "bytes": trajectories.bytes,
            "weights": trajectories.net.size,
            "seconds": round(sum(float(s["seconds"]) for s in made), 3),
            "from": self.config.experts_from,
            **measured,
        }

    def _buffer(self, job: Job) -> dict[str, Any]:
        trajectories = self._known(self.trajectories)
        span = self.config.span
        found: dict[str, Any] = {
            "steps": trajectories.steps(1).mean(0).tolist(),
            "span_steps": trajectories.steps(span).mean(0).tolist(),
        }
        if "val" in job.splits:
            epochs = range(trajectories.epochs + 1)
            found["accuracy"] = self.expert_accuracy(job, "val", epochs)
        return found

    def expert_accuracy(self, job: Job, split: str, epochs: Sequence[int]) -> list[float]:
        """Mean over the experts after each of some epochs, on a split."""
        trajectories = self._known(self.trajectories)
        space = self._known(self.real).preprocessing
        found = expert_accuracies(job, fresh_net(job, 0), trajectories, space, split, epochs)
        return torch.tensor(found, dtype=torch.float64).mean(0).tolist()

    def judge(self, job: Job, artifact: Artifact) -> dict[str, float]:
        """Beside the set's figures: the experts' own accuracy, and what became of the steps."""
        figures = super().judge(job, artifact)
        distilled = distilled_of(artifact)
        about = distilled.provenance
        if self.trajectories is not None:
            last = [self.trajectories.epochs]
            figures["expert_accuracy"] = self.expert_accuracy(job, "test", last)[0]
        figures["expert_bytes"] = float(about["experts"]["bytes"])
        figures["student_lr"] = float(distilled.lr or 0.0)
        if "skipped" in about:
            figures["skipped"] = float(about["skipped"])
        return figures

    def details(self, job: Job, artifact: Artifact) -> dict[str, Any]:
        """Beside the pictures: the experts by epoch, their disk and time, the iterations."""
        found = super().details(job, artifact)
        about = distilled_of(artifact).provenance
        experts = about["experts"]
        found.setdefault("tables", []).append(_experts_table(experts, self.config.span))
        found["texts"].append(_experts_text(experts, about))
        return found

    def _known(self, value: Known | None) -> Known:
        if value is None:
            raise RecipeError(f"the experts of '{self.card.id}' are opened by its run")
        return value


def _experts_table(experts: Mapping[str, Any], span: int) -> dict[str, Any]:
    def at(name: str, epoch: int) -> Any:
        values = experts.get(name, [])
        return f"{values[epoch]:.4g}" if epoch < len(values) else ""

    return {
        "title": "The experts, mean by epoch",
        "columns": [
            "epoch",
            "accuracy (validation)",
            "step to the next epoch",
            f"step over {span} epochs",
        ],
        "rows": [
            [str(epoch), at("accuracy", epoch), at("steps", epoch), at("span_steps", epoch)]
            for epoch in range(experts["epochs"] + 1)
        ],
    }


def _experts_text(experts: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    origin = experts["from"]
    told = (
        f"{experts['count']} experts of {experts['weights']} weights, {experts['epochs']} epochs, "
        f"{experts['bytes'] / 1e6:.1f} MB on disk, "
        + (f"read from {origin}." if origin else f"{experts['seconds']:.0f} s of training.")
    )
    if "iterations" in about:
        told += (
            f" {about['iterations']} iterations, of which {100 * about['skipped']:.1f} % ended "
            "above the threshold and changed nothing; the learning rate was stopped at its least "
            f"value {about['lr_clamped']} times."
        )
    return {"title": "What the experts cost", "text": told}


def expert_net(job: Job, number: int) -> Net:
    """Expert number i, freshly initialised; never a network that a set is judged on."""
    make = network_factory(job)
    return Net(job.build(make, "expert", number))


def sgd(lr: float, momentum: float) -> Factory:
    """A factory of SGD without weight decay."""
    return lambda params: SGD(params, lr=lr, momentum=momentum)
