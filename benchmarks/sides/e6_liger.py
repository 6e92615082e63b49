"""E6, Liger's chunked loss without compilation."""

import torch
from e6_case import CHUNK, Case
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

case = Case()
labels = torch.where(case.mask, 0, -100)
fused = LigerFusedLinearJSDLoss(
    weight_hard_loss=0.0, weight_soft_loss=1.0, beta=case.beta, compiled=False, chunk_size=CHUNK
)


def loss():
    """Soft loss only."""
    return fused(case.student, case.student_weight, case.teacher, case.teacher_weight, labels)


case.measure(loss)
