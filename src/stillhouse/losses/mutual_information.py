"""Mutual information as a loss; pure functions of tensors.

Conventions as in `losses.logits`: classes last, `mask` and `reduction` over items, half
precision is widened inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.losses.logits import Reduction, _expected, _log_softmax, _reduce

LEAST = 1e-12


def cmi(
    logits: Tensor,
    centroids: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Conditional mutual information I(X; Yhat | Y) of a batch: mean of KL(P_x || Q^y).

    With P_x the softmax of an item's logits and Q^y the mean output of its class (Ye et al.,
    ICLR 2024, and the released CE_KL_loss). The gradient flows through P and log P, none
    through Q. For the exact class means this is the generalised Jensen-Shannon divergence
    within classes, between 0 and log(classes); for frozen ones it exceeds it by the divergence
    of the present means from them, and has no bound.

    Args:
        logits: (..., classes).
        centroids: (classes, classes), row y is Q^y; see `usable`.
        target: leading shape, int64. Masked items may hold any number.
        mask: leading shape.
        reduction: "mean", "sum" or "none".

    Returns:
        In nats: a scalar, or the leading shape for "none".

    Raises:
        ModelError: shapes that do not fit each other.
    """
    classes = logits.shape[-1] if logits.ndim else 0
    if centroids.shape != (classes, classes) or classes < 2:
        raise ModelError(
            f"centroids of shape {tuple(centroids.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}: one row per class of as many probabilities is needed"
        )
    if target.shape != logits.shape[:-1]:
        raise ModelError(
            f"targets of shape {tuple(target.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}: expected {tuple(logits.shape[:-1])}"
        )
    log_p = _log_softmax(logits, 1.0, mask)
    if mask is not None:
        target = target.masked_fill(mask == 0, 0)
    log_q = usable(centroids.detach().to(log_p)).log()[target]
    return _reduce(_expected(log_p, log_p - log_q), mask, reduction)


def usable(centroids: Tensor) -> Tensor:
    """Rows whose logarithm is finite: entries below 1e-12 are raised to it.

    Where there was such an entry, all rows are brought back to the sum 1; else they stay as
    they are, to the last bit.

    Args:
        centroids: (..., classes) probabilities.
    """
    raised = centroids.clamp(min=LEAST)
    low = (centroids < LEAST).any()
    return torch.where(low, raised / raised.sum(-1, keepdim=True), centroids)
