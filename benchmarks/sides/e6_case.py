"""What every side of E6 computes on: hidden states, two heads, a mask; and how it is measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

TOKENS, WIDTH, CHUNK, REPEATS = 512, 512, 64, 3


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
        """Print the least time of forward and backward, and the most memory above the inputs."""
        self._once(loss)
        self._forget_peak()
        before = _status("VmRSS")
        value = self._once(loss)
        peak = _status("VmHWM") - before
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

    def _forget_peak(self) -> None:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
