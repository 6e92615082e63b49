"""A plain small CNN for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError


class SmallCNN(nn.Module):
    """Convolutions 3x3 with BatchNorm and ReLU, halved by max pooling, then one linear layer.

    One block per width; every block but the last is followed by a 2x2 max pooling as long as
    the image allows, the last by a mean over all positions, so that any image size fits.
    Widths (32, 64, 128, 176) and 100 classes make about 300 k parameters (a teacher),
    (16, 32, 64) about 30 k (a student).

    Args:
        classes: number of classes.
        channels: image channels.
        widths: channels of each block, at least one.

    Attributes:
        taps: name to module path: "stage1" ... "stageN", the output of each block before
            pooling (B, width, h, w).

    Raises:
        ModelError: no block, or a number below 1.
    """

    def __init__(
        self, classes: int = 10, channels: int = 1, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        if not widths or min(classes, channels, *widths) < 1:
            raise ModelError(
                "a small CNN needs at least one block and numbers >= 1, got "
                f"classes={classes}, channels={channels}, widths={tuple(widths)}"
            )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.classifier = nn.Linear(widths[-1], classes)
        self.taps = {f"stage{i + 1}": f"blocks.{i}" for i in range(len(widths))}

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: (B, channels, H, W), normalised images of any size.

        Returns:
            Logits (B, classes).
        """
        for number, block in enumerate(self.blocks):
            if number and min(x.shape[-2:]) >= 2:
                x = F.max_pool2d(x, 2)
            x = block(x)
        logits: Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def small_cnn(
    classes: int = 10, channels: int = 1, widths: Sequence[int] = (16, 32, 64)
) -> SmallCNN:
    """A student of about 24 k parameters at 10 classes, 30 k at 100."""
    return SmallCNN(classes, channels, widths)


def small_cnn_teacher(
    classes: int = 10, channels: int = 1, widths: Sequence[int] = (32, 64, 128, 176)
) -> SmallCNN:
    """A teacher of about 300 k parameters."""
    return SmallCNN(classes, channels, widths)
