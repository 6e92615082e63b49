r"""Spans of tokens as units: products of neighbouring distributions, matched with a teacher's.

For neighbours k, k + 1 inside a span, :math:`c_k = p_k \odot p_{k+1}` over the vocabulary: large
where both tokens agree. Matching :math:`c` couples the errors of tokens that belong together,
which per-token losses do not see.

Source: Multi-Granularity Semantic Revision (arXiv 2407.10068, equation 10); the distance is
reconstructed, since no code was released.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import SparseDistribution
from stillhouse.losses.row_blocks import block_of

Distance = Literal["l2", "kl_norm", "cos"]
DISTANCES = ("l2", "kl_norm", "cos")


def pairs_of(intervals: Tensor) -> Tensor:
    """Neighbouring positions inside token intervals.

    Args:
        intervals: (n, 3) int64 row, first and last token, both included. An interval of fewer
            than two tokens has no pair.

    Returns:
        (m, 2) int64 row and the first position of each pair, interval by interval.

    Raises:
        ModelError: not of that shape, or an interval that ends before it begins by more than one.
    """
    if intervals.ndim != 2 or intervals.shape[-1] != 3:
        raise ModelError(
            f"token intervals (n, 3) hold row, first and last token, not {tuple(intervals.shape)}"
        )
    lengths = (intervals[:, 2] - intervals[:, 1]).clamp_min(0)
    rows = intervals[:, 0].repeat_interleave(lengths)
    starts = intervals[:, 1].repeat_interleave(lengths)
    ends = lengths.cumsum(0)
    within = torch.arange(len(rows), device=intervals.device) - (ends - lengths).repeat_interleave(
        lengths
    )
    return torch.stack([rows, starts + within], -1)


def pair_distance(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    distance: Distance = "l2",
) -> Tensor:
    """The distance between two products of neighbouring distributions, pair by pair.

    Args:
        student: logits (n, V) of the first and of the second token.
        teacher: the same of the teacher; no gradient reaches it.
        distance: "l2" is the squared norm of the difference, summed over the vocabulary (a mean
            over it would make the term vanish); "kl_norm" the forward KL of both products
            renormalised; "cos" one minus their cosine.

    Returns:
        (n,), at least float32.

    Raises:
        RecipeError: an unknown distance.
    """
    if distance not in DISTANCES:
        raise RecipeError(f"unknown distance of spans '{distance}'{nearest(distance, DISTANCES)}")
    ours = wide(student[0]).log_softmax(-1) + wide(student[1]).log_softmax(-1)
    with torch.no_grad():
        theirs = (wide(teacher[0]).log_softmax(-1) + wide(teacher[1]).log_softmax(-1)).to(ours)
    if distance == "kl_norm":
        log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
        absent = log_p == -torch.inf
        return (log_p.exp() * (log_p - log_q).masked_fill(absent, 0.0)).sum(-1)
    if distance == "cos":
        # In logarithms up to the last step: products of small probabilities underflow.
        both = (ours + theirs).logsumexp(-1)
        norms = 0.5 * ((2 * ours).logsumexp(-1) + (2 * theirs).logsumexp(-1))
        return -torch.expm1(both - norms)
    return (theirs.exp() - ours.exp()).square().sum(-1)


def span_product(
    student_logits: Tensor,
    teacher_logits: Tensor,
    intervals: Tensor,
    *,
    distance: Distance = "l2",
) -> Tensor:
    """Mean distance of the products of neighbouring distributions inside spans.

    Pairs are taken some at a time, so that memory is one gradient of the student's logits.

    Args:
        student_logits: (B, L, V).
        teacher_logits: (B, L, V).
        intervals: (n, 3) int64 row, first and last token, both included; see `pairs_of`.
        distance: see `pair_distance`.

    Returns:
        A scalar: the mean over all pairs of the batch, 0 when there is none.

    Raises:
        ModelError: shapes that do not fit, or an interval outside of the batch.
        RecipeError: an unknown distance.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 3:
        raise ModelError(
            f"student logits have shape {tuple(student_logits.shape)}, teacher logits "
            f"{tuple(teacher_logits.shape)}; both must be (batch, tokens, vocabulary)"
        )
    pairs = pairs_of(intervals)
    rows, tokens, width = student_logits.shape
    if len(pairs) and bool(((pairs < 0) | (pairs >= pairs.new_tensor([rows, tokens - 1]))).any()):
        raise ModelError(f"a span lies outside of a batch of {rows} rows of {tokens} tokens")
    first = (pairs[:, 0] * tokens + pairs[:, 1]).to(student_logits.device)
    teacher = teacher_logits.reshape(-1, width)
    return pair_products(student_logits.reshape(-1, width), teacher, first, distance=distance)


def pair_products(
    student_logits: Tensor,
    teacher: Tensor | SparseDistribution,
    first: Tensor,
    *,
    distance: Distance = "l2",
) -> Tensor:
    """As `span_product`, of tokens that stand one below another.

    Args:
        student_logits: (n, V).
        teacher: (n, V) logits, or the classes that a store has kept; what is missing counts as
            spread evenly over the missing classes.
        first: (m,) int64 in [0, n - 1): each pair is a row and the one below it.
        distance: see `pair_distance`.

    Returns:
        A scalar: the mean over all pairs, 0 when there is none.

    Raises:
        RecipeError: an unknown distance.
    """
    if distance not in DISTANCES:
        raise RecipeError(f"unknown distance of spans '{distance}'{nearest(distance, DISTANCES)}")
    if isinstance(teacher, Tensor):
        given: tuple[Tensor, ...] = (teacher.detach(),)
    else:
        given = (teacher.logp.detach(), teacher.ids, teacher.rest.detach())

    def items(ours: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
        theirs = [spread(*(x[rows] for x in given), ours[0].shape[-1]) for rows in at]
        return pair_distance(ours, (theirs[0], theirs[1]), distance)

    total: Tensor = _Pairs.apply(items, first, student_logits)
    return total / max(1, len(first))


def spread(log_p: Tensor, *kept: Any) -> Tensor:
    """(n, V) log-probabilities of kept classes, the missing mass spread over all others.

    Args:
        log_p: (n, K) of the kept classes; or (n, V) logits, which are returned as they are.
        *kept: (n, K) classes, (n,) log of the missing mass, and V; or V alone.
    """
    if len(kept) == 1:
        return log_p
    ids, rest, classes = kept
    share = wide(rest) - math.log(max(1, classes - ids.shape[-1]))
    whole = share.unsqueeze(-1).expand(-1, classes).contiguous()
    return whole.scatter(-1, ids, wide(log_p).to(whole))


class _Pairs(torch.autograd.Function):
    """The sum over pairs of neighbouring rows, block by block, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        items: Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor],
        first: Tensor,
        student: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=wide(student).dtype, device=student.device)
        ctx.slope = None
        if ctx.needs_input_grad[2]:
            ctx.slope = torch.zeros_like(student, dtype=total.dtype)
        ctx.kind = student.dtype
        for part in torch.split(first, block_of(student)):
            places = (part, part + 1)
            ours = [student[at].detach().requires_grad_(ctx.slope is not None) for at in places]
            with torch.enable_grad():
                found = items((ours[0], ours[1]), places).sum()
            if ctx.slope is not None:
                for at, slope in zip(places, torch.autograd.grad(found, ours)):
                    ctx.slope.index_add_(0, at, slope.to(total.dtype))
            total += found.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope = None if ctx.slope is None else (ctx.slope * grad).to(ctx.kind)
        return (None, None, slope)
