"""Losses on intermediate features; pure functions of tensors, student first."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.losses.distributions import Counts, class_means

Normalise = Literal["l2", "l1", "frobenius", "none", "fro_official"]
Pool = Literal["sum_abs", "max"]
Error = Literal["squared", "absolute", "angular"]
Distance = Literal["l2sq", "l2", "mse", "cos"]


def vector_distance(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """Distance of matching vectors: LEAF, EmbedDistill, sentence-transformers.

    For unit vectors the squared norm is 2 (1 - cos); always it is D times the mean square.

    Args:
        student: (B, D).
        teacher: (B, D), no gradient.
        distance: l2sq the squared norm, l2 the norm, mse the squared norm over D, cos 1 - cosine.

    Returns:
        (B,), float32 at least.
    """
    student, teacher = wide(student), wide(teacher.detach())
    if distance == "cos":
        return 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    difference = student - teacher
    if distance == "l2":
        # The norm's own backward: 0 where both are equal, not NaN.
        length: Tensor = difference.norm(dim=-1)
        return length
    square = difference.square()
    return square.sum(-1) if distance == "l2sq" else square.mean(-1)


def attention_map(
    features: Tensor,
    power: float = 4.0,
    *,
    normalise: Normalise = "l2",
    pool: Pool = "sum_abs",
    eps: float = 1e-12,
) -> Tensor:
    """Spatial attention of each sample: channels pooled, positions flattened, normalised.

    `sum_ch |A|^power` over channels (Zagoruyko & Komodakis, Attention Transfer, ICLR 2017;
    Sajedi et al., DataDAM, ICCV 2023, section 3.1). A power above 1 stresses what is strongly
    activated. A sample without any activation has the zero map and no gradient.

    Args:
        features: (B, C, ...) activations with any number of spatial dimensions.
        power: positive exponent.
        normalise: per sample, "l2" or "l1" norm 1; "frobenius", the norm of the map before
            flattening, which is the same as "l2"; "none"; "fro_official", division by the
            SQUARED Frobenius norm as the released code of DataDAM does.
        pool: "sum_abs", or "max" over channels of `|A|^power`. (The released maximum cannot
            run; this is what it intends.)
        eps: lower bound of the norm that is divided by.

    Returns:
        (B, positions), >= 0, float32 at least.

    Raises:
        ModelError: no spatial dimension.
        RecipeError: a power that is not positive, an unknown choice.
    """
    if features.ndim < 3:
        raise ModelError(
            f"attention needs features (B, C, positions...), got shape {tuple(features.shape)}"
        )
    if not power > 0:
        raise RecipeError(f"the power of an attention map must be positive, got {power}")
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    strength = _absolute_power(features, power)
    if pool == "sum_abs":
        pooled = strength.sum(1)
    elif pool == "max":
        pooled = strength.amax(1)
    else:
        raise RecipeError(f"attention pooling must be 'sum_abs' or 'max', got '{pool}'")
    flat = pooled.flatten(1)
    if normalise in ("l2", "frobenius"):
        return F.normalize(flat, p=2.0, dim=1, eps=eps)
    if normalise == "l1":
        return F.normalize(flat, p=1.0, dim=1, eps=eps)
    if normalise == "fro_official":
        return flat / flat.square().sum(1, keepdim=True).clamp_min(eps)
    if normalise == "none":
        return flat
    raise RecipeError(
        f"attention maps are normalised by l2, l1, frobenius, none or fro_official, "
        f"got '{normalise}'"
    )


def attention_matching(
    synthetic: Tensor,
    real: Tensor,
    *,
    synthetic_counts: Counts,
    real_counts: Counts,
    power: float = 4.0,
    normalise: Normalise = "l2",
    pool: Pool = "sum_abs",
    error: Error = "squared",
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """Distance between class means of attention maps at ONE layer.

    Each sample's map is normalised first and the maps are averaged then, so that the norm of
    the mean says how far the samples agree (Sajedi et al., DataDAM, ICCV 2023, equation 2).
    With error "squared": `sum_c || mean_b a_real - mean_b a_synthetic ||^2`, summed over
    positions and classes. The paper's code multiplies it by 100.

    Args:
        synthetic: (N, C, ...) activations, class-major.
        real: (M, C', ...) activations of the same classes and positions; no gradient flows
            into them.
        synthetic_counts: rows per class, one number or a list of K.
        real_counts: rows per class; classes may differ.
        power: see `attention_map`.
        normalise: see `attention_map`.
        pool: see `attention_map`.
        error: "squared"; "absolute", the sum of absolute differences; "angular", one minus the
            cosine per class.
        reduction: "sum" over classes, or "none" for one value per class.

    Returns:
        A scalar, or (K,).

    Raises:
        ModelError: counts that do not fit, numbers of classes or positions that differ.
        RecipeError: an unknown choice.
    """
    ours = class_means(
        attention_map(synthetic, power, normalise=normalise, pool=pool), synthetic_counts
    )
    theirs = class_means(
        attention_map(real.detach(), power, normalise=normalise, pool=pool), real_counts
    )
    if ours.shape != theirs.shape:
        raise ModelError(
            f"attention maps of {tuple(ours.shape)} and {tuple(theirs.shape)} (classes, "
            f"positions) cannot be matched"
        )
    if error == "squared":
        values = (theirs - ours).square().sum(1)
    elif error == "absolute":
        values = (theirs - ours).abs().sum(1)
    elif error == "angular":
        values = 1.0 - F.cosine_similarity(theirs, ours, dim=1)
    else:
        raise RecipeError(f"attention error must be squared, absolute or angular, got '{error}'")
    if reduction not in ("sum", "none"):
        raise RecipeError(f"reduction must be 'sum' or 'none', got '{reduction}'")
    return values.sum() if reduction == "sum" else values


def _absolute_power(x: Tensor, power: float) -> Tensor:
    """|x|^power; powers of two by squaring, which is several times faster than `pow`."""
    if power in (2, 4, 8):
        x = x.square()
        while power > 2:
            x, power = x.square(), power / 2
        return x
    return x.abs() if power == 1 else x.abs().pow(power)


def absolute_by_item(student: Tensor, teacher: Tensor, *, eps: float = 1e-4) -> Tensor:
    """L1 between features of items: the mean within an item, then over the n items.

    `sum_i mean |s_i - t_i| / (n + eps)`; 0 without items. So every item weighs the same,
    whatever its size (UniDistill, CVPR 2023: an item is a box, its features those of 9 points).

    Args:
        student: (n, ...).
        teacher: (n, ...); no gradient flows into it.
        eps: of the denominator.

    Raises:
        ModelError: shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"features of {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) "
            "cannot be compared; a projection to the teacher's width is needed"
        )
    if len(student) == 0:
        return student.sum() * 0.0
    each = (student - teacher.detach()).abs().flatten(1).mean(1)
    return each.sum() / (len(student) + eps)
