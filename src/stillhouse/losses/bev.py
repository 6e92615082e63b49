"""Losses on detectors' maps in bird's-eye view: pure functions of tensors, student first.

A mask G (B, H, W) in [0, 1] says where objects are. `eps` keeps a batch without objects from
dividing by zero: its loss is 0 then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError


def masked_mean(values: Tensor, mask: Tensor | None, *, eps: float = 1e-4) -> Tensor:
    """sum(G * v) / (sum(G) + eps); the plain mean where there is no mask.

    Args:
        values: (B, H, W).
        mask: (B, H, W), or None.
        eps: of the denominator.
    """
    if mask is None:
        return values.mean()
    return (mask * values).sum() / (mask.sum() + eps)


def masked_features(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, power: int = 2, eps: float = 1e-6
) -> Tensor:
    """Mean over masked cells of the mean over channels of |s - t|^power.

    With power 2 and no mask: FitNet on a BEV map; with a Gaussian mask: the embedding term of
    usual detector distillation (X-Ray, CVPR 2024).

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W); no gradient flows into it.
        mask: (B, H, W), or None.
        power: 1 or 2.
        eps: of the denominator.
    """
    _same(student, teacher)
    away = (student - teacher.detach()).abs()
    return masked_mean((away if power == 1 else away.square()).mean(1), mask, eps=eps)


def class_response(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    temperature: float = 1.0,
    teacher_temperature: float = 2.0,
    clamp: float = 1e-4,
    eps: float = 1e-4,
) -> Tensor:
    """L1 between the largest class probabilities of two detectors inside a mask (UniDistill).

    The released code softens the teacher only, so that the loss is not 0 between equals.

    Args:
        student: (B, K, H, W) logits of all classes.
        teacher: (B, K', H, W) logits; no gradient flows into it.
        mask: (B, H, W), or None.
        temperature: of the student.
        teacher_temperature: of the teacher.
        clamp: probabilities are kept in [clamp, 1 - clamp].
        eps: of the denominator.
    """
    if student.shape[-2:] != teacher.shape[-2:]:
        _same(student, teacher)
    ours, theirs = (
        (z / t).sigmoid().clamp(clamp, 1 - clamp).amax(1)
        for z, t in ((student, temperature), (teacher.detach(), teacher_temperature))
    )
    return masked_mean((ours - theirs).abs(), mask, eps=eps)


def box_response(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, eps: float = 1e-4
) -> Tensor:
    """L1 between the regression channels of two detectors inside a mask, the mean over channels.

    Args:
        student: (B, R, H, W) raw values of all branches.
        teacher: (B, R, H, W); no gradient flows into it.
        mask: (B, H, W), or None.
        eps: of the denominator.
    """
    return masked_features(student, teacher, mask, power=1, eps=eps)


def heat_distance(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """Mean squared difference of all classes' probabilities inside a mask.

    Args:
        student: (B, K, H, W) logits.
        teacher: (B, K, H, W) logits; no gradient flows into it.
        mask: (B, H, W), or None.
        eps: of the denominator.
    """
    _same(student, teacher)
    away = (student.sigmoid() - teacher.detach().sigmoid()).square().mean(1)
    return masked_mean(away, mask, eps=eps)


def centre_focal(logits: Tensor, heat: Tensor, *, alpha: float = 2.0, beta: float = 4.0) -> Tensor:
    """The focal loss of centre heat maps, summed over cells (CornerNet, equation 1).

    Cells of value 1 are positives: -(1 - p)^alpha log p; the others -(1 - y)^beta p^alpha
    log(1 - p).

    Args:
        logits: (B, K, H, W).
        heat: (B, K, H, W) targets in [0, 1].
        alpha: stresses what is hard.
        beta: spares the surroundings of centres.

    Returns:
        (B,), to be divided by the number of boxes.
    """
    logits = logits.float()
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    positive = heat == 1
    found = torch.where(
        positive,
        -((1 - log_p.exp()) ** alpha) * log_p,
        -((1 - heat) ** beta) * log_p.exp() ** alpha * log_q,
    )
    return found.flatten(1).sum(1)


def _same(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"maps of {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) cannot "
            "be compared cell by cell: channels and grids of both must agree"
        )
