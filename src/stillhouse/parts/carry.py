"""One memory trick for every loss that is a sum: the gradient is made piece by piece.

The graph of a piece is freed before the next piece begins, so memory is that of the largest
piece; the gradient is that of the one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stillhouse.errors import TrainingError

Piece = Callable[[], dict[str, Tensor]]


class _Carried(torch.autograd.Function):
    """A value whose gradient with respect to the inputs is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outside: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        handed = tuple(outside.to(g.dtype) * g for g in known)
        return (None, None, *handed, *(None for _ in known))


def carry(pieces: Iterable[Piece], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Sums the terms of all pieces; their gradient is computed now, handed out in backward.

    Equal to building one graph over all pieces and summing. Only the first term of the result
    carries the gradient, that of the SUM of all terms: use the terms together, with one common
    factor, and differentiate once (there is no second derivative).

    Args:
        pieces: each gives named scalar terms when called; a term's name may be missing in
            some pieces. They are called in order, once, and consumed one at a time. What is
            computed from the inputs belongs inside the pieces: their graphs are freed.
        inputs: the tensors that receive gradient; those that need none are left out. Nothing
            else that the pieces touch receives any. They may be inner nodes of a graph.

    Returns:
        The summed terms in order of first appearance.

    Raises:
        TrainingError: no piece gave a term, or gradients are wanted and no term depends on
            any of the inputs.
    """
    wanted = [t for t in inputs if t.requires_grad] if torch.is_grad_enabled() else []
    grads: list[Tensor | None] = [None] * len(wanted)
    totals: dict[str, Tensor] = {}
    for piece in pieces:
        terms = piece()
        if wanted:
            _accumulate(grads, terms, wanted)
        for name, term in terms.items():
            value = term.detach()
            totals[name] = totals[name] + value if name in totals else value
    if not totals:
        raise TrainingError("carry: the pieces gave no terms")
    reached = [(t, g) for t, g in zip(wanted, grads, strict=True) if g is not None]
    if wanted and not reached:
        raise TrainingError("carry: no term depends on any of the inputs")
    if reached:
        first = next(iter(totals))
        tensors, known = zip(*reached, strict=True)
        totals[first] = _Carried.apply(totals[first], len(tensors), *tensors, *known)
    return totals


def _accumulate(
    grads: list[Tensor | None], terms: dict[str, Tensor], wanted: Sequence[Tensor]
) -> None:
    attached = [term for term in terms.values() if term.requires_grad]
    if not attached:
        return
    whole = torch.stack([term.to(attached[0].dtype) for term in attached]).sum()
    found = torch.autograd.grad(whole, wanted, allow_unused=True)
    for index, grad in enumerate(found):
        if grad is None:
            continue
        have = grads[index]
        grads[index] = grad if have is None else have + grad
