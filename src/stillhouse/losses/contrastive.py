"""Contrastive losses: what belongs together is near, the rest apart; pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

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


def infonce(
    student: Tensor,
    teacher: Tensor,
    *,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    temperature: float = 0.1,
    symmetric: bool = False,
    normalised: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""InfoNCE (van den Oord et al. 2018): pick the own positive among candidates.

    .. math:: l_i = -\log \frac{\exp(q_i k_{p(i)} / \tau)}{\sum_j \exp(q_i k_j / \tau)}

    Without explicit negatives the candidates of a row are all rows of `teacher`, and its
    positive is the row of its own number. Explicit negatives REPLACE those of the batch: the
    candidates are then the own positive (column 0) and the negatives, as in the function
    `info_nce` that released codes share.

    Args:
        student: q, (B, D).
        teacher: k, (B, D), or (M, D) with `positives`.
        negatives: (N, D) for all rows, or (B, N, D) for each its own.
        positives: (B,) int64, which row of `teacher` is each row's positive; where a batch is
            one part of a larger one. Row i when None.
        temperature: of the similarities, above 0.
        symmetric: add the same with both sides changed over: the SUM of both directions, not
            their mean (COMODO's released loss).
        normalised: the rows have unit length already; they are scaled to it otherwise.
        reduction: "mean" or "sum" over rows, or "none" for (B,).

    Returns:
        A scalar, or (B,); float32 at least.

    Raises:
        ModelError: shapes that do not fit.
        RecipeError: a temperature that is not above 0, an unknown reduction, or explicit
            negatives or positives together with `symmetric`.
    """
    _above_zero(temperature)
    if symmetric and (negatives is not None or positives is not None):
        raise RecipeError("the symmetric form has the negatives and positives of the batch only")
    _check_rows(student, teacher, same=positives is None)
    q, k = _unit(student, normalised), _unit(teacher, normalised)
    own = torch.arange(len(q), device=q.device)
    if negatives is None:
        logits = q @ k.T / temperature
        target = own if positives is None else positives
        each = -logits.log_softmax(1)[own, target]
        if symmetric:
            each = each - logits.T.log_softmax(1)[own, own]
        return _reduced(each, reduction)
    pairs = k if positives is None else k[positives]
    other = _unit(negatives, normalised)
    if other.shape[-1] != q.shape[1] or other.ndim not in (2, 3):
        raise ModelError(
            f"negatives (N, D) or (B, N, D) with D = {q.shape[1]} are needed, got "
            f"{tuple(other.shape)}"
        )
    if other.ndim == 3 and len(other) != len(q):
        raise ModelError(f"{len(other)} rows of own negatives do not fit {len(q)} rows")
    apart = q @ other.T if other.ndim == 2 else (other @ q[:, :, None])[:, :, 0]
    logits = torch.cat([(q * pairs).sum(1, keepdim=True), apart], 1) / temperature
    return _reduced(-logits.log_softmax(1)[:, 0], reduction)


def anchor_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    normalised: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""The student's similarities to anchors against the teacher's (SEED, Fang et al. 2021).

    .. math::
        L_b = -\sum_j P_{bj} \log p_{bj}, \quad
        P_b = \mathrm{softmax}_j(z^t_b a_j / \tau_t), \quad
        p_b = \mathrm{softmax}_j(z^s_b a_j / \tau_s)

    It exceeds the forward Kullback-Leibler divergence by the entropy of P. Only the student
    gets a gradient; the mean is over rows, not over anchors.

    Args:
        student: z^s, (B, D).
        teacher: z^t, (B, D); taken as it is, never scaled.
        anchors: a, (M, D); taken as they are.
        student_temperature: above 0.
        teacher_temperature: above 0.
        normalised: the student's rows have unit length already; they are scaled to it otherwise.
        reduction: "mean" or "sum" over rows, or "none" for (B,).

    Returns:
        A scalar, or (B,); float32 at least.

    Raises:
        ModelError: shapes that do not fit.
        RecipeError: a temperature that is not above 0; an unknown reduction.
    """
    _above_zero(student_temperature, teacher_temperature)
    _check_rows(student, teacher, same=True)
    if anchors.ndim != 2 or anchors.shape[1] != student.shape[1] or len(anchors) == 0:
        raise ModelError(
            f"anchors (M, {student.shape[1]}) are needed for vectors of width "
            f"{student.shape[1]}, got {tuple(anchors.shape)}"
        )
    ours = _unit(student, normalised)
    theirs, held = wide(teacher.detach()), wide(anchors.detach())
    target = (theirs @ held.T / teacher_temperature).softmax(1)
    likelihood = (ours @ held.to(ours.dtype).T / student_temperature).log_softmax(1)
    return _reduced(-(target.to(likelihood.dtype) * likelihood).sum(1), reduction)


def _unit(rows: Tensor, normalised: bool) -> Tensor:
    rows = wide(rows)
    return rows if normalised else normalize(rows, dim=-1)


def _above_zero(*temperatures: float) -> None:
    if min(temperatures) <= 0:
        told = " and ".join(f"{t:g}" for t in temperatures)
        raise RecipeError(f"temperatures must be above 0: {told}")


def _check_rows(student: Tensor, teacher: Tensor, *, same: bool) -> None:
    fits = student.ndim == teacher.ndim == 2 and student.shape[1] == teacher.shape[1]
    if not fits or (same and len(student) != len(teacher)) or len(student) == 0:
        raise ModelError(
            "rows of equal width are needed, (B, D) of student and teacher, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def _reduced(each: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return each
    if reduction == "mean":
        return each.mean()
    if reduction == "sum":
        return each.sum()
    raise RecipeError(f"reduction must be 'mean', 'sum' or 'none', got '{reduction}'")
