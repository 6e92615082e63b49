"""Optimising the pixels of a small set so that frozen networks cannot tell it from real data.

What distribution matching and its kin share: pixels as parameters, a frozen network per step
(a fresh one unless a subclass says otherwise), real and synthetic images of a class under one
siamese augmentation, and a loss that is a sum over classes. Subclasses say by what distance a
class is matched, and may learn more than pixels; distribution matching itself is the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from stillhouse.batch import Batch, Draws, Order
from stillhouse.clock import Clock
from stillhouse.errors import TrainingError
from stillhouse.losses.distributions import dm
from stillhouse.net import Net, Output
from stillhouse.objective import Objective
from stillhouse.parts.augment import DSA
from stillhouse.parts.carry import carry
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.net_pool import NetPool
from stillhouse.teacher import Knowledge

DrawReal = Callable[[int, int, Generator], Tensor]


class PixelMatching(Objective):
    """Pixels that are learnt; a batch's rows are classes.

    The loss is a sum over classes. A term is written as K times the mean over the batch's
    classes, so several processes, each with some of the classes, give what one gives.

    Args:
        start: the set before distillation; its images are copied.
        pool: of Nets that give what the distance needs; they are drawn by the clock.
        draw_real: `draw_real(label, count, generator)` gives (n, C, H, W) real images of a
            class in network-input space, n <= count.
        batch_real: real images per class and step.
        augment: siamese; a new seed per class and step.
        class_chunk: classes that pass through the network at a time. Their gradients are
            carried, so memory is that of one chunk and the result that of the whole; small
            chunks are faster on CPUs too. 0: all at once.
        batch_statistics: the networks normalise over the batch, so all classes must pass at
            once, whatever `class_chunk` says.

    Attributes:
        pixels: (N, C, H, W), the parameter.
        step_classes: classes of a step in all processes; the loss is the sum over them.
        order: what `Job.fit` reads: the K classes, every step.
        steps_done: updates so far, for whoever evaluates in between.
    """

    def __init__(
        self,
        start: DistilledSet,
        pool: NetPool,
        draw_real: DrawReal,
        *,
        batch_real: int,
        augment: DSA,
        class_chunk: int = 1,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        self.start, self.pool, self.draw_real = start, pool, draw_real
        self.batch_real, self.augment = batch_real, augment
        self.batchwide = batch_statistics
        self.classes = len(start.classes)
        self.class_chunk = self.classes if batch_statistics or class_chunk == 0 else class_chunk
        self.pixels = nn.Parameter(start.images.detach().clone())
        ends = torch.tensor(start.counts).cumsum(0).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.step_classes = self.classes
        self.order: Order = Draws(self.classes, 1)
        self.steps_done = 0

    def distances(
        self,
        synthetic: Output,
        real: Output,
        synthetic_counts: Sequence[int],
        real_counts: Sequence[int],
    ) -> dict[str, Tensor]:
        """Named distances of some classes, each a weighted SUM over these classes.

        Args:
            synthetic: what the network gives for the synthetic images, class by class.
            real: likewise, without a gradient.
            synthetic_counts: images per class.
            real_counts: images per class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define distances")

    def distances_of(
        self,
        labels: Sequence[int],
        synthetic: Output,
        real: Output,
        synthetic_counts: Sequence[int],
        real_counts: Sequence[int],
        clock: Clock,
    ) -> dict[str, Tensor]:
        """`distances`, for a subclass that must know the classes or draw something for them."""
        return self.distances(synthetic, real, synthetic_counts, real_counts)

    def shown(self, images: Tensor) -> Tensor:
        """Training images, in network-input space, of stored ones: mosaics are cut."""
        return self.start.decode(images)

    def learned(self) -> list[Tensor]:
        """Parameters beside the pixels that the distances move."""
        return []

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """Draw the step's network."""
        self.scratch["net"] = self.pool.fresh(clock.rng("net"))
        return batch

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The distances of the batch's classes; `id` are the class numbers."""
        if "net" not in self.scratch:
            self.prepare(batch, clock)
        labels = [int(c) for c in batch["id"]]
        if self.batchwide and len(labels) < self.classes:
            raise TrainingError(
                f"networks with batch statistics need all {self.classes} classes in one forward, "
                f"here are {len(labels)}: use one process, or a network with instance norm"
            )
        net: Net = self.scratch["net"]
        images = {c: self.pixels[slice(*self.spans[c])] for c in labels}
        groups = [
            labels[at : at + self.class_chunk] for at in range(0, len(labels), self.class_chunk)
        ]
        share = self.step_classes / len(labels)
        pieces = [partial(self.piece, net, group, images, clock, share) for group in groups]
        inputs = [*images.values(), *self.learned()]
        return pieces[0]() if len(pieces) == 1 else carry(pieces, inputs)

    def piece(
        self, net: Net, labels: list[int], images: dict[int, Tensor], clock: Clock, share: float
    ) -> dict[str, Tensor]:
        """The terms of some classes that pass through the network together.

        Args:
            net: of the step.
            labels: the classes.
            images: their pixels, by class.
            clock: of the step.
            share: the factor of every term.
        """
        real, synthetic = [], []
        for label in labels:
            drawn = self.draw_real(label, self.batch_real, clock.rng("real", label))
            seed = clock.seed_for("augment", label)
            real.append(self.augment(drawn, seed))
            synthetic.append(self.augment(self.shown(images[label]), seed))
        with torch.no_grad():
            theirs = net(torch.cat(real))
        ours = net(torch.cat(synthetic))
        counts = [len(s) for s in synthetic], [len(r) for r in real]
        found = self.distances_of(labels, ours, theirs, *counts, clock)
        return {k: share * v for k, v in found.items()}

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Note the range of the pixels, which nothing limits."""
        self.steps_done = clock.step + 1
        self.note("pixel_min", self.pixels.min())
        self.note("pixel_max", self.pixels.max())

    def distilled(self) -> DistilledSet:
        """The set with the present pixels."""
        return self.start.replace(images=self.pixels.detach().float().cpu().clone())

    def export(self) -> nn.Module:
        """The objective itself: what is deployed is `distilled()`."""
        return self


class MeanMatching(PixelMatching):
    """Distribution matching (Zhao & Bilen, WACV 2023): mean embeddings of each class.

    Networks have the tap "embed".
    """

    def distances(
        self,
        synthetic: Output,
        real: Output,
        synthetic_counts: Sequence[int],
        real_counts: Sequence[int],
    ) -> dict[str, Tensor]:
        """The term `mmd`, a sum over the given classes."""
        distance = dm(
            synthetic["taps"]["embed"].flatten(1),
            real["taps"]["embed"].flatten(1),
            synthetic_counts=synthetic_counts,
            real_counts=real_counts,
        )
        return {"mmd": distance}
