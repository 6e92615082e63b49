"""Further heads on the features of a student, beside the one it is deployed with."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from stillhouse.errors import ModelError, RecipeError, nearest

KINDS = ("linear", "nonlinear")


class ExtraHead(nn.Module):
    """A second classifier on the features that feed a student's last linear layer.

    "linear": Linear(width, classes). "nonlinear": Linear(width, hidden) - Dropout -
    BatchNorm1d - ReLU - Linear(hidden, classes), in this order (DHKD, Yang et al. 2025, and
    penghui-yang/DHKD models/classifier.py). It takes the same feature tensor as the main
    head, not detached, and leaves with the objective at export.

    Weights are drawn as `nn.Linear` draws them.

    Args:
        source: the main head, whose widths, device and dtype are taken over, or
            (in_features, out_features).
        kind: "linear" or "nonlinear".
        hidden: width of the hidden layer of the non-linear kind, >= 1.
        dropout: of the non-linear kind, in [0, 1).
        generator: CPU generator of the weights; the default generator when None.

    Raises:
        ModelError: `source` is neither a linear layer nor a pair of positive widths.
        RecipeError: an unknown kind or a setting out of range.
    """

    def __init__(
        self,
        source: nn.Linear | tuple[int, int],
        kind: Literal["linear", "nonlinear"] = "linear",
        *,
        hidden: int = 200,
        dropout: float = 0.1,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of head '{kind}'{nearest(kind, KINDS)}")
        if hidden < 1 or not 0.0 <= dropout < 1.0:
            raise RecipeError(
                f"a head needs hidden >= 1 and dropout in [0, 1), got {hidden} and {dropout}"
            )
        self.in_features, self.out_features = _widths(source)
        self.kind = kind
        self.net: nn.Module
        if kind == "linear":
            self.net = _linear(self.in_features, self.out_features, generator)
        else:
            self.net = nn.Sequential(
                _linear(self.in_features, hidden, generator),
                nn.Dropout(dropout),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                _linear(hidden, self.out_features, generator),
            )
        if isinstance(source, nn.Linear):
            self.to(device=source.weight.device, dtype=source.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the extra head.

        Args:
            features: (..., in_features), the input of the main head. BatchNorm takes its
                statistics over all leading dimensions.

        Returns:
            (..., out_features).

        Raises:
            ModelError: the width is not `in_features`.
        """
        if features.shape[-1] != self.in_features:
            raise ModelError(
                f"the extra head expects features of width {self.in_features}, got shape "
                f"{tuple(features.shape)}: tap the input of the last linear layer"
            )
        logits: Tensor = self.net(features.reshape(-1, self.in_features))
        return logits.reshape(*features.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Kind and widths, for printing."""
        return f"kind={self.kind}, {self.in_features} -> {self.out_features}"


def _widths(source: nn.Linear | tuple[int, int]) -> tuple[int, int]:
    if isinstance(source, nn.Linear):
        return source.in_features, source.out_features
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and all(isinstance(width, int) and width > 0 for width in source)
    ):
        return source
    raise ModelError(
        "an extra head is made from a linear layer or from (in_features, out_features), not "
        f"from {type(source).__name__} {source!r:.80}"
    )


def _linear(width: int, out: int, generator: Generator | None) -> nn.Linear:
    """A linear layer with torch's own initial distribution, drawn from `generator`."""
    # made without numbers: its own initialisation would draw from the global generator
    layer = nn.Linear(width, out, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1.0 / math.sqrt(width)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
