r"""Knowledge distillation (Hinton, Vinyals, Dean 2015).

With student logits :math:`z`, teacher logits :math:`t`, labels :math:`y` and temperature
:math:`T`:

.. math::
    L = (1 - \alpha)\, CE(z, y) + \alpha\, T^2\, D(\sigma(t / T), \sigma(z / T))

where :math:`D` is the forward Kullback-Leibler divergence KL(teacher || student) by default.
The factor :math:`T^2` keeps the gradient's size when the temperature changes (section 2.1 of
the paper). Other directions and the Jensen-Shannon divergence are settings.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.logits import jsd, kl, topk_kl
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, TopK, Want


class KDObjective(Objective):
    """The weighted sum of the task's loss and the divergence from the teacher.

    Args:
        student: net with logits (B, K).
        task: whose loss the labels use.
        config: see `KD.Config`.
    """

    wants = (Want("logits"),)

    def __init__(self, student: Net, task: Task, config: KD.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and `logits`."""
        out = self.student(batch.view("x"))
        alpha = self.config.alpha
        terms: dict[str, Tensor] = {}
        if alpha < 1:
            task = self._loss(out, batch)
            terms.update({name: (1 - alpha) * value for name, value in task.items()})
        if alpha > 0:
            terms["logits"] = alpha * self.divergence(out["logits"], knowledge["logits"])
        return terms

    def divergence(self, student: Tensor, teacher: Any) -> Tensor:
        """The divergence, multiplied by the squared temperature; the mean over rows."""
        temperature, direction = self.config.temperature, self.config.direction
        if isinstance(teacher, TopK):
            return topk_kl(student, teacher)
        if direction == "jsd":
            return jsd(student, teacher, beta=self.config.beta, temperature=temperature)
        return kl(student, teacher, temperature=temperature, direction=direction)


class KD(StudentTraining):
    """Hinton's distillation: soft targets of the teacher beside the labels."""

    card = Card(
        id="kd",
        kind="baseline",
        title="Distilling the Knowledge in a Neural Network",
        summary="Soft targets of the teacher at a temperature, beside the labels.",
        paper="NIPS 2014 Deep Learning Workshop; arXiv 1503.02531",
        year=2015,
        authors=("Geoffrey Hinton", "Oriol Vinyals", "Jeff Dean"),
        links=("https://arxiv.org/abs/1503.02531",),
        room="baselines",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `kd`."""

        alpha: float = Field(
            0.9,
            ge=0,
            le=1,
            description="weight of the soft targets; the labels have 1 - alpha",
            json_schema_extra={"source": "paper, section 2: a much lower weight on hard targets"},
        )
        temperature: float = Field(
            4.0,
            gt=0,
            description="softens both distributions",
            json_schema_extra={"source": "common practice; the paper tries 1 to 20"},
        )
        direction: Literal["forward", "reverse", "symmetric", "jsd"] = Field(
            "forward",
            description="forward is KL(teacher || student); reverse KL(student || teacher)",
            json_schema_extra={"source": "paper: forward"},
        )
        beta: float = Field(
            0.5,
            ge=0,
            le=1,
            description="of jsd: 0 equals forward, 1 reverse",
            json_schema_extra={"source": "generalised Jensen-Shannon divergence"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "reverse": Variant(set={"direction": "reverse"}, about="KL(student || teacher)"),
        "jsd": Variant(set={"direction": "jsd"}, about="Jensen-Shannon divergence"),
        "soft-only": Variant(set={"alpha": 1.0}, about="no labels at all"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "kd", "supervised"),
        Claim("beats label smoothing at equal steps", "accuracy", "kd", "label-smoothing"),
    ]

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels and soft targets."""
        return KDObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not at alpha 0."""
        return bool(self.config.alpha > 0)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "kd",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
