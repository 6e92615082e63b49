"""Labels and soft targets, beside which a baseline sets a term of its own."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.losses.logits import kl
from stillhouse.method import MethodConfig
from stillhouse.net import Output
from stillhouse.task import Task
from stillhouse.teacher import Knowledge


class SoftTargetsConfig(MethodConfig):
    """Settings of a baseline whose own term stands beside labels and soft targets."""

    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of the soft targets; the labels have 1 - alpha",
        json_schema_extra={"source": "chosen here"},
    )
    temperature: float = Field(
        4.0,
        gt=0,
        description="of the soft targets",
        json_schema_extra={"source": "as the house's knowledge distillation"},
    )

    def terms(
        self, task: Task, out: Output, batch: Batch, knowledge: Knowledge
    ) -> dict[str, Tensor]:
        """The weighted terms of the task and `logits`; at an end of alpha the other is left out.

        Args:
            task: whose loss the labels use.
            out: of the student, with logits (B, K).
            batch: the labels.
            knowledge: of the teacher, with logits (B, K).
        """
        terms: dict[str, Tensor] = {}
        if self.alpha < 1:
            plain = task.loss(out, batch)
            terms = {name: (1 - self.alpha) * value for name, value in plain.items()}
        if self.alpha > 0:
            found = kl(
                out["logits"],
                knowledge.tensor("logits"),
                temperature=self.temperature,
                mask=knowledge.valid,
            )
            terms["logits"] = self.alpha * found
        return terms
