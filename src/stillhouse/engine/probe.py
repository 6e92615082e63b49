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

from stillhouse.net import in_eval_mode

ROUNDS = 5
LONGEST_FORWARD = 2.0  # seconds of a teacher's forward, above which no larger batch is tried


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


def labelling(net: nn.Module, view: Any, size: int) -> dict[str, float] | None:
    """A teacher's forward a row, by rows at a time, beside `size` rows at a time.

    Args:
        net: of the teacher; only asked, without a gradient.
        view: rows of its view, as many as may be tried at once.
        size: rows of a question as it is now.

    Returns:
        `batch`, the quickest number of rows, and its `ratio` of the time of `size`; None when
        the view cannot be cut into rows, or holds fewer.
    """
    if not isinstance(view, Tensor) or view.ndim == 0 or len(view) < size:
        return None
    sizes = sorted({s for s in (size // 4, size // 2, size, 2 * size, 4 * size) if s >= 1})
    sizes = [s for s in sizes if s <= len(view)]
    least = dict.fromkeys(sizes, float("inf"))
    with in_eval_mode(net), torch.inference_mode():
        for number in range(3):
            for rows in list(sizes):
                spent = _timed(lambda rows=rows: net(view[:rows]))  # type: ignore[misc]
                if number:  # the first round warms up
                    least[rows] = min(least[rows], spent / rows)
                elif spent > LONGEST_FORWARD and rows >= size:
                    sizes = [s for s in sizes if s <= rows]
                    break
    tried = {rows: least[rows] for rows in sizes}
    best = min(tried, key=lambda rows: tried[rows])
    return {"batch": best, "ratio": tried[best] / tried[size]}


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
