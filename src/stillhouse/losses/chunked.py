"""Losses over a large vocabulary in little memory: one strategy, whatever the divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.row_blocks import graph_is_kept


def chunked(
    loss: Callable[..., Tensor],
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    *rows: Tensor,
    chunk_size: int = 128,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """Any per-item loss on top of a vocabulary projection, without ever holding all logits.

    The items are cut into chunks; each chunk is projected, its loss and its gradient are
    computed at once in the forward pass, and its logits are dropped. Backward only hands
    the gradients out (the strategy of Liger Kernel's chunked losses, Hsu et al. 2024). Value
    and gradients equal those of the dense computation and do not depend on the chunk size.
    Masked items are not projected at all.

    Example:
        Forward KL over a vocabulary, the teacher projected chunk by chunk as well::

            chunked(
                lambda logits, teacher_hidden: kl(
                    logits, teacher_head(teacher_hidden), reduction="none"
                ),
                student_hidden, student_head, teacher_hidden.detach(), mask=mask,
            )

    Args:
        loss: `loss(logits, *rows) -> (n,)`, one value per item, from logits (n, classes)
            and the matching rows. Scaling or soft-capping of the logits belongs here or in
            `head`.
        hidden: (..., width), input of the head.
        head: module or function from (n, width) to (n, classes). An `nn.Linear` takes a
            path that accumulates its weight's gradient in place.
        *rows: tensors with the leading shape of `hidden` (targets, teacher logits or
            states); they receive gradients when they require them.
        chunk_size: items at a time, >= 1.
        mask: leading shape; bool, or weights >= 0.
        reduction: "mean" over the valid items, or "sum".
        parameters: trainable tensors that `head` (when it is not a module) or `loss` use.

    Returns:
        A scalar.

    Raises:
        ModelError: leading shapes differ, `loss` does not give one value per item, or a
            trainable tensor is used that would get no gradient.
        RecipeError: a setting out of range.
    """
    if reduction not in ("mean", "sum"):
        raise RecipeError(f"reduction must be 'mean' or 'sum' here, not '{reduction}'")
    if chunk_size < 1:
        raise RecipeError(f"chunk_size must be at least 1, not {chunk_size}")
    lead = hidden.shape[:-1]
    for name, value in [("mask", mask), *((f"rows[{i}]", row) for i, row in enumerate(rows))]:
        if value is not None and value.shape[: len(lead)] != lead:
            raise ModelError(
                f"{name} of shape {tuple(value.shape)} does not fit hidden states of shape "
                f"{tuple(hidden.shape)}: the leading dimensions must be equal"
            )
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in (hidden, *rows)]
    weights = None if mask is None else mask.reshape(-1)
    if weights is not None:
        valid = weights.nonzero().squeeze(-1)
        flat = [x.index_select(0, valid) for x in flat]
        weights = weights.index_select(0, valid).to(wide(hidden).dtype)
    trained = [p for p in _parameters(head, parameters) if p.requires_grad]
    plan = _Chunks(loss, head, chunk_size, weights, reduction, len(flat), trained)
    result: Tensor = _ChunkedLoss.apply(plan, *flat, *trained)
    return result


class _Chunks:
    """What a chunked loss computes, and how it is cut; no tensors of the graph."""

    def __init__(
        self,
        loss: Callable[..., Tensor],
        head: Callable[[Tensor], Tensor],
        size: int,
        weights: Tensor | None,
        reduction: str,
        inputs: int,
        trained: Sequence[Tensor],
    ) -> None:
        self.loss = loss
        self.head = head
        self.size = size
        self.weights = weights
        self.mean = reduction == "mean"
        self.inputs = inputs
        self.trained = list(trained)
        self.differentiate = torch.is_grad_enabled()

    def bounds(self, count: int) -> Iterator[tuple[int, int]]:
        for start in range(0, count, self.size):
            yield start, min(start + self.size, count)

    def share(self, count: int) -> float | Tensor:
        """What every item's value is multiplied by."""
        if not self.mean or count == 0:
            return 1.0
        return 1.0 / count if self.weights is None else self.weights.sum().reciprocal()

    def value(
        self, logits: Tensor, rows: Sequence[Tensor], start: int, share: float | Tensor
    ) -> Tensor:
        items = self.loss(logits, *rows)
        if items.shape != logits.shape[:1]:
            raise ModelError(
                f"a chunked loss must give one value per item: expected shape "
                f"{tuple(logits.shape[:1])}, got {tuple(items.shape)} (use reduction='none')"
            )
        if self.weights is not None:
            items = items * self.weights[start : start + len(items)]
        return items.sum() * share

    @property
    def linear(self) -> nn.Linear | None:
        """The head, when it is a bare linear layer whose gradient can be written in place."""
        head = self.head
        if type(head) is not nn.Linear or torch.is_autocast_enabled(head.weight.device.type):
            return None
        hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
        parametrised = "weight" not in head._parameters or "bias" not in head._parameters
        half = head.weight.dtype in (torch.float16, torch.bfloat16)
        return None if hooked or parametrised or half else head


class _ChunkedLoss(torch.autograd.Function):
    """Gradient in forward, handed out in backward."""

    @staticmethod
    def forward(ctx: Any, plan: _Chunks, *tensors: Tensor) -> Tensor:
        flat, trained = tensors[: plan.inputs], tensors[plan.inputs :]
        count = len(flat[0])
        share = plan.share(count)
        total = torch.zeros((), dtype=wide(flat[0]).dtype, device=flat[0].device)
        if not plan.differentiate or not any(ctx.needs_input_grad):
            for start, stop in plan.bounds(count):
                part = [x[start:stop] for x in flat]
                total += plan.value(plan.head(part[0]), part[1:], start, share)
            return total
        grads = [_accumulator(t) if n else None for t, n in zip(tensors, ctx.needs_input_grad[1:])]
        linear = plan.linear
        for number, (start, stop) in enumerate(plan.bounds(count)):
            part = [
                x[start:stop].detach().requires_grad_(need)
                for x, need in zip(flat, ctx.needs_input_grad[1:])
            ]
            first = number == 0
            if linear is None:
                value = _general_step(plan, part, trained, grads, start, share, first)
            else:
                value = _linear_step(plan, linear, part, trained, grads, start, share, first)
            total += value
        ctx.grads = [
            None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)
        ]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.grads
        if grads is None:
            raise RuntimeError(
                "going backward through a chunked loss a second time: its gradients were handed "
                "out; say retain_graph=True the first time"
            )
        if graph_is_kept():
            return (None, *(None if g is None else g * grad.to(g.dtype) for g in grads))
        # Nobody asks again: the sums themselves are handed out, not copies of their size.
        ctx.grads = None
        # Elsewhere than on the CPU a look would wait for the device.
        if grad.device.type != "cpu" or grad.item() != 1.0:
            for found in grads:
                if found is not None:
                    found.mul_(grad.to(found.dtype))
        return (None, *grads)


def _general_step(
    plan: _Chunks,
    part: list[Tensor],
    trained: Sequence[Tensor],
    grads: list[Tensor | None],
    start: int,
    share: float | Tensor,
    first: bool,
) -> Tensor:
    """One chunk through any head; adds its gradients to `grads` and returns its value."""
    with torch.enable_grad():
        value = plan.value(plan.head(part[0]), part[1:], start, share)
    asked = [p for p in part if p.requires_grad] + list(trained)
    if first:
        _refuse_forgotten(value, asked)
    if value.requires_grad:
        found = iter(torch.autograd.grad(value, asked, allow_unused=True))
        for index, tensor in enumerate([*part, *trained]):
            if tensor.requires_grad:
                _add(grads, index, next(found), None if index >= len(part) else start)
    return value.detach()


def _linear_step(
    plan: _Chunks,
    head: nn.Linear,
    part: list[Tensor],
    trained: Sequence[Tensor],
    grads: list[Tensor | None],
    start: int,
    share: float | Tensor,
    first: bool,
) -> Tensor:
    """One chunk through a linear layer, whose weight's gradient is summed in place."""
    hidden = part[0].detach()
    logits = F.linear(hidden, head.weight, head.bias).detach().requires_grad_(True)
    extra = [t for t in trained if t is not head.weight and t is not head.bias]
    with torch.enable_grad():
        value = plan.value(logits, part[1:], start, share)
    asked = [logits, *(p for p in part[1:] if p.requires_grad), *extra]
    if first:
        _refuse_forgotten(value, asked)
    if not value.requires_grad:
        return value.detach()
    found = iter(torch.autograd.grad(value, asked, allow_unused=True))
    down = next(found)
    for index, tensor in enumerate([*part, *trained]):
        if not tensor.requires_grad:
            continue
        into = grads[index]
        if index == 0:
            _add(grads, index, None if down is None else down @ head.weight, start)
        elif tensor is head.weight or tensor is head.bias:
            if into is None or down is None:
                continue
            if tensor is head.weight:
                into.addmm_(down.t(), hidden)
            else:
                into.add_(down.sum(0))
        else:
            _add(grads, index, next(found), None if index >= len(part) else start)
    return value.detach()


def _add(grads: list[Tensor | None], index: int, found: Tensor | None, start: int | None) -> None:
    into = grads[index]
    if into is None or found is None:
        return
    if start is None:
        into.add_(found)
    else:
        into[start : start + len(found)].add_(found)


def _accumulator(tensor: Tensor) -> Tensor:
    """Zeros to sum a gradient in; wide, since many small pieces are added."""
    return torch.zeros_like(tensor, dtype=wide(tensor).dtype)


def _parameters(head: Any, further: Sequence[Tensor]) -> list[Tensor]:
    own = list(head.parameters()) if isinstance(head, nn.Module) else []
    known = {id(p) for p in own}
    return own + [p for p in further if id(p) not in known]


def _refuse_forgotten(value: Tensor, asked: Sequence[Tensor]) -> None:
    """Raise when the graph reaches a trainable leaf that would get no gradient."""
    known = {id(t) for t in asked}
    queue = [value.grad_fn] if value.grad_fn is not None else []
    seen = set(queue)
    while queue:
        node = queue.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ModelError(
                f"a chunked loss uses a trainable tensor of shape {tuple(leaf.shape)} that "
                "would get no gradient: hand it in as a row or in parameters=, or detach it"
            )
        for child, _ in getattr(node, "next_functions", ()):
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)


def wide(x: Tensor) -> Tensor:
    """The tensor in at least float32, whatever half precision it came in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
