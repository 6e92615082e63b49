"""Contrastive losses: what belongs together is near, the rest apart; pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide


def supcon(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
    normalised: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""Supervised contrastive loss (Khosla et al., NeurIPS 2020, equation 2).

    Every row is an anchor; its positives are the other rows with its label:

    .. math::
        l_i = -\frac{\tau}{\tau_0} \frac{1}{|P(i)|} \sum_{p \in P(i)}
              \log \frac{\exp(z_i z_p / \tau)}{\sum_{a \ne i} \exp(z_i z_a / \tau)}

    An anchor without positives counts 0, and the mean is over ALL anchors (as released with
    FedLGD, where it stands in the denominator too).

    Args:
        features: (N, D); rows of several views are stacked.
        labels: (N,) class numbers.
        temperature: of the similarities, above 0.
        base_temperature: tau_0; 0.07 leaves the factor of the released code.
        normalised: the rows have unit length already; they are scaled to it otherwise.
        reduction: "mean" over anchors, or "none" for (N,).

    Returns:
        A scalar, or (N,); float32 at least.

    Raises:
        ModelError: shapes that do not fit, or fewer than two rows.
        RecipeError: a temperature that is not above 0; an unknown reduction.
    """
    if temperature <= 0 or base_temperature <= 0:
        raise RecipeError(f"temperatures must be above 0: {temperature} and {base_temperature}")
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(features) < 2:
        raise ModelError(
            f"features (N, D) and labels (N,) with N >= 2 are needed, got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    z = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    if not normalised:
        z = normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    # Finite instead of minus infinity: 0 times it, in rows without positives, is not NaN.
    logits = (z @ z.T / temperature).masked_fill(itself, torch.finfo(z.dtype).min)
    positive = (labels[:, None] == labels[None, :]) & ~itself
    counts = positive.sum(1)
    likelihood = logits.log_softmax(1).masked_fill(~positive, 0.0).sum(1)
    each = -(temperature / base_temperature) * likelihood / counts.clamp_min(1)
    if reduction == "none":
        return each
    if reduction == "mean":
        return each.mean()
    raise RecipeError(f"reduction must be 'mean' or 'none', got '{reduction}'")


def in_batch(
    vectors: Tensor,
    targets: Tensor,
    temperature: float = 0.05,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""InfoNCE within a batch: row i belongs to target i, all other targets are negatives.

    .. math::
        l_i = -\log \frac{\exp(\cos(x_i, t_i) / \tau)}{\sum_j \exp(\cos(x_i, t_j) / \tau)}

    Multiple-negatives ranking, as sentence encoders are trained by it; against a teacher's
    vectors it is the distillation loss of pynife (DistillationCosineLoss).

    Args:
        vectors: (B, D).
        targets: (B, D); gradients flow into them, unless they are detached.
        temperature: of the cosines, above 0.
        reduction: "mean" over rows, or "none" for (B,).

    Returns:
        A scalar, or (B,); float32 at least.

    Raises:
        ModelError: shapes that do not fit.
        RecipeError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise RecipeError(f"the temperature must be above 0, not {temperature}")
    if vectors.ndim != 2 or vectors.shape != targets.shape:
        raise ModelError(
            f"matching vectors (B, D) are needed, got {tuple(vectors.shape)} and "
            f"{tuple(targets.shape)}"
        )
    logits = normalize(wide(vectors), dim=1) @ normalize(wide(targets), dim=1).T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, own, reduction=reduction)
