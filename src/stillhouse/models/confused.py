"""A synthetic teacher: another model that systematically cannot tell some classes apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model


class Confused(nn.Module):
    """A classifier whose logits are shared out evenly within groups of classes.

    The probability of a group is that of its classes together, each having an equal part. So
    the teacher disagrees with the labels in a known way. For experiments: nothing real is
    confused in this manner.

    Args:
        model: id of the classifier inside.
        groups: class numbers that it cannot tell apart, such as [[4, 9], [3, 5]].
        classes: number of classes; the data's.
        channels: of the data's images.
        size: of the data's images, pixels.
        options: of the model inside.
        weights: of the model inside.

    Raises:
        ModelError: a class that is none, or in two groups.
    """

    def __init__(
        self,
        model: str,
        groups: Sequence[Sequence[int]],
        classes: int = 10,
        channels: int = 1,
        size: int = 28,
        options: Mapping[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        named = [number for group in groups for number in group]
        if len(set(named)) < len(named) or any(not 0 <= n < classes for n in named):
            raise ModelError(
                f"groups are of different classes 0 to {classes - 1}, each named once, not "
                f"{[list(g) for g in groups]}"
            )
        about = {"classes": classes, "input": [channels, size, size]}
        self.groups = [list(group) for group in groups]
        self.model = load_model(model, options=options, weights=weights, about=about)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images."""
        found = self.model(images)
        logits: Tensor = found if isinstance(found, Tensor) else found["logits"]
        shared = list(logits.unbind(-1))
        for group in self.groups:
            even = torch.logsumexp(logits[:, group], -1) - math.log(len(group))
            for number in group:
                shared[number] = even
        return torch.stack(shared, -1)
