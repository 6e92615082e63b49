"""Plain supervised training of any task: stage 0 of many methods, and the student alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.engine.fitting import optimizer_of, schedule_of
from stillhouse.engine.job import Fit, Job
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge


class Supervised(Objective):
    """The task's own loss on the student; no teacher.

    Args:
        student: the net that is trained.
        task: whose loss it is.
    """

    def __init__(self, student: Net, task: Task) -> None:
        super().__init__(student)
        self._view = student.view
        self._loss, self._count = task.loss, task.count

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The task's terms, on the view that the student reads."""
        return self._loss(self.student(batch.view(self._view)), batch)

    def count(self, batch: Batch) -> int | Tensor:
        """What the task's terms are means over."""
        return self._count(batch)


def train_supervised(
    job: Job,
    name: str,
    net: Net,
    *,
    split: str = "train",
    budget: Any = None,
    share: Mapping[str, Any] | None = None,
) -> Fit:
    """Train a net on a split by the task's loss, as a stage.

    Args:
        job: of the run.
        name: of the stage.
        net: trained in place.
        split: what it is trained on.
        budget: epochs or steps, batch, optimiser; the recipe's when not given.
        share: everything the result depends on; the stage then lies in the cache.
    """
    budget = budget or job.budget
    return job.fit(
        name,
        job.task.objective(net) or Supervised(net, job.task),
        job.order(split, budget.batch, draws=None),
        steps=budget.steps,
        epochs=budget.epochs,
        optim=optimizer_of(budget),
        schedule=schedule_of(budget),
        accumulate=budget.accumulate,
        clip=budget.clip,
        ema=budget.ema or 0.0 or None,
        share=share,
    )
