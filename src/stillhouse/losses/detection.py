"""Losses of detectors: of classified and regressed regions, and of soft labels on them.

The background is the LAST class throughout; libraries that put it first are converted at their
border (`models/detector_net.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BACKGROUND_PAD = 1e-9


def foreground_kl(student: Tensor, teacher: Tensor, *, pad: float = BACKGROUND_PAD) -> Tensor:
    r"""Divergence from the teacher's distribution over objects to the student's over everything.

    .. math::
        \mathrm{KL}_i = \sum_j \tilde q_{ij} (\log \tilde q_{ij} - \log p_{ij}), \quad
        \tilde q_i = [\mathrm{softmax}(t_i), \mathrm{pad}], \quad p_i = \mathrm{softmax}(s_i)

    The teacher's background is left out of its softmax, so its target says which object a
    region would be if it were one (LPLD, section 3). Both logarithms come from `log_softmax`,
    so probabilities that underflow give no NaN. Constant in the teacher.

    Args:
        student: (N, C + 1) logits, background last.
        teacher: (N, C) logits of the foreground classes.
        pad: the target's probability of background; the target then sums to 1 + pad.

    Returns:
        (N,).

    Raises:
        ValueError: the student has not one class more than the teacher.
    """
    if student.shape[:1] != teacher.shape[:1] or student.shape[1] != teacher.shape[1] + 1:
        raise ValueError(
            f"student logits {tuple(student.shape)} need one class (background, last) more than "
            f"the teacher's foreground logits {tuple(teacher.shape)}"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p = student.to(wide).log_softmax(1)
    log_q = teacher.detach().to(wide).log_softmax(1)
    q = log_q.exp()
    log_q = log_q.masked_fill(q == 0, 0.0)  # 0 log 0 = 0, also for classes that are ruled out
    pads = q.new_full((len(q), 1), pad)
    target = torch.cat([q, pads], 1)
    return (target * (torch.cat([log_q, pads.log()], 1) - log_p)).sum(1)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each row of (N, D) features; in [0, 2]."""
    return 1.0 - (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(1)


def fast_rcnn(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, *, beta: float = 1.0 / 9.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of sampled regions, and smooth L1 of those that hold an object.

    The second is divided by the number of all regions, so both weigh objects alike however
    many regions are background (Girshick 2015; torchvision's normalisation).

    Args:
        logits: (N, C + 1), background last.
        deltas: (N, 4 C) of each class, or (N, 4) equal for all classes.
        labels: (N,) int64 in [0, C]; C is background.
        targets: (N, 4) deltas to the region's object; not read for background.
        beta: where smooth L1 goes over from a parabola to a line.

    Returns:
        (class, box), scalars.
    """
    background = logits.shape[1] - 1
    classification = F.cross_entropy(logits, labels)
    rows = (labels < background).nonzero()[:, 0]
    if deltas.shape[1] == 4:
        own = deltas[rows]
    else:
        own = deltas.reshape(len(deltas), -1, 4)[rows, labels[rows]]
    box = F.smooth_l1_loss(own, targets[rows].to(own), beta=beta, reduction="sum")
    return classification, box / max(1, labels.numel())


def asymmetric(
    logits: Tensor,
    target: Tensor,
    *,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    shift: float = 0.05,
    floor: float = 1e-8,
) -> Tensor:
    r"""Multi-label loss that forgives easy negatives (Ridnik et al. 2021), mean over elements.

    .. math::
        -\big(y\,(1-p)^{\gamma_+}\log p + (1-y)\,(1-q)^{\gamma_-}\log q\big), \quad
        q = \min(1 - p + \mathrm{shift}, 1)

    There is no gradient through the focusing factors.

    Args:
        logits: (...); p is their sigmoid.
        target: (...) in {0, 1}.
        gamma_negative: focusing on negatives.
        gamma_positive: focusing on positives.
        shift: negatives below this probability cost nothing.
        floor: least argument of a logarithm, so that p = 0 beside y = 0 gives 0, not NaN.
    """
    p = logits.float().sigmoid()
    q = (1.0 - p + shift).clamp(max=1.0)
    positive = target > 0.5
    known = torch.where(positive, p, q)
    gamma = torch.where(positive, gamma_positive, gamma_negative)
    focus = (1.0 - known.detach()) ** gamma
    return -(focus * known.clamp(min=floor).log()).mean()
