r"""Forward KL inside a band of the teacher's distribution, whose limits may be learnt.

Per item, `p` the teacher's and `q` the student's distribution over V classes, a lower and an
upper quantile `l < u` choose a band of `p`; with the target it makes the kept set

.. math:: S = \{v : t_l \le p(v) \le t_u\} \cup \{y\}

on which both sides are renormalised: :math:`\sum_S \tilde p \log(\tilde p / \tilde q)`. The hard
set gives no gradient to l and u, so each class passes a straight-through gate: its value is
whether it is in S, its slope that of
:math:`\sigma((\log p_v - \log t_l)/s)\,\sigma((\log t_u - \log p_v)/s)`; the target's gate is 1.

Gradients are written down in closed form while a block of rows is in the cache, so that memory
is one gradient of the student's logits, whatever the vocabulary (`losses/row_blocks.py`); a
projection to a vocabulary can be cut as well (`losses/chunked.py`, with `items`).

Source: the token term of Multi-Granularity Semantic Revision (arXiv 2407.10068); scales, gates and
renormalisation are reconstructed, since no code was released.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import SparseDistribution
from stillhouse.losses.row_blocks import block_of

Scale = Literal["logrank", "linear"]
SCALES = ("logrank", "linear")
Renorm = Literal["both", "none"]
RENORMS = ("both", "none")


class Clipped(NamedTuple):
    """A clipped divergence, item by item.

    Attributes:
        loss: (...) divergence on the kept set.
        mass: (...) the teacher's probability of the kept set; its slope reaches the quantiles.
        size: (...) int64, number of kept classes.
    """

    loss: Tensor
    mass: Tensor
    size: Tensor


class Limits(NamedTuple):
    """The band of a distribution between two quantiles.

    Attributes:
        low: (...) t_l, linearly interpolated between two probabilities.
        high: (...) t_u.
        hard_low: (...) least probability of the hard set.
        hard_high: (...) largest probability of the hard set.
        low_slope: (...) derivative of `low` in the lower quantile.
        high_slope: (...) derivative of `high` in the upper quantile.
    """

    low: Tensor
    high: Tensor
    hard_low: Tensor
    hard_high: Tensor
    low_slope: Tensor
    high_slope: Tensor


def quantile_limits(
    descending: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    scale: Scale = "logrank",
    classes: int | None = None,
) -> Limits:
    """The probabilities at two quantiles.

    "linear" is the ordinary quantile of the V values: position `l (V - 1)` from below. A quantile
    of tens of thousands of values near zero cannot resolve the head of the distribution; so
    "logrank" counts ranks from above on a logarithmic scale: kept are the ranks from
    `V^(1 - u) - 1` (classes left out at the top) to `V^(1 - l)` (rank of the last kept class).
    There the hard set takes whole ranks, rounded outwards; with the interpolated value the top
    class would drop out as soon as u < 1. (0, 1) keeps all classes on both scales.

    Args:
        descending: (..., K) probabilities from the largest to the smallest; K = V, or the K
            largest of V, at which the lower limit then ends.
        lower: (...) l in [0, 1].
        upper: (...) u in [l, 1].
        scale: "logrank" or "linear".
        classes: V, when only the largest are given.

    Raises:
        RecipeError: an unknown scale.
        ModelError: shapes that do not fit.
    """
    if scale not in SCALES:
        raise RecipeError(f"unknown quantile scale '{scale}'{nearest(scale, SCALES)}")
    held = descending.shape[-1]
    number = held if classes is None else classes
    if lower.shape != descending.shape[:-1] or upper.shape != lower.shape:
        raise ModelError(
            f"quantiles of shape {tuple(lower.shape)} and {tuple(upper.shape)} do not fit "
            f"distributions of shape {tuple(descending.shape)}"
        )
    lower, upper = lower.to(descending.dtype), upper.to(descending.dtype)
    if scale == "linear":
        # From below, so that whole positions stay whole: (V - 1)(1 - u) would round elsewhere.
        at_low, at_high = ((number - 1) - x * (number - 1) for x in (lower, upper))
        low_rate = high_rate = torch.full_like(lower, -(number - 1.0))
    else:
        base = torch.full_like(lower, float(number))
        ranks = torch.pow(base, 1.0 - lower), torch.pow(base, 1.0 - upper)
        at_low, at_high = (x - 1.0 for x in ranks)
        low_rate, high_rate = (-math.log(number) * x for x in ranks)
    low, low_slope = _interpolated(descending, at_low)
    high, high_slope = _interpolated(descending, at_high)
    hard_low, hard_high = low, high
    if scale == "logrank":
        hard_low = _at(descending, at_low.ceil())
        hard_high = _at(descending, at_high.floor())
    return Limits(low, high, hard_low, hard_high, low_slope * low_rate, high_slope * high_rate)


def _at(descending: Tensor, position: Tensor) -> Tensor:
    index = position.clamp(0, descending.shape[-1] - 1).to(torch.int64)
    return descending.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _interpolated(descending: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The value at a fractional position and its slope there; flat beyond the last one."""
    last = descending.shape[-1] - 1
    whole = position.floor().clamp(0, last)
    first, second = _at(descending, whole), _at(descending, whole + 1)
    slope = (second - first) * (position <= last)
    return first + (position - whole).clamp(0, 1) * (second - first), slope


def keep_set(probabilities: Tensor, limits: Limits, target: Tensor) -> Tensor:
    """Which classes are kept: those within the hard limits, ties included, and the target.

    Args:
        probabilities: (..., K), in any order.
        limits: of these.
        target: (..., K) bool, the target's place; or (...) int64, its number.

    Returns:
        (..., K) bool.
    """
    flags = target if target.dtype == torch.bool else _flags(target, probabilities)
    low, high = limits.hard_low.unsqueeze(-1), limits.hard_high.unsqueeze(-1)
    return ((probabilities >= low) & (probabilities <= high)) | flags


def _flags(target: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, target.unsqueeze(-1), True)


def clipped_kl(
    student_logits: Tensor,
    teacher: Tensor | SparseDistribution,
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    scale: Scale = "logrank",
    renorm: Renorm = "both",
    gate_scale: float = 1.0,
) -> Clipped:
    """The forward KL on the kept set, item by item.

    No gradient reaches the teacher; the student's comes through q only; the quantiles' through
    the gates, which multiply p and q in the sum and in both normalisers (inside the logarithm of
    the ratio they cancel), and p in the kept mass.

    A stored teacher knows the K most likely classes and the mass of all others: the lower limit
    ends at the K-th, and a target outside of them is given their mean probability. It equals the
    dense form where K holds every kept class.

    Args:
        student_logits: (..., V).
        teacher: (..., V) logits, or the classes that a store has kept (K a row).
        target: (...) int64 in [0, V): always kept.
        lower: (...) lower quantile l.
        upper: (...) upper quantile u.
        scale: see `quantile_limits`.
        renorm: "both" sides on the kept set; "none" sums p log(p / q) over it as they are.
        gate_scale: s > 0, how far beyond a limit classes still pull at it.

    Returns:
        Loss, kept mass and number of kept classes, (...), at least float32.

    Raises:
        ModelError: shapes that do not fit, a single class, a target outside of the classes, or a
            store taken at another temperature than 1.
        RecipeError: an unknown scale or renorm, or a gate scale that is not above 0.
    """
    if renorm not in RENORMS:
        raise RecipeError(f"unknown renorm '{renorm}'{nearest(renorm, RENORMS)}")
    if not gate_scale > 0:
        raise RecipeError(f"the gates' scale must be above 0, not {gate_scale}")
    if scale not in SCALES:
        raise RecipeError(f"unknown quantile scale '{scale}'{nearest(scale, SCALES)}")
    lead = _checked(student_logits, teacher, (target, lower, upper))
    plan = _Plan(scale, renorm == "both", gate_scale)
    student = student_logits.reshape(-1, student_logits.shape[-1])
    flat = (target.reshape(-1), lower.reshape(-1), upper.reshape(-1))
    if isinstance(teacher, Tensor):
        given: tuple[Tensor | None, ...] = (
            teacher.detach().reshape(-1, teacher.shape[-1]),
            None,
            None,
        )
    else:
        kept = teacher.ids.shape[-1]
        given = (
            teacher.logp.detach().reshape(-1, kept),
            teacher.ids.reshape(-1, kept),
            teacher.rest.detach().reshape(-1),
        )
    loss, mass, size = _ClippedKL.apply(plan, student, *flat[1:], flat[0], *given)
    return Clipped(loss.reshape(lead), mass.reshape(lead), size.reshape(lead))


def mass_penalty(mass: Tensor, least: float = 0.9) -> Tensor:
    """How much the kept mass lacks, item by item: `relu(least - mass)`.

    The same KL minimised over the band is solved by a band of one class; this is what stands
    against it.
    """
    return (least - mass).relu()


class _Plan(NamedTuple):
    scale: Scale
    renorm: bool
    gate_scale: float


class _ClippedKL(torch.autograd.Function):
    """Values and gradients of all rows, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        student: Tensor,
        lower: Tensor,
        upper: Tensor,
        target: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        rest: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, dtype = len(student), wide(student).dtype
        loss, mass = student.new_zeros(count, dtype=dtype), student.new_zeros(count, dtype=dtype)
        size = torch.zeros_like(target)
        slope = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        # per row: d loss / d (l, u) and d mass / d (l, u)
        asked = any(ctx.needs_input_grad[2:4])
        edges = student.new_zeros(count, 4, dtype=dtype) if asked else None
        step = block_of(student)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            block = _Block(
                plan,
                student[rows],
                teacher[rows],
                None if ids is None else ids[rows],
                None if rest is None else rest[rows],
                target[rows],
                lower[rows],
                upper[rows],
            )
            loss[rows], mass[rows], size[rows] = block.loss, block.mass, block.keep.sum(-1)
            if slope is not None:
                slope[rows] = block.student_slope()
            if edges is not None:
                edges[rows] = block.edge_slopes()
        ctx.slope, ctx.edges = slope, edges
        ctx.kinds = (lower.dtype, upper.dtype)
        ctx.mark_non_differentiable(size)
        return loss, mass, size

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_loss: Tensor, of_mass: Tensor, of_size: Tensor
    ) -> tuple[Tensor | None, ...]:
        slope, edges = ctx.slope, ctx.edges
        found = None if slope is None else slope * of_loss.unsqueeze(-1).to(slope.dtype)
        low = high = None
        if edges is not None:
            both = edges[:, :2] * of_loss.unsqueeze(-1) + edges[:, 2:] * of_mass.unsqueeze(-1)
            low, high = (x.to(kind) for x, kind in zip(both.unbind(-1), ctx.kinds))
        return (None, found, low, high, None, None, None, None)


class _Block:
    """Some rows: the kept set, its divergence, and the slopes of both.

    With gates g, P = sum g p, Q = sum g q and r = log p - log q: renormalised
    L = sum g p r / P - log P + log Q, else L = sum g p r.
    """

    def __init__(
        self,
        plan: _Plan,
        student: Tensor,
        teacher: Tensor,
        ids: Tensor | None,
        rest: Tensor | None,
        target: Tensor,
        lower: Tensor,
        upper: Tensor,
    ) -> None:
        self.plan, self.ids = plan, ids
        log_q = wide(student).log_softmax(-1)
        self.q_all = log_q.exp() if ids is not None else None
        if ids is None:
            self.log_p = wide(teacher).to(log_q.dtype).log_softmax(-1)
            self.target = _flags(target, self.log_p)
            descending = self.log_p.exp().sort(-1, descending=True).values
        else:
            assert rest is not None
            self.log_p, self.ids, self.target = _with_target(
                wide(teacher).to(log_q.dtype), rest, ids, target, student.shape[-1]
            )
            descending = self.log_p[..., :-1].exp().sort(-1, descending=True).values
            log_q = log_q.gather(-1, self.ids)
        self.p, self.q = self.log_p.exp(), log_q.exp()
        self.limits = quantile_limits(
            descending, lower, upper, scale=plan.scale, classes=student.shape[-1]
        )
        # A class that the teacher rules out weighs nothing, and pads are no class at all.
        self.keep = keep_set(self.p, self.limits, self.target)
        if ids is not None:
            self.keep &= self.log_p > -math.inf
        self.ratio = (self.log_p - log_q).masked_fill(self.log_p == -math.inf, 0.0)
        kept_p = self.p * self.keep
        self.mass = kept_p.sum(-1)
        self.student_mass = (self.q * self.keep).sum(-1)
        self.sum = (kept_p * self.ratio.masked_fill(~self.keep, 0.0)).sum(-1)
        self.loss = self.sum
        if plan.renorm:
            self.loss = self.sum / self.mass - self.mass.log() + self.student_mass.log()

    def student_slope(self) -> Tensor:
        """Of the loss in the student's logits: q~ - p~ on the kept set, both renormalised."""
        kept_p = self.p * self.keep
        if self.plan.renorm:
            found = (self.q / self.student_mass.unsqueeze(-1)) * self.keep
            found -= kept_p / self.mass.unsqueeze(-1)
            return found if self.ids is None else self._spread(found)
        whole = self.q if self.q_all is None else self.q_all
        everywhere = whole * self.mass.unsqueeze(-1)
        return everywhere - (kept_p if self.ids is None else self._spread(kept_p))

    def _spread(self, values: Tensor) -> Tensor:
        assert self.q_all is not None
        assert self.ids is not None
        return torch.zeros_like(self.q_all).scatter_add_(-1, self.ids, values)

    def edge_slopes(self) -> Tensor:
        """(n, 4): d loss / d l, d loss / d u, d mass / d l, d mass / d u."""
        limits, scale = self.limits, self.plan.gate_scale
        tiny = torch.finfo(self.p.dtype).tiny
        log_low, log_high = (x.clamp_min(tiny).log().unsqueeze(-1) for x in limits[:2])
        above = ((self.log_p - log_low) / scale).sigmoid()
        below = ((log_high - self.log_p) / scale).sigmoid()
        soft = (above * below).masked_fill(self.target, 0.0)
        by_low = -soft * (1.0 - above) / scale  # d gate / d log t_l
        by_high = soft * (1.0 - below) / scale
        of_loss = self.p * self.ratio  # d loss / d gate
        if self.plan.renorm:
            mass = self.mass.unsqueeze(-1)
            of_loss = (of_loss - self.p * (self.sum / self.mass + 1.0).unsqueeze(-1)) / mass
            of_loss = of_loss + self.q / self.student_mass.unsqueeze(-1)
        slopes = (
            limits.low_slope / limits.low.clamp_min(tiny),
            limits.high_slope / limits.high.clamp_min(tiny),
        )
        found = [
            (of * gate).sum(-1) * slope
            for of in (of_loss, self.p)
            for gate, slope in zip((by_low, by_high), slopes)
        ]
        return torch.stack(found, -1)


def _with_target(
    log_p: Tensor, rest: Tensor, ids: Tensor, target: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept classes with a last column for a target that is not among them.

    Returns:
        Log-probabilities, classes and the target's place, each (n, K + 1); the last column is
        ruled out (minus infinity) where the target is kept anyway.
    """
    among = (ids == target.unsqueeze(-1)) & (log_p > -math.inf)
    missing = max(1, classes - ids.shape[-1])
    share = wide(rest).to(log_p.dtype) - math.log(missing)
    alone = share.masked_fill(among.any(-1), -math.inf).unsqueeze(-1)
    flags = torch.cat([among, alone > -math.inf], -1)
    return torch.cat([log_p, alone], -1), torch.cat([ids, target.unsqueeze(-1)], -1), flags


def _checked(
    student: Tensor, teacher: Tensor | SparseDistribution, rows: tuple[Tensor, ...]
) -> torch.Size:
    lead = student.shape[:-1]
    if student.ndim == 0 or student.shape[-1] < 2:
        raise ModelError(f"logits of shape {tuple(student.shape)} have fewer than two classes")
    if isinstance(teacher, Tensor):
        if teacher.shape != student.shape:
            raise ModelError(
                f"student logits have shape {tuple(student.shape)}, teacher logits "
                f"{tuple(teacher.shape)}; both must be over the same classes"
            )
    else:
        if teacher.ids.shape[:-1] != lead:
            raise ModelError(
                f"kept classes of shape {tuple(teacher.ids.shape)} do not fit student logits of "
                f"shape {tuple(student.shape)}: the leading dimensions must be equal"
            )
        if float(teacher.temperature) != 1.0:
            raise ModelError(
                f"kept probabilities were taken at temperature {teacher.temperature:g}; a band of "
                "the teacher's own distribution needs temperature 1"
            )
    for name, value in zip(("target", "lower quantile", "upper quantile"), rows, strict=True):
        if value.shape != lead:
            raise ModelError(
                f"the {name} has shape {tuple(value.shape)}, the logits have items of shape "
                f"{tuple(lead)}"
            )
    return lead


# ------------------------------------------------------------------ what chooses the band


def band_features(student_logits: Tensor, teacher: Tensor | SparseDistribution, k: int) -> Tensor:
    """What a band is chosen by: the teacher's head, the student's view of it, both entropies.

    The k largest log-probabilities of the teacher, descending; the student's at the same
    classes; the teacher's entropy; the student's. Nothing carries a gradient.

    Args:
        student_logits: (..., V).
        teacher: (..., V) logits, or kept classes, whose missing mass then counts as spread
            evenly over the missing classes.
        k: number of classes, at most V or as many as are kept.

    Returns:
        (..., 2 k + 2), at least float32.

    Raises:
        ModelError: more classes are asked than there are.
    """
    log_q = wide(student_logits.detach()).log_softmax(-1)
    dense = isinstance(teacher, Tensor)
    log_p = wide(teacher.detach()).log_softmax(-1) if dense else wide(teacher.logp.detach())  # type: ignore[union-attr]
    log_p = log_p.to(log_q.dtype)
    if not 1 <= k <= log_p.shape[-1]:
        raise ModelError(
            f"{k} classes are to be features, {'there are' if dense else 'the store keeps'} "
            f"{log_p.shape[-1]}"
        )
    values, places = log_p.topk(k, -1)
    classes = places if dense else teacher.ids.gather(-1, places)  # type: ignore[union-attr]
    entropy = _entropy(log_p)
    if not isinstance(teacher, Tensor):
        rest = wide(teacher.rest.detach()).to(log_q.dtype)
        missing = math.log(max(1, log_q.shape[-1] - log_p.shape[-1]))
        entropy = entropy - (rest.exp() * (rest - missing)).masked_fill(rest == -math.inf, 0.0)
    floor = torch.finfo(log_q.dtype).min
    found = [
        values.clamp_min(floor),
        log_q.gather(-1, classes).clamp_min(floor),
        entropy.unsqueeze(-1),
        _entropy(log_q).unsqueeze(-1),
    ]
    return torch.cat(found, -1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
