"""How closely a student answers like its teacher, whatever the truth is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError
from stillhouse.metrics.classification import Summed


class Agreement(Summed):
    """Fidelity of a student to its teacher.

    - `agreement`: share of rows on which both give the same class.
    - `teacher_kl`: mean over rows of KL(teacher || student), in nats.

    The two measures of Stanton et al., "Does Knowledge Distillation Really Work?",
    NeurIPS 2021, section 3. A student may be accurate and yet not like its teacher.

    Args:
        student: the name of the student's logits in the output.
        teacher: the name of the teacher's, in the output or else in the batch.
        temperature: both logits are divided by it before the softmax.
    """

    def __init__(
        self, student: str = "logits", teacher: str = "teacher_logits", *, temperature: float = 1.0
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        super().__init__(3)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in.

        Args:
            out: `out[student]` (..., classes); `out[teacher]` likewise, unless in the batch.
            batch: optional `mask` (...) bool leaves out where it is False.

        Raises:
            DataError: no teacher's logits, or of another shape.
        """
        found = out.get(self.teacher, batch.get(self.teacher))
        if not isinstance(found, Tensor):
            raise DataError(f"agreement needs the teacher's logits under '{self.teacher}'")
        self.compare(out[self.student], found, mask=batch.get("mask"))

    def compare(
        self, student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None
    ) -> None:
        """Take in the logits (..., classes) of both for the same rows.

        Raises:
            DataError: the shapes differ.
        """
        if student_logits.shape != teacher_logits.shape:
            raise DataError(
                f"the student's logits {tuple(student_logits.shape)} and the teacher's "
                f"{tuple(teacher_logits.shape)} are not over the same rows and classes"
            )
        classes = student_logits.shape[-1]
        ours = student_logits.detach().reshape(-1, classes).float()
        theirs = teacher_logits.detach().reshape(-1, classes).to(ours)
        if mask is not None and mask.numel() == ours.shape[0]:
            kept = mask.reshape(-1).to(ours.device).bool()
            ours, theirs = ours[kept], theirs[kept]
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().sum()
        kl = F.kl_div(
            F.log_softmax(ours / self.temperature, -1),
            F.log_softmax(theirs / self.temperature, -1),
            reduction="sum",
            log_target=True,
        )
        self.add(torch.stack([same, kl, torch.ones_like(ours[:, 0]).sum()]))

    def compute(self) -> dict[str, float]:
        """`agreement` in [0, 1] and `teacher_kl` >= 0; NaN when there were no rows."""
        same, kl, rows = self.numbers()
        if not rows:
            return {"agreement": float("nan"), "teacher_kl": float("nan")}
        return {"agreement": same / rows, "teacher_kl": max(0.0, kl / rows)}
