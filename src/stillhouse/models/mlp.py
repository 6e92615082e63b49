"""A plain multilayer perceptron for vectors and small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError


class MLP(nn.Module):
    """Linear layers with ReLU between them; whatever comes in is flattened.

    Args:
        classes: number of outputs.
        inputs: size of one flattened sample.
        widths: hidden layers; none of them makes a linear classifier.
        dropout: after each hidden layer, in [0, 1).

    Attributes:
        taps: name to module path: "hidden1" ... "hiddenN", the output of each hidden layer
            after its ReLU (B, width).

    Raises:
        ModelError: a number below 1, or dropout outside [0, 1).
    """

    def __init__(
        self,
        classes: int = 10,
        inputs: int = 64,
        widths: Sequence[int] = (64,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(classes, inputs, *widths) < 1 or not 0.0 <= dropout < 1.0:
            raise ModelError(
                "an MLP needs numbers >= 1 and dropout in [0, 1), got "
                f"classes={classes}, inputs={inputs}, widths={tuple(widths)}, dropout={dropout}"
            )
        self.inputs = inputs
        before = [inputs, *widths[:-1]]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))
            for a, b in zip(before, widths, strict=False)
        )
        self.head = nn.Linear(widths[-1] if widths else inputs, classes)
        self.taps = {f"hidden{i + 1}": f"layers.{i}" for i in range(len(widths))}

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: (B, ...) with `inputs` numbers per sample.

        Returns:
            Logits (B, classes).

        Raises:
            ModelError: another number of values per sample.
        """
        x = torch.flatten(x, 1)
        if x.shape[1] != self.inputs:
            raise ModelError(f"the MLP reads {self.inputs} numbers per sample, not {x.shape[1]}")
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits
