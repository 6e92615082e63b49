"""What every side of E6 computes on: hidden states, two heads, a mask; and how it is measured."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

TOKENS, WIDTH, CHUNK, REPEATS = 512, 512, 128, 2


class Case:
    """Random states whose two models agree about as well as a student half way does."""

    def __init__(self) -> None:
        torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
        self.form, self.classes = sys.argv[1], int(sys.argv[2])
        rng = torch.Generator().manual_seed(0)
        self.teacher = torch.randn(TOKENS, WIDTH, generator=rng)
        self.student = (self.teacher + torch.randn(TOKENS, WIDTH, generator=rng)).requires_grad_()
        self.teacher_weight = torch.randn(self.classes, WIDTH, generator=rng) / WIDTH**0.5 * 3
        noise = torch.randn(self.classes, WIDTH, generator=rng) / WIDTH**0.5
        self.student_weight = (self.teacher_weight + noise).requires_grad_()
        self.mask = torch.arange(TOKENS) % 8 != 0
        self.beta = {"forward": 0.0, "reverse": 1.0}.get(self.form, 0.5)

    def measure(self, loss: Callable[[], Tensor]) -> None:
        """Print the least time of forward and backward, and the most memory above the inputs.

        For the memory every large tensor is mapped on its own and given back when it is freed,
        so that the resident set is what is held; for the time the allocator keeps its pages.
        """
        _allocate(mapped_from=1 << 20)
        x = torch.rand(8, 8, requires_grad=True)
        (x @ x).log_softmax(-1).exp().sum().backward()
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forgets the peak
        value = self._once(loss)
        peak = _status("VmHWM") - before
        _allocate(mapped_from=1 << 30)
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            self._once(loss)
            times.append(time.perf_counter() - began)
        print(json.dumps({"s": min(times), "mb": peak / 1024, "loss": value}))

    def _once(self, loss: Callable[[], Tensor]) -> float:
        self.student.grad = self.student_weight.grad = None
        value = loss()
        value.backward()
        return value.item()


def _allocate(mapped_from: int) -> None:
    """From which size on the C library maps an allocation on its own."""
    library = ctypes.CDLL(None)
    library.mallopt(-3, mapped_from)  # M_MMAP_THRESHOLD
    library.mallopt(-1, mapped_from)  # M_TRIM_THRESHOLD
    library.malloc_trim(0)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
