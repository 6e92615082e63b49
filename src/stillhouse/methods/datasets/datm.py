r"""DATM: difficulty-aligned trajectory matching (Guo et al., ICLR 2024).

Which part of an expert's training is matched decides what a set can hold: early epochs teach easy
patterns, late ones hard ones. So students begin only inside a window of epochs that fits the
number of images, and its upper bound grows while the set learns:

.. math::
    U(it) = \min(T_0 + \lfloor (T^+ - T_0)\, it / T_{end} \rfloor, T^+),
    \quad s \sim \mathrm{randint}[T^-, U)

From :math:`\theta_0 = \theta^*_s` the student makes N steps of SGD on chunks of the set with soft
labels, :math:`\theta_{n+1} = \theta_n - \eta \nabla L(\theta_n)`,
:math:`L = -\frac1B \sum_b \sum_k \mathrm{softmax}(Y_b)_k \log\mathrm{softmax}(z_b)_k`, and

.. math::
    \mathcal L = \|\theta_N - \theta^*_{s+M}\|^2 / \|\theta^*_s - \theta^*_{s+M}\|^2

goes back through all of them to pixels, label LOGITS Y and :math:`\eta`. An iteration with a loss
above the threshold changes nothing. The experts are flat ones (GSAM, as in FTD). The set begins
with real images that an expert classifies correctly; their labels are the mean logits of the
experts that are right about the image.

Released code and this file: `ema_decay` stands in every released config and is not used by it,
nor here. Where no expert is right about an image the released labels are 0/0; here they are the
plain mean, moved along the true class until that leads by 1. The learning rate is kept above
`lr_least` (not guarded in the released code: variant "official"). A run that skips more than 90 %
of its iterations fails. The released code seeds every run with 0, so all begin with one selection;
here it follows the seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job
from stillhouse.engine.step import Gradient
from stillhouse.errors import DataError
from stillhouse.method import Card, Claim, Variant
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.gradient import Sharpness
from stillhouse.parts.schedule import constant, window
from stillhouse.parts.trajectories import Trajectories
from stillhouse.parts.trajectory_matching import TrajectoryMatching
from stillhouse.stages.fresh_nets import fresh_net
from stillhouse.stages.initial_set import RealImages, class_names, set_of
from stillhouse.stages.judge_distilled_set import Label, accuracies
from stillhouse.stages.set_distillation import distilled_of
from stillhouse.stages.trajectory_distillation import (
    TrajectoryConfig,
    TrajectoryDistillation,
    Window,
    sgd,
)
from stillhouse.stages.tune import best_of

ITERATIONS = 10_000
_BLOCK = 512  # images in the network at a time


def picked_correctly(correct: Iterable[Tensor], count: int) -> Tensor:
    """The first `count` images that an expert classifies correctly.

    The walk goes through the images once with the first expert; when too few are right it begins
    again with the next and adds what was not chosen yet. Where all experts together are right
    about too few, the walk takes what is left (our choice; the released loop does not end).

    Args:
        correct: for each expert (n,) flags in the order of the walk; consumed as needed.
        count: how many to pick.

    Returns:
        (count,) int64 positions in the walk, ascending.

    Raises:
        DataError: fewer images than asked for.
    """
    chosen: set[int] = set()
    size = 0
    for flags in correct:
        size = len(flags)
        for position in flags.nonzero().flatten().tolist():
            if len(chosen) < count:
                chosen.add(position)
        if len(chosen) == count:
            break
    left = iter(position for position in range(size) if position not in chosen)
    while len(chosen) < count:
        position = next(left, None)
        if position is None:
            raise DataError(f"a class has {size} real images; {count} per class were asked for")
        chosen.add(position)
    return torch.tensor(sorted(chosen))


def averaged_labels(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Label logits: the mean over the experts that classify the image correctly.

    Args:
        expert_logits: (E, n, K).
        labels: (n,) true classes.

    Returns:
        (n, K). Where no expert is right: the mean over all, plus as much of the true class as
        makes it lead by 1.
    """
    right = (expert_logits.argmax(-1) == labels).to(expert_logits.dtype)
    votes = right.sum(0)
    mean = (right[..., None] * expert_logits).sum(0) / votes.clamp_min(1.0)[:, None]
    plain = expert_logits.mean(0)
    own = plain.gather(1, labels[:, None])
    lead = plain.amax(1, keepdim=True) - own + 1.0
    moved = plain + lead * F.one_hot(labels, plain.shape[1]).to(plain.dtype)
    return torch.where(votes[:, None] > 0, mean, moved)


class DATM(TrajectoryDistillation):
    """Trajectories are matched where their difficulty fits the size of the set."""

    card = Card(
        id="datm",
        title="Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching",
        summary="A tiny data set with learned soft labels that trains a network along those parts "
        "of expert trajectories whose difficulty fits its size.",
        paper="ICLR 2024; arXiv 2310.05773",
        year=2024,
        authors=(
            "Ziyao Guo",
            "Kai Wang",
            "George Cazenavette",
            "Hui Li",
            "Kaipeng Zhang",
            "Yang You",
        ),
        links=(
            "https://arxiv.org/abs/2310.05773",
            "https://github.com/NUS-HPC-AI-Lab/DATM",
        ),
        room="datasets",
        yields="dataset",
        stages=(
            ("whitening?", "closed"),
            ("moments?", "closed"),
            ("experts?", "train"),
            ("selected?", "closed"),
            ("initial images?", "closed"),
            ("labels?", "closed"),
            ("scan?", "synthesis"),
            ("match?", "synthesis"),
            ("buffer", "closed"),
            ("judge", "judge"),
        ),
    )

    class Config(TrajectoryConfig):
        """Settings of `datm`; defaults are those released for CIFAR-10 with 10 images per class.

        The number of iterations is `budget.steps`, 10,000 by default.
        """

        expert_epochs: int = Field(
            100,
            ge=1,
            description="epochs of each expert, with a snapshot after every one",
            json_schema_extra={"source": "released README: twice those of MTT"},
        )
        rho: float = Field(
            0.01,
            ge=0,
            description="perturbation of the flat experts; 0: plain SGD experts",
            json_schema_extra={"source": "FTD, run_buffer.sh"},
        )
        alpha: float = Field(
            0.3,
            description="weight of the flat experts' orthogonal component",
            json_schema_extra={"source": "FTD, table 7"},
        )
        adaptive: bool = Field(
            True,
            description="perturbation relative to the size of each weight",
            json_schema_extra={"source": "FTD, released code"},
        )
        init: Literal["correct", "real"] = Field(
            "correct",
            description="first images: real ones that an expert classifies correctly, or random",
            json_schema_extra={"source": "released configs; real for CIFAR-100 with 50"},
        )
        labels: Literal["soft", "hard"] = Field(
            "soft",
            description="soft: logits from the experts, learned with the pixels",
            json_schema_extra={"source": "paper"},
        )
        lr_y: float = Field(
            2.0,
            ge=0,
            description="learning rate of the label logits",
            json_schema_extra={"source": "released configs, 2 to 10"},
        )
        momentum_y: float = Field(
            0.9,
            ge=0,
            lt=1,
            description="of their SGD",
            json_schema_extra={"source": "released configs"},
        )
        inner_steps: int = Field(
            80,
            ge=1,
            description="N, steps of the unrolled student",
            json_schema_extra={"source": "released config"},
        )
        batch_syn: int = Field(
            100,
            ge=0,
            description="synthetic images of an inner step; 0: all",
            json_schema_extra={"source": "released config"},
        )
        lr_img: float = Field(
            100.0,
            gt=0,
            description="pixel learning rate",
            json_schema_extra={"source": "released configs, 50 to 10000"},
        )
        threshold: float | None = Field(
            1.0,
            gt=0,
            description="an iteration whose loss lies above it changes nothing; none: all count",
            json_schema_extra={"source": "released configs; 1.1 for CIFAR-10 with 1"},
        )
        min_start: int = Field(
            0,
            ge=0,
            description="T-, first epoch that students begin at",
            json_schema_extra={"source": "released configs"},
        )
        max_start: int = Field(
            20,
            ge=1,
            description="T+, students begin before this epoch",
            json_schema_extra={"source": "released configs"},
        )
        sequential: bool = Field(
            True,
            description="let the upper bound grow from grow_from to max_start",
            json_schema_extra={"source": "released configs; off for large sets"},
        )
        grow_from: int = Field(
            10,
            ge=1,
            description="T0, the upper bound at the beginning",
            json_schema_extra={"source": "released configs, current_max_start_epoch"},
        )
        grow_until: int = Field(
            1000,
            ge=1,
            description="T_end, the iteration at which the upper bound has grown to max_start",
            json_schema_extra={"source": "released configs, expansion_end_epoch"},
        )
        matching: bool = Field(
            True,
            description="false: the selected images with the experts' labels are the result, which "
            "is what matching must improve on",
            json_schema_extra={"source": "control; DD-Ranking"},
        )
        window: Literal["given", "auto"] = Field(
            "given",
            description="auto: the window among `windows` with the best validation accuracy",
            json_schema_extra={"source": "house procedure for the paper's difficulty study"},
        )
        windows: list[list[int]] = Field(
            default_factory=list,
            description="[first, end) of each window that auto tries; none: three equal parts",
            json_schema_extra={"source": "house procedure for the paper's difficulty study"},
        )
        scan_steps: int | None = Field(
            None,
            ge=1,
            description="iterations per window that is tried; none: half of all",
            json_schema_extra={"source": "house setting"},
        )
        scan_nets: int = Field(
            2,
            ge=1,
            description="fresh networks per window that is tried",
            json_schema_extra={"source": "house setting"},
        )
        judge_batch: int = Field(
            128,
            ge=1,
            description="batch of the judge's trainings",
            json_schema_extra={"source": "released configs, batch_train"},
        )

        @model_validator(mode="after")
        def _window_is_one(self) -> DATM.Config:
            bound = self.grow_from if self.sequential else self.max_start
            if not self.min_start < min(bound, self.max_start):
                which = "grow_from" if self.sequential else "max_start"
                raise ValueError(
                    f"{which} ({bound}) and max_start ({self.max_start}) must exceed min_start "
                    f"({self.min_start}): students begin in [min_start, {which})"
                )
            last = self.max_start - 1 + self.span
            if self.window == "given" and not self.experts_from and last > self.expert_epochs:
                raise ValueError(
                    f"max_start {self.max_start} with span {self.span} ends at epoch {last}, the "
                    f"experts at {self.expert_epochs}: max_start may be "
                    f"{self.expert_epochs - self.span + 1} at most"
                )
            if any(len(w) != 2 or not 0 <= w[0] < w[1] for w in self.windows):
                raise ValueError(f"windows are pairs [first, end) with first < end: {self.windows}")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={"ipc": 10, "lr_least": None, "judge_nets": 1},
            budget={"steps": 10000},
            about="the released run of CIFAR-10 with 10 images per class; one network judges",
        ),
        "cifar10-ipc1": Variant(
            set={
                "ipc": 1,
                "inner_steps": 80,
                "sequential": False,
                "max_start": 4,
                "lr_img": 100.0,
                "lr_y": 5.0,
                "batch_syn": 10,
                "lr_lr": 1e-7,
                "threshold": 1.1,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar10-ipc50": Variant(
            set={
                "ipc": 50,
                "grow_from": 20,
                "max_start": 40,
                "grow_until": 2000,
                "lr_img": 1000.0,
                "lr_y": 2.0,
                "batch_syn": 500,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar10-ipc500": Variant(
            set={
                "ipc": 500,
                "inner_steps": 40,
                "sequential": False,
                "min_start": 40,
                "max_start": 60,
                "lr_img": 50.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar10-ipc1000": Variant(
            set={
                "ipc": 1000,
                "inner_steps": 100,
                "sequential": False,
                "min_start": 40,
                "max_start": 60,
                "lr_img": 50.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar100-ipc1": Variant(
            set={
                "ipc": 1,
                "inner_steps": 40,
                "span": 3,
                "lr_img": 1000.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar100-ipc10": Variant(
            set={
                "ipc": 10,
                "grow_from": 30,
                "max_start": 50,
                "grow_until": 2000,
                "lr_img": 1000.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar100-ipc50": Variant(
            set={
                "ipc": 50,
                "sequential": False,
                "min_start": 20,
                "max_start": 70,
                "lr_img": 1000.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
                "init": "real",
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "cifar100-ipc100": Variant(
            set={
                "ipc": 100,
                "sequential": False,
                "min_start": 30,
                "max_start": 70,
                "lr_img": 50.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
            },
            budget={"steps": 10000},
            about="released setting",
        ),
        "tiny-ipc1": Variant(
            set={
                "ipc": 1,
                "inner_steps": 40,
                "grow_from": 15,
                "max_start": 20,
                "grow_until": 2000,
                "lr_img": 10000.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
                "lr_lr": 1e-4,
            },
            budget={"steps": 10000},
            about="released setting, Tiny-ImageNet with a ConvNet of depth 4",
        ),
        "tiny-ipc10": Variant(
            set={
                "ipc": 10,
                "inner_steps": 40,
                "sequential": False,
                "min_start": 10,
                "max_start": 50,
                "lr_img": 100.0,
                "lr_y": 10.0,
                "batch_syn": 500,
                "lr_lr": 1e-4,
            },
            budget={"steps": 10000},
            about="released setting, Tiny-ImageNet with a ConvNet of depth 4",
        ),
        "tiny-ipc50": Variant(
            set={
                "ipc": 50,
                "inner_steps": 20,
                "sequential": False,
                "min_start": 40,
                "max_start": 70,
                "lr_img": 100.0,
                "lr_y": 10.0,
                "batch_syn": 1000,
                "lr_lr": 1e-4,
            },
            budget={"steps": 10000},
            about="released setting, Tiny-ImageNet with a ConvNet of depth 4",
        ),
        "unmatched": Variant(
            set={"matching": False}, about="the selected images with the experts' soft labels"
        ),
        "hard-labels": Variant(set={"labels": "hard"}, about="without soft labels"),
        "all-at-once": Variant(set={"sequential": False}, about="the whole window from the start"),
        "random-start": Variant(set={"init": "real"}, about="random real images at the start"),
        "plain-experts": Variant(set={"rho": 0.0}, about="experts trained by plain SGD, as MTT"),
        "constant-memory": Variant(set={"memory": "constant"}, about="TESLA's gradients"),
        "auto": Variant(
            set={"window": "auto", "sequential": False},
            about="the best of three windows on validation data",
        ),
        # The difficulty study at the size of the demonstration: experts of 15 epochs; 50 images
        # per class are judged for about as many updates as 10.
        "early": Variant(
            set={"sequential": False, "min_start": 0, "max_start": 4}, about="epochs 0-3 only"
        ),
        "middle": Variant(
            set={"sequential": False, "min_start": 4, "max_start": 9}, about="epochs 4-8 only"
        ),
        "late": Variant(
            set={"sequential": False, "min_start": 9, "max_start": 14}, about="epochs 9-13 only"
        ),
        "ipc1-early": Variant(
            set={"ipc": 1, "sequential": False, "min_start": 0, "max_start": 4, "threshold": 1.1},
            about="1 image per class, epochs 0-3",
        ),
        "ipc1-late": Variant(
            set={"ipc": 1, "sequential": False, "min_start": 9, "max_start": 14, "threshold": 1.1},
            about="1 image per class, epochs 9-13",
        ),
        "ipc50-early": Variant(
            set={
                "ipc": 50,
                "sequential": False,
                "min_start": 0,
                "max_start": 4,
                "judge_epochs": 40,
            },
            about="50 images per class, epochs 0-3",
        ),
        "ipc50-late": Variant(
            set={
                "ipc": 50,
                "sequential": False,
                "min_start": 9,
                "max_start": 14,
                "judge_epochs": 40,
            },
            about="50 images per class, epochs 9-13",
        ),
        "ipc50-unmatched": Variant(
            set={"ipc": 50, "matching": False, "judge_epochs": 40},
            about="50 selected images per class, soft labels",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats trajectory matching without its changes", "accuracy", "datm", "mtt"),
        Claim("beats distribution matching", "accuracy", "datm", "dm"),
        Claim("beats random real images", "accuracy", "datm", "random-real"),
        Claim(
            "matching improves on the selected images with the experts' labels",
            "accuracy", "datm", "datm/unmatched",
        ),
        Claim("learned soft labels beat hard labels", "accuracy", "datm", "datm/hard-labels"),
        Claim(
            "1 image per class: early epochs beat late ones",
            "accuracy", "datm/ipc1-early", "datm/ipc1-late",
        ),
        Claim(
            "50 images per class: late epochs beat early ones",
            "accuracy", "datm/ipc50-late", "datm/ipc50-early",
        ),
        Claim(
            "50 images per class: matching late epochs improves on the selected images",
            "accuracy", "datm/ipc50-late", "datm/ipc50-unmatched",
        ),
    ]  # fmt: skip

    # ---- experts, first images, first labels -----------------------------------------------

    def expert_gradient(self) -> Gradient | None:
        """Sharpness-aware: flat experts."""
        config = self.config
        if config.rho == 0:
            return None
        return Sharpness(config.rho, config.alpha, config.adaptive)

    def start_set(self, job: Job, real: RealImages, trajectories: Trajectories) -> DistilledSet:
        """Images that experts classify correctly, and the mean of the right experts' logits."""
        config = self.config
        if config.init == "real":
            start = self.initial_set(job, real, "real")
        else:
            rows = job.once("selected", lambda: self._select(job, real, trajectories))
            names = class_names(job)
            start = set_of(real.take(rows), config.ipc, names, real.preprocessing)
        if config.labels == "soft":
            labels = job.once("labels", lambda: self._labels(start.images, start.labels))
            start = start.replace(label_logits=labels)
        return start

    def _select(self, job: Job, real: RealImages, trajectories: Trajectories) -> Tensor:
        # The walk is that by which random images are drawn, so what differs is the selection.
        rng = job.rng("initial images")
        chosen = []
        for label, rows in enumerate(real.rows):
            walk = rows[torch.randperm(len(rows), generator=rng)]
            images = real.take(walk)
            correct = (
                (self._expert_logits(expert, images).argmax(1) == label).cpu()
                for expert in range(len(trajectories))
            )
            chosen.append(walk[picked_correctly(correct, self.config.ipc)])
        return torch.cat(chosen)

    @torch.no_grad()
    def _expert_logits(self, expert: int, images: Tensor) -> Tensor:
        """Logits (n, K) of an expert at its end, without augmentation."""
        trajectories = self._known(self.trajectories)
        net = trajectories.net.at(trajectories.at(expert, trajectories.epochs))
        blocks = torch.split(images.to(trajectories.device), _BLOCK)
        return torch.cat([net(block)["logits"].float() for block in blocks])

    def _labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """Label logits (n, K) on the CPU of images whose classes are known.

        Random first images get those of the first expert, right or not, as released.
        """
        count = 1 if self.config.init == "real" else len(self._known(self.trajectories))
        logits = torch.stack([self._expert_logits(expert, images) for expert in range(count)])
        if self.config.init == "real":
            return logits[0].cpu()
        return averaged_labels(logits, labels.to(logits.device)).cpu()

    def label(self, job: Job, distilled: DistilledSet) -> Label | None:
        """Random real images of the judge get labels of the same experts."""
        if distilled.label_logits is None:
            return None
        labels = distilled.labels
        return lambda images: self._labels(images, labels)

    # ---- windows ---------------------------------------------------------------------------

    def window(self, steps: int) -> Window:
        """Fixed, or growing."""
        config = self.config
        upper = constant(config.max_start)
        if config.sequential:
            upper = window(config.grow_from, config.max_start, config.grow_until)
        return Window(config.min_start, upper, steps, config.threshold)

    def optimizers(self, objective: TrajectoryMatching) -> dict[str, Any]:
        """Pixels, learning rate, and label logits when they are learned."""
        found = super().optimizers(objective)
        if objective.label_logits is not None:
            found["label_logits"] = sgd(self.config.lr_y, self.config.momentum_y)
        return found

    def run(self, job: Job) -> Artifact:
        """Experts; images and labels by them; perhaps a scan of windows; matching."""
        config = self.config
        real, trajectories = self.opened(job)
        start = self.start_set(job, real, trajectories)
        told: dict[str, Any] = {}
        if not config.matching:
            distilled = start.replace(lr=config.lr_init)
        else:
            steps = job.budget.steps or ITERATIONS
            chosen = self.window(steps)
            if config.window == "auto":
                chosen, told = self.aligned(job, start, trajectories, steps)
            distilled, more = self.matched(job, start, trajectories, chosen)
            told |= more
        told["experts"] = self.experts_told(job)
        return self.artifact_of(job, distilled, **told)

    def aligned(
        self, job: Job, start: DistilledSet, trajectories: Trajectories, steps: int
    ) -> tuple[Window, dict[str, Any]]:
        """The window that fits the set: the difficulty study on validation data.

        The same few iterations in each window, each judged by fresh networks.
        """
        config = self.config
        windows = config.windows or _thirds(trajectories.epochs - config.span + 1)
        few = config.scan_steps or max(1, steps // 2)
        span_steps = trajectories.steps(config.span).mean(0)

        def measure(child: Job, number: float) -> float:
            low, high = windows[int(number)]
            trial = Window(low, constant(high), few, config.threshold)
            made, _ = self.matched(child, start, trajectories, trial)
            fresh = lambda net: fresh_net(job, net)  # noqa: E731
            found = accuracies(
                child, "judged", made, config.protocol(), fresh, nets=config.scan_nets, split="val"
            )
            return sum(found) / len(found)

        best, table = best_of(job, "scan", [float(i) for i in range(len(windows))], measure)
        rows = [
            {
                "window": list(pair),
                "measure": row["measure"],
                "step": float(span_steps[pair[0] : pair[1]].mean()),
            }
            for pair, row in zip(windows, table, strict=True)
        ]
        low, high = windows[int(best)]
        chosen = Window(low, constant(high), steps, config.threshold)
        return chosen, {"windows": rows, "chosen": [low, high]}

    # ---- what is told ----------------------------------------------------------------------

    def judge(self, job: Job, artifact: Artifact) -> dict[str, float]:
        """Beside the figures of every set: how soft the labels are, and whether they hold."""
        figures = super().judge(job, artifact)
        distilled = distilled_of(artifact)
        if distilled.label_logits is not None:
            chance = distilled.label_logits.softmax(1)
            figures["label_entropy"] = float(torch.special.entr(chance).sum(1).mean())
            kept = distilled.label_logits.argmax(1) == distilled.labels
            figures["label_agreement"] = float(kept.double().mean())
        return figures

    def details(self, job: Job, artifact: Artifact) -> dict[str, Any]:
        """Beside the experts: the difficulty study, when one was made."""
        found = super().details(job, artifact)
        rows = distilled_of(artifact).provenance.get("windows")
        if rows:
            found["tables"].append(
                {
                    "title": "Accuracy by window, on validation data",
                    "columns": ["start epochs", "accuracy", "mean expert step"],
                    "rows": [
                        [
                            f"[{r['window'][0]}, {r['window'][1]})",
                            f"{r['measure']:.4f}",
                            f"{r['step']:.4g}",
                        ]
                        for r in rows
                    ],
                }
            )
        return found

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated images of 8x8, a ConvNet of depth 2 and width 4, two experts."""
        return {
            "method": "datm",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
            "settings": {
                "ipc": 1,
                "experts": 2,
                "expert_epochs": 3,
                "expert_batch": 16,
                "inner_steps": 2,
                "span": 1,
                "grow_from": 1,
                "max_start": 3,
                "grow_until": 3,
                "threshold": 2.0,
                "judge_epochs": 4,
                "judge_nets": 1,
                "full_epochs": 1,
            },
            "budget": {"steps": 4},
            "seed": seed,
        }


def _thirds(starts: int) -> list[list[int]]:
    """The start epochs 0..starts-1 in three windows, fewer when there are fewer of them."""
    edges = sorted({0, starts // 3, 2 * starts // 3, starts})
    return [[low, high] for low, high in pairwise(edges)]
