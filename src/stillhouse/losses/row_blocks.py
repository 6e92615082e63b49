"""Losses of wide rows in little memory: block by block, the gradient made on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers of a block. On the CPU its dozen temporaries then stay in the cache (1 MB each in
# float32); elsewhere blocks are as large as to keep the device busy.
_CPU, _ELSEWHERE = 1 << 18, 1 << 24


def by_rows(items: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`items(*rows)`, one value per row, computed for some rows at a time.

    A divergence over a vocabulary has a dozen temporaries of the size of the logits, which its
    graph keeps. Rows do not touch each other, so the gradient of every block is made right
    after its value and all that is kept is one gradient per input that wants one. Value and
    gradient are those of `items(*rows)`; so are second derivatives, which are made from it.

    Args:
        items: `items(*rows) -> (...)`, the leading shape; it uses no other trainable tensor.
        *rows: tensors with one leading shape; (..., classes) the first.

    Returns:
        The leading shape.
    """
    lead = rows[0].shape[:-1]
    size = block_of(rows[0])
    if math.prod(lead) <= size or not eager():
        return items(*rows)
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in rows]
    if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
        found: Tensor = _Blocks.apply(items, size, *flat)
        return found.reshape(lead)
    parts = zip(*(torch.split(x, size) for x in flat), strict=True)
    return torch.cat([items(*part) for part in parts]).reshape(lead)


def block_of(first: Tensor) -> int:
    """How many rows of (..., classes) are taken at a time."""
    limit = _CPU if first.device.type == "cpu" else _ELSEWHERE
    return max(1, limit // max(1, first.shape[-1]))


def graph_is_kept() -> bool:
    """Whether this backward pass keeps its graph for another one; True where it is not known."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def eager() -> bool:
    """Neither compiled nor under a transform of functions, which want to see the whole."""
    if torch.compiler.is_compiling():
        return False
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and not active()


class _Blocks(torch.autograd.Function):
    """Gradient in forward, block by block; scaled row by row in backward."""

    @staticmethod
    def forward(ctx: Any, items: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        ctx.items, ctx.needed = items, needed
        ctx.save_for_backward(*rows)
        ctx.grads = [torch.empty_like(x) if n else None for x, n in zip(rows, needed)]
        values = []
        for start in range(0, len(rows[0]), size):
            part = [
                x[start : start + size].detach().requires_grad_(n) for x, n in zip(rows, needed)
            ]
            values.append(_block(items, part, ctx.grads, start))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.saved_tensors  # refuses a second pass through a graph that was not kept
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(ctx.items, rows, ctx.needed, grad))
        kept, grads = graph_is_kept(), ctx.grads
        if not kept:
            ctx.grads = None
        found: list[Tensor | None] = []
        for held in grads:
            if held is None:
                found.append(None)
                continue
            factor = grad.reshape(-1, *[1] * (held.ndim - 1)).to(held.dtype)
            found.append(held * factor if kept else held.mul_(factor))
        return (None, None, *found)


def _block(
    items: Callable[..., Tensor], part: list[Tensor], grads: list[Tensor | None], start: int
) -> Tensor:
    """The values of one block; its gradients are written to `grads`."""
    asked = [x for x in part if x.requires_grad]
    with torch.enable_grad():
        values = items(*part)
        total = values.sum()
    found = iter(torch.autograd.grad(total, asked, allow_unused=True))
    for x, into in zip(part, grads):
        if into is not None:
            made = next(found)
            rows = into[start : start + len(x)]
            rows.zero_() if made is None else rows.copy_(made)
    return values.detach()


def _differentiable(
    items: Callable[..., Tensor], rows: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradient as a function of the rows, for second derivatives."""
    asked = [x for x, n in zip(rows, needed) if n]
    values = items(*rows)
    found = iter(torch.autograd.grad(values, asked, grad, create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needed]
