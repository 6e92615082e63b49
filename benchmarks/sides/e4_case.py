"""What both sides of E4 train: 4,096 images of 100 classes, a teacher that costs, a student."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

BATCH, CLASSES, ROWS, EPOCHS = 64, 100, 4096, 4
ALPHA, TEMPERATURE, RATE = 0.9, 4.0, 0.05


def pair() -> tuple[nn.Module, nn.Module]:
    """Teacher and student."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return _net(24).eval(), _net(6)


def _net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def data() -> tuple[Tensor, Tensor]:
    """Images in memory; time does not depend on what they show."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, 32, 32, generator=rng), torch.randint(
        0, CLASSES, (ROWS,), generator=rng
    )


class Epochs:
    """Seconds of epochs, from calls at the beginning of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(time.perf_counter())

    def seconds(self, epochs: int) -> list[float]:
        """Of each of the last so many epochs but the last, whose end has no stamp."""
        steps = ROWS // BATCH
        marks = self.times[-steps * epochs :: steps]
        return [b - a for a, b in pairwise(marks)]


def tell(**figures: object) -> None:
    """The side's last line."""
    print(json.dumps(figures))
