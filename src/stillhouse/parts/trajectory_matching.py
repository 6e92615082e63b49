"""Optimising a small set so that training on it goes where experts on the real data went.

What trajectory matching and its kin share: pixels (and label logits) as parameters, a learned
learning rate, a student that is unrolled from an expert's weights, and the normalised distance of
where it ends from where the expert was some epochs later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.batch import Batch, Order, Shuffled
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError, TrainingError
from stillhouse.losses.distributions import trajectory_distance
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.objective import Objective
from stillhouse.parts.augment import DSA
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.schedule import Schedule
from stillhouse.parts.trajectories import Trajectories
from stillhouse.parts.unroll import Call, chunks, matched_in_pieces, unroll
from stillhouse.teacher import Knowledge

Memory = Literal["whole", "constant"]
_FEW = 100  # iterations before a share of skipped ones says anything
_MOST_SKIPPED = 0.9


class TrajectoryMatching(Objective):
    """Pixels, label logits and learning rate that are learnt; a batch's rows are experts.

    One row: begin at an expert's weights after s epochs, make N steps of SGD on chunks of the
    set, compare with the expert's weights after s + M epochs,
    `||theta_N - theta*_{s+M}||^2 / ||theta*_s - theta*_{s+M}||^2`. The term `match` is the mean
    over rows.

    Args:
        start: the set before distillation. With `label_logits` they are learnt too, as free
            logits, and the inner loss is the soft cross-entropy; else the labels are hard. Its
            `lr` is what the learning rate begins at.
        trajectories: of the experts.
        span: M, epochs of the expert that a student has to cover.
        steps: N, inner steps.
        batch_syn: images of an inner step; 0: all.
        lowest: first epoch s that may be begun at.
        upper: the epoch before which s lies (exclusive), by the clock.
        augment: of the inner steps, not siamese; its draws differ from step to step.
        threshold: an iteration whose loss lies above it changes nothing; None: none is skipped.
        lr_least: the learning rate is not let below it; None: it may fall as it likes.
        memory: "whole" differentiates through all inner steps; "constant" (TESLA) keeps the
            graph of one step at a time and drops what passes through the weights.
        momentum: of the inner SGD.
        experts_per_step: rows of a step.

    Attributes:
        pixels: (n, C, H, W), a parameter.
        label_logits: (n, K), a parameter, or None.
        lr: 0-dim, a parameter.
        order: what `Job.fit` reads: all experts in a new order each epoch.
        seen: iterations so far; `skipped` of them.
        steps_done: iterations so far, for whoever evaluates in between.

    Raises:
        RecipeError: epochs that the experts do not have, an empty window, no learning rate.
    """

    functional: ClassVar[bool] = True
    labels: Tensor
    seen: Tensor
    skipped: Tensor
    clamped: Tensor

    def __init__(
        self,
        start: DistilledSet,
        trajectories: Trajectories,
        *,
        span: int,
        steps: int,
        lowest: int,
        upper: Schedule,
        augment: DSA,
        batch_syn: int = 0,
        threshold: float | None = None,
        lr_least: float | None = None,
        memory: Memory = "whole",
        momentum: float = 0.0,
        experts_per_step: int = 1,
    ) -> None:
        super().__init__()
        if start.lr is None:
            raise RecipeError("trajectory matching needs a learning rate to begin with")
        if memory == "constant" and momentum:
            raise RecipeError("memory: constant knows no inner momentum; use memory: whole")
        self.start, self.trajectories = start, trajectories
        self.span, self.inner_steps, self.lowest, self.upper = span, steps, lowest, upper
        self.augment, self.threshold, self.lr_least = augment, threshold, lr_least
        self.memory, self.momentum = memory, momentum
        self.batch_syn = min(batch_syn, len(start)) or len(start)
        self.pixels = nn.Parameter(start.images.detach().clone())
        logits = start.label_logits
        self.label_logits = None if logits is None else nn.Parameter(logits.detach().clone())
        self.lr = nn.Parameter(torch.tensor(start.lr, dtype=start.images.dtype))
        self.register_buffer("labels", start.labels.clone(), persistent=False)
        for name in ("seen", "skipped", "clamped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.order: Order = Shuffled(trajectories, experts_per_step, augment=False)
        self.steps_done = 0

    # ---- which segment ---------------------------------------------------------------------

    def window(self, clock: Clock) -> tuple[int, int]:
        """First and last-but-one epoch that a student may begin at: s in [low, high).

        Raises:
            RecipeError: the window is empty, or the experts end before its targets.
        """
        low, high = self.lowest, int(self.upper(clock))
        if not 0 <= low < high:
            raise RecipeError(
                f"no epoch to begin at: the window [{low}, {high}) is empty; its upper bound "
                "(grow_from, with a growing window) must exceed min_start"
            )
        if high - 1 + self.span > self.trajectories.epochs:
            raise RecipeError(
                f"a student that begins at epoch {high - 1} should arrive at epoch "
                f"{high - 1 + self.span}, but the experts have {self.trajectories.epochs}: "
                f"max_start may be {self.trajectories.epochs - self.span + 1} at most"
            )
        return low, high

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """Adds the segments (`begin`, `target` (B, P)) and where they begin (`epoch` (B,))."""
        epochs = clock.randint("start epoch", batch, *self.window(clock)).cpu()
        pairs = [
            self.trajectories.segment(int(expert), int(epoch), self.span)
            for expert, epoch in zip(batch["id"], epochs, strict=True)
        ]
        if pairs:
            begin, target = (torch.stack(side) for side in zip(*pairs, strict=True))
        else:
            begin = target = torch.zeros(0, self.trajectories.net.size)
        dtype, device = self.pixels.dtype, self.pixels.device
        return Batch(
            {**batch, "epoch": epochs},
            begin=begin.to(device, dtype),
            target=target.to(device, dtype),
        )

    # ---- the loss --------------------------------------------------------------------------

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `match`, a mean over experts."""
        if "begin" not in batch:
            batch = self.prepare(batch, clock)
        found = [
            self.distance(batch["begin"][i], batch["target"][i], row, clock)
            for i, row in enumerate(batch.rows.tolist())
        ]
        if not found:
            return {}
        loss = torch.stack(found).mean()
        if self.threshold is not None:
            # A student that ran away is skipped like any other that ends too far off.
            far = torch.full_like(loss, torch.finfo(loss.dtype).max)
            loss = torch.where(torch.isfinite(loss), loss, far)
        return {"match": loss}

    def distance(self, begin: Tensor, target: Tensor, row: int, clock: Clock) -> Tensor:
        """The normalised distance of one student, a scalar.

        Args:
            begin: (P,) weights it begins with.
            target: (P,) weights it should reach.
            row: position of the expert in the global batch; names its draws.
            clock: of the step.
        """
        batches = self.chunks(row, clock)

        def loss(call: Call, rows: Tensor, number: int) -> Tensor:
            return self.inner_loss(call, rows, row, number, clock)

        net = self.trajectories.net
        if self.memory == "constant":
            own = [self.pixels] if self.label_logits is None else [self.pixels, self.label_logits]
            return matched_in_pieces(net, begin, target, batches, loss, self.lr, own)
        student = unroll(net, begin, batches, loss, self.lr, self.momentum)
        return trajectory_distance(student.end, target, begin)

    def chunks(self, row: int, clock: Clock) -> Sequence[Tensor]:
        """Rows of the set in each inner step."""
        rng = clock.rng("chunks", row)
        return chunks(len(self.pixels), self.batch_syn, self.inner_steps, rng)

    def inner_loss(self, call: Call, rows: Tensor, row: int, number: int, clock: Clock) -> Tensor:
        """What inner step `number` of a student goes down: cross-entropy on `rows` of the set."""
        rows = rows.to(self.pixels.device)
        images = self.pixels.index_select(0, rows)
        images = self.augment(images, clock.rng("augment", row, number))
        out = call(images)
        logits = out["logits"] if isinstance(out, Mapping) else out
        if self.label_logits is None:
            return F.cross_entropy(logits, self.labels.index_select(0, rows))
        labels = self.label_logits.index_select(0, rows)
        return soft_cross_entropy(logits, labels, from_logits=True)

    # ---- around the update -----------------------------------------------------------------

    def after_backward(self, terms: Mapping[str, Tensor], clock: Clock) -> bool:
        """Skip the update when the loss is above the threshold.

        Raises:
            TrainingError: more than 90 of 100 iterations are skipped.
        """
        self.seen += 1
        self.steps_done = clock.step + 1
        if self.threshold is None or not terms:
            return True
        accepted = float(terms["match"].detach()) <= self.threshold
        if not accepted:
            self.skipped += 1
            self.note("skipped", self.skip_rate)
            self.refuse_standstill(_FEW)
        return accepted

    @property
    def skip_rate(self) -> float:
        """Share of iterations so far whose update was skipped."""
        return float(self.skipped) / max(1, int(self.seen))

    def refuse_standstill(self, least: int) -> None:
        """Fail where nearly every iteration was skipped: such a set is its start.

        Args:
            least: iterations before which nothing is said.

        Raises:
            TrainingError: with the likely causes.
        """
        if int(self.seen) < least or self.skip_rate <= _MOST_SKIPPED:
            return
        rate = float(self.lr.detach())
        raise TrainingError(
            f"{int(self.skipped)} of {int(self.seen)} iterations ended above the threshold "
            f"{self.threshold:g} and were skipped, so the set hardly moves. Likely causes: "
            f"a learning rate of the student (now {rate:g}) too high for these steps, "
            "a window where experts hardly move, too few inner steps, or a pixel learning rate "
            "that broke the images"
        )

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Keep the learning rate above its least value; note what moves."""
        if self.lr_least is not None and float(self.lr.detach()) < self.lr_least:
            self.lr.fill_(self.lr_least)
            self.clamped += 1
            self.note("lr_clamped", float(self.clamped))
        self.note("student_lr", self.lr)
        self.note("upper", float(self.upper(clock)))
        self.note("skipped", self.skip_rate)
        self.note("pixel_min", self.pixels.min())
        self.note("pixel_max", self.pixels.max())

    def distilled(self) -> DistilledSet:
        """The set with the present pixels, label logits and learning rate."""
        logits = self.label_logits
        return self.start.replace(
            images=self.pixels.detach().float().cpu().clone(),
            label_logits=None if logits is None else logits.detach().float().cpu().clone(),
            lr=float(self.lr.detach()),
        )

    def export(self) -> nn.Module:
        """The objective itself: what is deployed is `distilled()`."""
        return self
