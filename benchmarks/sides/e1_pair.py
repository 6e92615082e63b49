"""The pairs of networks, the data and the clock that every side of E1 uses."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

BATCH, CLASSES, ROWS = 32, 10, 4096
ALPHA, TEMPERATURE, RATE, MOMENTUM = 0.9, 4.0, 0.05, 0.9
# Named by what a step of the bare loop takes on one core of the machine of the results.
STEPS = {"0.4 ms": 1200, "1 ms": 1000, "4 ms": 600}
CYCLE, PIECE, WARM = 50, 10, 4  # ours writes a line of its log every 50 steps


def asked() -> str:
    """Which of the steps: the only argument."""
    torch.set_num_threads(1)
    return sys.argv[1]


class Stamped(nn.Module):
    """A teacher that notes when it is asked for a batch: once a step, whoever asks."""

    def __init__(self, module: nn.Module, stamps: Stamps) -> None:
        super().__init__()
        self.module, self.stamps = module, stamps

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if len(x) == BATCH:
            self.stamps()
        return self.module(x)


def pair(step: str, stamps: Stamps) -> tuple[nn.Module, nn.Module]:
    """Teacher and student: perceptrons for the short steps, small CNNs for the long one."""
    torch.manual_seed(0)
    if step == "0.4 ms":
        return Stamped(_perceptron(256), stamps).eval(), _perceptron(64)
    if step == "1 ms":
        return Stamped(_perceptron(704), stamps).eval(), _perceptron(256)
    return Stamped(_convolutions(32), stamps).eval(), _convolutions(16)


def _perceptron(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(256, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def _convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def data() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 16, 16) and labels; time does not depend on what they show."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 1, 16, 16, generator=rng), torch.randint(
        0, CLASSES, (ROWS,), generator=rng
    )


class Stamps:
    """Processor times of the steps: called by the teacher, at the same place on every side."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.process_time())

    def tell(self, **more: object) -> None:
        """Print the time of a step: each fifth of a cycle of 50 at its quickest.

        Pieces of ten steps are short enough that some run undisturbed on a busy machine, and
        together they hold whatever is done only now and then.
        """
        marks = self.times[WARM * CYCLE :: PIECE]
        pieces = [b - a for a, b in pairwise(marks)]
        fifths = [pieces[k :: CYCLE // PIECE] for k in range(CYCLE // PIECE)]
        print(json.dumps({"s": sum(map(min, fifths)) / CYCLE, "of": len(fifths[-1]), **more}))
