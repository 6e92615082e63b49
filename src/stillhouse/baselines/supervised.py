"""The student alone: the task's loss on the labels, at the method's own budget."""

from __future__ import annotations

from typing import Any, ClassVar

from stillhouse.method import Card, StudentTraining
from stillhouse.objective import Objective
from stillhouse.stages.supervised import Supervised


class SupervisedTraining(StudentTraining):
    """Trains the student on labels only, with the data, steps and seed of the method beside it.

    Whatever a distillation adds must show against this.
    """

    card = Card(
        id="supervised",
        kind="baseline",
        title="The student alone",
        summary="The student trained on the labels only, at equal steps.",
        room="baselines",
        yields="model",
        stages=(("student", "train"),),
    )
    variants: ClassVar[dict[str, Any]] = {}

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """The task's loss."""
        return Supervised(student, job.task)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny multilayer perceptron on generated vectors."""
        return {
            "method": "supervised",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
