r"""Label smoothing (Szegedy et al. 2016, section 7): a uniform teacher.

With student logits :math:`z`, label :math:`y`, :math:`K` classes and :math:`\epsilon`:

.. math::
    L = (1 - \epsilon)\, CE(z, y) + \epsilon \frac{1}{K} \sum_k CE(z, k)

What a distillation gains beyond it is owed to what the teacher knows of single samples.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.logits import label_smoothing_cross_entropy
from stillhouse.method import Card, MethodConfig, StudentTraining
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.teacher import Knowledge


class LabelSmoothingObjective(Objective):
    """Cross-entropy against smoothed labels.

    Args:
        student: net with logits (B, K).
        smoothing: share of the uniform distribution, in [0, 1).
    """

    def __init__(self, student: Net, smoothing: float) -> None:
        super().__init__(student)
        self.smoothing = smoothing

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `task`."""
        logits = self.student(batch.view("x"))["logits"]
        loss = label_smoothing_cross_entropy(logits, batch["target"], smoothing=self.smoothing)
        return {"task": loss}


class LabelSmoothing(StudentTraining):
    """The student alone, on smoothed labels, at the budget of the method beside it."""

    card = Card(
        id="label-smoothing",
        kind="baseline",
        title="Rethinking the Inception Architecture for Computer Vision",
        summary="The student alone on labels mixed with the uniform distribution.",
        paper="CVPR 2016; arXiv 1512.00567",
        year=2016,
        authors=(
            "Christian Szegedy",
            "Vincent Vanhoucke",
            "Sergey Ioffe",
            "Jonathon Shlens",
            "Zbigniew Wojna",
        ),
        links=("https://arxiv.org/abs/1512.00567",),
        room="baselines",
        yields="model",
        stages=(("student", "train"),),
    )

    class Config(MethodConfig):
        """Settings of `label-smoothing`."""

        smoothing: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="share of the uniform distribution in every label",
            json_schema_extra={"source": "paper, section 7"},
        )

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Smoothed labels."""
        return LabelSmoothingObjective(student, self.config.smoothing)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny multilayer perceptron on generated vectors."""
        return {
            "method": "label-smoothing",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
