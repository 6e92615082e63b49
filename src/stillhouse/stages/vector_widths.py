"""How wide the vectors of a student and of a teacher are, found by asking once."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.batch import read_rows, together
from stillhouse.errors import ModelError
from stillhouse.net import Net
from stillhouse.teacher import Teacher, Want, to_device

# Whose rows are learned from where nothing else is said: labels are not needed.
LEARNED = ("train", "unlabelled")


def student_width(job: Any, student: Net) -> int:
    """D of the student's "embedding" (B, D), in eval mode and without gradient.

    Raises:
        ModelError: it gives no vectors.
    """
    out = student.tried(job.task.example_view(student.view))
    return _width("student", out.get("embedding"))


def teacher_width(job: Any, teacher: Teacher) -> int:
    """D of the teacher's "embedding" (B, D); it is bound and moved to the job's device.

    Raises:
        ModelError: it gives no vectors.
    """
    teacher.bind([Want("embedding")], job.task)
    to_device(teacher, job.device)
    source = together(job.splits, [role for role in LEARNED if role in job.splits][:1])
    batch = read_rows(source, torch.arange(1), None, job.task.collate)
    return _width("teacher", teacher.knowledge(batch.to(job.device)).tensor("embedding"))


def _width(who: str, found: Any) -> int:
    if not isinstance(found, torch.Tensor) or found.ndim != 2:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else "nothing"
        raise ModelError(f"the {who} gives {shape} as 'embedding', not one vector a row (B, D)")
    return int(found.shape[1])
