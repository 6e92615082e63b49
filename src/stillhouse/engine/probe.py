"""Short measurements that tell whether a setting would pay on this hardware, before it is advised.

A net is copied, given one batch as it is read, and its forward and backward are timed in turns
with those of an unchanged copy; the least of the rounds counts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 5


def channels_last(net: nn.Module, view: Any) -> dict[str, float] | None:
    """Forward and backward with channels last beside the layout as it is.

    Args:
        net: of the student; it is copied.
        view: one batch of its view.

    Returns:
        `ratio` of the times; None when the view is no batch of images.
    """
    if not isinstance(view, Tensor) or view.ndim != 4:
        return None
    plain = copy.deepcopy(net)
    turned = copy.deepcopy(net)
    turned.to(memory_format=torch.channels_last)
    return {"ratio": _ratio(turned, plain, view)}


def compiled(net: nn.Module, view: Any) -> dict[str, float]:
    """Forward and backward of a compiled net beside the plain one.

    Returns:
        `ratio` of the times, and the `seconds` that compiling took.
    """
    plain, faster = copy.deepcopy(net), copy.deepcopy(net)
    faster.compile()
    began = time.perf_counter()
    _step(faster, view)
    seconds = time.perf_counter() - began
    return {"ratio": _ratio(faster, plain, view), "seconds": seconds}


def _ratio(one: nn.Module, other: nn.Module, view: Any) -> float:
    times: dict[str, list[float]] = {"one": [], "other": []}
    for number in range(ROUNDS + 1):
        for name, net in (("one", one), ("other", other)):
            spent = _timed(lambda net=net: _step(net, view))  # type: ignore[misc]
            if number:
                times[name].append(spent)
    return min(times["one"]) / min(times["other"])


def _timed(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _step(net: nn.Module, view: Any) -> None:
    net.train()
    found = net(view)
    total = sum(v.float().mean() for v in found.values() if isinstance(v, Tensor))
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    net.zero_grad(set_to_none=True)
