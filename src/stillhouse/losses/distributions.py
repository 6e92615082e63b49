"""Distances between distributions, gradients and trajectories; pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import ModelError, RecipeError

Counts = int | Sequence[int]


def class_means(values: Tensor, counts: Counts) -> Tensor:
    """Mean over the samples of each class of a class-major batch.

    Args:
        values: (N, ...), all rows of class 0 first, then of class 1, ...
        counts: rows per class when all have equally many, or a list of K counts.

    Returns:
        (K, ...), float32 at least.

    Raises:
        ModelError: counts that do not add up to N, or a class without rows.
    """
    values = _at_least_float32(values)
    rows = len(values)
    if isinstance(counts, int):
        if counts < 1 or rows % counts:
            raise ModelError(f"{rows} rows are no whole number of classes of {counts} rows")
        return values.reshape(rows // counts, counts, *values.shape[1:]).mean(1)
    if sum(counts) != rows or min(counts, default=0) < 1:
        raise ModelError(f"counts {list(counts)} must be positive and add up to {rows} rows")
    return torch.stack([part.mean(0) for part in torch.split(values, list(counts))])


def dm(
    synthetic: Tensor,
    real: Tensor,
    *,
    synthetic_counts: Counts,
    real_counts: Counts,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """Distribution matching: squared distance between class means, summed over dimensions.

    `sum_c || mean_b real - mean_b synthetic ||^2` (Zhao & Bilen, Dataset Condensation with
    Distribution Matching, WACV 2023; the loss of the released code). No gradient reaches the
    real side.

    Args:
        synthetic: (N, D) embeddings, class-major.
        real: (M, D) embeddings, class-major, the same classes.
        synthetic_counts: rows per class; see `class_means`.
        real_counts: rows per class; classes may differ.
        reduction: "sum" over classes, or "none" for one value per class.

    Returns:
        A scalar, or (K,).
    """
    ours = class_means(synthetic, synthetic_counts).flatten(1)
    theirs = class_means(real.detach(), real_counts).flatten(1)
    _check_same(ours, theirs)
    return _reduce((theirs - ours).square().sum(1), reduction)


def characteristic(features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The empirical characteristic function at some frequencies, real and imaginary part.

    `Phi(t) = mean_b exp(j t . f_b)`.

    Args:
        features: (B, D).
        frequencies: (F, D).

    Returns:
        `(real, imaginary)`, each (F,), float32 at least; `|Phi| <= 1`.

    Raises:
        ModelError: features and frequencies of different width, or no rows.
    """
    features, frequencies = _at_least_float32(features), _at_least_float32(frequencies)
    if features.ndim != 2 or frequencies.ndim != 2 or features.shape[1] != frequencies.shape[1]:
        raise ModelError(
            f"features (B, D) and frequencies (F, D) are needed, got {tuple(features.shape)} "
            f"and {tuple(frequencies.shape)}"
        )
    if len(features) == 0 or len(frequencies) == 0:
        raise ModelError("a characteristic function needs one row and one frequency at least")
    angles = features @ frequencies.T
    return angles.cos().mean(0), angles.sin().mean(0)


def cf_distance(
    synthetic: Tensor,
    real: Tensor,
    frequencies: Tensor,
    *,
    amplitude: float = 0.5,
    phase: float = 0.5,
    floor: float = 1e-12,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Distance between the characteristic functions of two samples.

    With `Phi` and `Phi'` at a frequency, `amp = (|Phi| - |Phi'|)^2` and
    `pha = 2 (|Phi| |Phi'| - Re(Phi) Re(Phi') - Im(Phi) Im(Phi'))`, the distance is the mean
    over frequencies of `sqrt(amplitude * amp + phase * max(pha, floor))` (Wang et al., Dataset
    Distillation with Neural Characteristic Function, CVPR 2025, equation 8 and released code).
    With both weights 1 the root is `|Phi - Phi'|`.

    Identical samples give `sqrt(phase * floor)` and a finite gradient; without the floor the
    root has none. No gradient reaches the real side; frequencies receive one when they ask.

    Args:
        synthetic: (B, D) features.
        real: (M, D) features; M and B may differ.
        frequencies: (F, D). For rows of unit length standard normal ones fit: the angles are
            standard normal then, while long features make both functions vanish everywhere.
        amplitude: weight of the amplitudes' difference (spread, diversity).
        phase: weight of the phases' difference (location).
        floor: least value of the phase part.
        reduction: "mean" over frequencies, or "none" for (F,).

    Raises:
        ModelError: widths that do not fit.
        RecipeError: a negative weight, or both 0; an unknown reduction.
    """
    if amplitude < 0 or phase < 0 or amplitude + phase == 0:
        raise RecipeError(
            f"weights of amplitude and phase must be positive, got {amplitude} and {phase}"
        )
    ours = characteristic(synthetic, frequencies)
    theirs = characteristic(real.detach(), frequencies)
    norms = _length(*ours), _length(*theirs)
    amp = (norms[1] - norms[0]).square()
    pha = 2.0 * (norms[1] * norms[0] - theirs[0] * ours[0] - theirs[1] * ours[1])
    roots = (amplitude * amp + phase * pha.clamp_min(floor)).clamp_min(1e-30).sqrt()
    if reduction == "none":
        return roots
    if reduction == "mean":
        return roots.mean()
    raise RecipeError(f"reduction must be 'mean' or 'none', got '{reduction}'")


def mmd_rbf(
    first: Tensor,
    second: Tensor,
    *,
    kernels: int = 5,
    factor: float = 2.0,
    bandwidth: float | None = None,
    biased: bool = True,
) -> Tensor:
    r"""Squared maximum mean discrepancy under a sum of RBF kernels.

    `mean(K_11) + mean(K_22) - mean(K_12) - mean(K_21)` with
    `k(a, b) = sum_i exp(-|a - b|^2 / (h factor^i))`, the diagonal included (the biased form; as
    released with FedLGD and DAN). The bandwidth gets no gradient.

    Args:
        first: (N, D) samples.
        second: (M, D) samples.
        kernels: how many.
        factor: between the bandwidths of neighbouring kernels.
        bandwidth: h times factor^(kernels // 2), the middle one; none: the mean squared distance
            of different rows of both samples together.
        biased: keep the diagonal. Without it the mean over samples does not depend on their
            size (the U-statistic of Gretton et al., JMLR 2012), and the value may be negative;
            of a single row the diagonal is all there is, and is kept.

    Raises:
        ModelError: widths that differ, or an empty sample.
        RecipeError: no kernel, or a factor or bandwidth that is not above 0.
    """
    if kernels < 1 or factor <= 0 or (bandwidth is not None and bandwidth <= 0):
        raise RecipeError(
            f"one kernel at least and widths above 0 are needed: kernels {kernels}, factor "
            f"{factor}, bandwidth {bandwidth}"
        )
    first, second = _at_least_float32(first), _at_least_float32(second)
    fits = first.ndim == second.ndim == 2 and first.shape[1] == second.shape[1]
    if not fits or len(first) == 0 or len(second) == 0:
        raise ModelError(
            f"samples (N, D) and (M, D) are needed, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    rows = torch.cat([first, second])
    # Not |a|^2 + |b|^2 - 2ab, which loses half of the digits where rows are near.
    squared = (rows[:, None] - rows[None, :]).square().sum(2)
    count = len(rows)
    width = squared.detach().sum() / (count * count - count) if bandwidth is None else bandwidth
    least = width / factor ** (kernels // 2)
    kernel = torch.stack([torch.exp(-squared / (least * factor**i)) for i in range(kernels)]).sum(0)
    split = len(first)

    def within(block: Tensor) -> Tensor:
        rows = len(block)
        if biased or rows == 1:
            return block.mean()
        return (block.sum() - block.diagonal().sum()) / (rows * rows - rows)

    return (
        within(kernel[:split, :split])
        + within(kernel[split:, split:])
        - kernel[:split, split:].mean()
        - kernel[split:, :split].mean()
    )


def gradient_cosine(
    synthetic: Sequence[Tensor | None],
    real: Sequence[Tensor | None],
    *,
    form: Literal["rows", "mse", "cosine"] = "rows",
    eps: float = 1e-6,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """Distance between two lists of parameter gradients.

    "rows" is the distance of gradient matching (Zhao et al., Dataset Condensation, ICLR 2021,
    released code): for every weight tensor, flattened to (out, rest), the sum over rows of
    `1 - cos`; tensors of one dimension (biases, norms) contribute 0. "mse" is the SUM of
    squared differences and "cosine" is one minus the cosine, both over all tensors at once.

    Args:
        synthetic: gradients of the synthetic batch, one per parameter.
        real: gradients of the real batch; no gradient flows into them.
        form: see above.
        eps: added to the product of the norms.
        reduction: "none" gives one value per tensor and exists for "rows" only.

    Raises:
        ModelError: lists of different length or shapes, or nothing to compare.
        RecipeError: an unknown form or reduction.
    """
    if len(synthetic) != len(real):
        raise ModelError(f"{len(synthetic)} gradients cannot be compared with {len(real)}")
    pairs: list[tuple[Tensor, Tensor]] = [
        (_at_least_float32(s), _at_least_float32(r.detach()))
        for s, r in zip(synthetic, real, strict=True)
        if s is not None and r is not None
    ]
    for s, r in pairs:
        _check_same(s, r)
    if not pairs:
        raise ModelError("gradient distance: no gradient to compare")
    if form == "rows":
        return _reduce(torch.stack([_row_distance(s, r, eps) for s, r in pairs]), reduction)
    if reduction != "sum":
        raise RecipeError(f"gradient distance '{form}' has one value only: reduction must be 'sum'")
    ours = torch.cat([s.flatten() for s, _ in pairs])
    theirs = torch.cat([r.flatten() for _, r in pairs])
    if form == "mse":
        return (ours - theirs).square().sum()
    if form == "cosine":
        norms = torch.linalg.vector_norm(ours) * torch.linalg.vector_norm(theirs)
        distance: Tensor = 1.0 - (ours * theirs).sum() / (norms + eps)
        return distance
    raise RecipeError(f"gradient distance has no form '{form}'; known: rows, mse, cosine")


def trajectory_distance(
    student: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    start: Tensor | Sequence[Tensor],
) -> Tensor:
    """`|| student - target ||^2 / || start - target ||^2` over all parameters.

    The loss of trajectory matching (Cazenavette et al., Dataset Distillation by Matching
    Training Trajectories, CVPR 2022, equation 2). It is 1 where the student has not moved and
    0 where it has arrived; not finite where the expert stood still. No gradient reaches target
    and start.

    Args:
        student: parameters after the inner steps, a tensor or a list of tensors.
        target: the expert's later parameters, in the same form.
        start: the expert's parameters the student began with.

    Raises:
        ModelError: parameters of different shapes, or none.
    """
    ours, theirs, begun = (
        [x] if isinstance(x, Tensor) else list(x) for x in (student, target, start)
    )
    if not len(ours) == len(theirs) == len(begun):
        raise ModelError(
            f"trajectory distance: {len(ours)}, {len(theirs)} and {len(begun)} parameters"
        )
    for s, t, b in zip(ours, theirs, begun, strict=True):
        _check_same(s, t)
        _check_same(b, t)
    reached = sum(_squared(s, t.detach()) for s, t in zip(ours, theirs, strict=True))
    whole = sum(_squared(b.detach(), t.detach()) for b, t in zip(begun, theirs, strict=True))
    if not isinstance(reached, Tensor) or not isinstance(whole, Tensor):
        raise ModelError("trajectory distance: no parameters")
    return reached / whole


def _row_distance(synthetic: Tensor, real: Tensor, eps: float) -> Tensor:
    if synthetic.ndim < 2:
        return synthetic.new_zeros(())
    ours, theirs = synthetic.flatten(1), real.flatten(1)
    norms = torch.linalg.vector_norm(ours, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
    distance: Tensor = (1.0 - (ours * theirs).sum(1) / (norms + eps)).sum()
    return distance


def _length(real: Tensor, imaginary: Tensor) -> Tensor:
    """|Phi|; a value of exactly 0 gets no gradient in place of none that is finite."""
    square = real.square() + imaginary.square()
    return torch.where(square > 0, square, square.new_ones(())).sqrt() * (square > 0)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (_at_least_float32(a) - _at_least_float32(b)).square().sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ModelError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    raise RecipeError(f"reduction must be 'sum' or 'none', got '{reduction}'")
