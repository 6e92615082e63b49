"""A small network that chooses, item by item, which band of a teacher's distribution is matched.

It is learnt beside the student and thrown away with the training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stillhouse.errors import RecipeError


class Band(nn.Module):
    """Features of an item to a lower and an upper quantile.

    Two layers with a GELU between them; the last begins with weights of 0, so that every item
    starts with the same, wide band.

    Args:
        features: width of the input.
        hidden: width between the layers.
        start: lower and upper quantile at first, 0 < lower < upper < 1.

    Raises:
        RecipeError: a start out of range.
    """

    def __init__(
        self, features: int, hidden: int = 128, start: tuple[float, float] = (0.02, 0.98)
    ) -> None:
        super().__init__()
        low, high = start
        if not 0 < low < high < 1:
            raise RecipeError(f"a band begins between 0 and 1, lower below upper, not at {start}")
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, 2)
        with torch.no_grad():
            self.outer.weight.zero_()
            share = (high - low) / (1.0 - low)
            self.outer.bias.copy_(torch.tensor([_logit(low), _logit(share)]))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., features) to lower and upper quantile, each (...)."""
        raw = self.outer(nn.functional.gelu(self.inner(features.to(self.inner.weight.dtype))))
        return quantiles(raw)


def quantiles(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers (..., 2) to l = sigmoid(a) and u = l + (1 - l) sigmoid(b): 0 < l < u < 1."""
    low, share = raw.sigmoid().unbind(-1)
    return low, low + (1.0 - low) * share


def _logit(value: float) -> float:
    return math.log(value / (1.0 - value))
