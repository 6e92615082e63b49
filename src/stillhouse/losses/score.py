r"""Losses between score networks: noise prediction, score identity, Diff-Instruct.

Predictions of clean images stand for scores: with :math:`x_t = a x_0 + b \epsilon` the score is
:math:`(a \hat x_0 - x_t) / b^2`. Losses are sums over a sample's elements and means over samples:
a mean over elements would change both the effective learning rate and what clipping by value does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import ModelError

Reduction = Literal["mean", "sum", "none"]
FLOOR = 1e-5


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guidance as an extrapolation: (1 + scale) e_c - scale e_null.

    At 0 the conditional prediction itself. Where a source writes e_null + w (e_c - e_null), w is
    1 + scale.
    """
    if scale == 0:
        return conditional
    return (1.0 + scale) * conditional - scale * unconditional


def noise_prediction(predicted: Tensor, noise: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """The squared error of predicted noise, summed over a sample (a score network's loss).

    Args:
        predicted: (B, ...).
        noise: (B, ...), what was added.
        reduction: over samples.
    """
    _same(predicted, noise, "the predicted noise", "the noise")
    return _reduced((_wide(noise) - _wide(predicted)).square().flatten(1).sum(1), reduction)


def sample_weight(teacher_x0: Tensor, x0: Tensor, *, floor: float = FLOOR) -> Tensor:
    """How far the teacher's clean images lie from the generated ones, per sample.

    Returns:
        (B,) mean absolute differences, at least `floor`, without gradient.
    """
    apart = (_wide(teacher_x0) - _wide(x0)).detach().abs().flatten(1).mean(1)
    return apart.clamp(min=floor)


def score_identity(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    alpha: float = 1.0,
    floor: float = FLOOR,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Score identity distillation (SiD; Zhou et al. 2024), a generator's loss.

    .. math::
        \frac{1}{\omega} \sum (p - s) \left[ (p - x_0) - \alpha (p - s) \right]

    with p and s the clean images that the teacher and the network of the generator's own scores
    see in the noised :math:`x_0`. Gradients flow into all three, so the networks must be called
    with a graph to their input: detached, this is another method (`diff_instruct`).

    Args:
        x0: generated, (B, ...).
        teacher_x0: p.
        fake_x0: s.
        alpha: 1 is the safe setting, above 1 may diverge on small problems.
        floor: of omega, see `sample_weight`.
        reduction: over samples.
    """
    _same(teacher_x0, x0, "the teacher's images", "the generated ones")
    _same(fake_x0, x0, "the fake network's images", "the generated ones")
    weight = sample_weight(teacher_x0, x0, floor=floor)
    p, s, x = (_wide(v) for v in (teacher_x0, fake_x0, x0))
    apart = p - s
    each = (apart * ((p - x) - alpha * apart)).flatten(1).sum(1) / weight
    return _reduced(each, reduction)


def diff_instruct(
    x0: Tensor,
    teacher_x0: Tensor,
    fake_x0: Tensor,
    *,
    floor: float = FLOOR,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Diff-Instruct (Luo et al. 2023; VSD): :math:`\sum (p - s)(s - x_0) / \omega`.

    p and s count as constants: the gradient reaches the generated images directly, and not
    through the networks.

    Args:
        x0: generated, (B, ...).
        teacher_x0: p.
        fake_x0: s.
        floor: of omega, see `sample_weight`.
        reduction: over samples.
    """
    p, s = teacher_x0.detach(), fake_x0.detach()
    return score_identity(x0, p, s, alpha=1.0, floor=floor, reduction=reduction)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _same(one: Tensor, other: Tensor, what: str, than: str) -> None:
    if one.shape != other.shape:
        raise ModelError(
            f"{what} have shape {tuple(one.shape)}, {than} {tuple(other.shape)}; they must agree"
        )


def _reduced(each: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return each
    if reduction in ("mean", "sum"):
        return each.mean() if reduction == "mean" else each.sum()
    raise ModelError(f"reduction is mean, sum or none, not '{reduction}'")
