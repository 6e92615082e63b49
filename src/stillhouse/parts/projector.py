"""Projectors: from the width of one network's features to that of another's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.parts.single_row import rows_through

Kind = Literal["linear", "mlp", "conv1", "conv3bn"]
KINDS = ("linear", "mlp", "conv1", "conv3bn")


class Projector(nn.Module):
    """A learned (or frozen random) map between the widths of two networks' features.

    - "linear": Linear(in, out), on the last axis.
    - "mlp": Linear(in, hidden), BatchNorm1d, GELU, Linear(hidden, out), on rows (B, in)
      (SimCLR's head in the form that COMODO uses).
    - "conv1": a 1x1 convolution of maps (B, in, H, W).
    - "conv3bn": a 3x3 convolution, BatchNorm2d and ReLU of maps.

    A frozen one (`trainable` False) is random and stays as it is: no parameter has a gradient,
    and it is in eval mode whatever is asked of it, so that its running statistics never move.
    In training "mlp" takes a batch of a single row too, see `rows_through`. Weights are drawn as
    torch's layers draw them, in this order.

    Args:
        inputs: width in.
        outputs: width out.
        kind: see above.
        hidden: of the kind "mlp".
        trainable: False freezes it.
        seed: of the weights; the default generator draws them when None.

    Attributes:
        net: the layers.

    Raises:
        ModelError: a width below 1.
        RecipeError: an unknown kind.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kind: Kind = "linear",
        *,
        hidden: int = 2048,
        trainable: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of projector '{kind}'{nearest(kind, KINDS)}")
        if min(inputs, outputs, hidden) < 1:
            raise ModelError(
                f"a projector needs widths >= 1, got {inputs}, {outputs}, hidden {hidden}"
            )
        self.inputs, self.outputs, self.kind, self.trainable = inputs, outputs, kind, trainable
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            self.net = _layers(inputs, outputs, kind, hidden)
        if not trainable:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> Projector:
        """Frozen ones stay in eval mode."""
        super().train(mode and self.trainable)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """The projected features.

        Args:
            features: (B, ..., inputs) for "linear", (B, inputs) for "mlp", (B, inputs, H, W)
                for the convolutions.

        Raises:
            ModelError: another width, or another number of axes.
        """
        axis = -1 if self.kind in ("linear", "mlp") else 1
        axes = {"linear": features.ndim, "mlp": 2}.get(self.kind, 4)
        if features.ndim != axes or features.shape[axis] != self.inputs:
            raise ModelError(
                f"a projector '{self.kind}' from width {self.inputs} got features of shape "
                f"{tuple(features.shape)}"
            )
        if isinstance(self.net, nn.Sequential) and self.kind == "mlp":
            return rows_through(self.net, features)
        projected: Tensor = self.net(features)
        return projected


def _layers(inputs: int, outputs: int, kind: str, hidden: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.GELU(), nn.Linear(hidden, outputs)
        )
    if kind == "conv1":
        return nn.Conv2d(inputs, outputs, 1)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


__all__ = ["Projector"]
