"""E6, TRL's dense divergence: both models' logits in full."""

import torch
from e6_case import Case
from torch.nn.functional import linear
from trl.experimental.gkd import GKDTrainer

case = Case()
labels = torch.where(case.mask, 0, -100)[None]


def loss():
    """As its trainer calls it."""
    with torch.no_grad():
        teacher = linear(case.teacher, case.teacher_weight)[None]
    student = linear(case.student, case.student_weight)[None]
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=case.beta)


case.measure(loss)
