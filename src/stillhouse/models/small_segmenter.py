"""A plain small encoder-decoder for segmentation, with logits at a quarter of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError


class SmallSegmenter(nn.Module):
    """Convolutions 3x3 with BatchNorm and ReLU, each halving the size, and one way back.

    The first two blocks bring the image to a quarter; what follows is enlarged to there and
    joined with it, so borders stay sharp. Widths (16, 32, 64, 96) and 11 classes make about
    140 k parameters.

    Args:
        classes: number of classes.
        channels: image channels.
        widths: channels of each block, at least two.

    Attributes:
        taps: "stage1" ... "stageN" the blocks' outputs, "decoder" what the head reads.

    Raises:
        ModelError: fewer than two blocks, or a number below 1.
    """

    def __init__(
        self, classes: int = 11, channels: int = 3, widths: Sequence[int] = (16, 32, 64, 96)
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(classes, channels, *widths) < 1:
            raise ModelError(
                "a small segmenter needs at least two blocks and numbers >= 1, got "
                f"classes={classes}, channels={channels}, widths={tuple(widths)}"
            )
        self.blocks = nn.ModuleList(
            _block(before, after, stride=2)
            for before, after in zip([channels, *widths[:-1]], widths, strict=True)
        )
        joined = widths[1] + (widths[-1] if len(widths) > 2 else 0)
        self.decoder = _block(joined, widths[1], stride=1)
        self.classifier = nn.Conv2d(widths[1], classes, 1)
        self.taps = {f"stage{i + 1}": f"blocks.{i}" for i in range(len(widths))}
        self.taps["decoder"] = "decoder"

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (B, classes, ceil(H / 4), ceil(W / 4)).

        Args:
            x: (B, channels, H, W), normalised images of any size.
        """
        for block in self.blocks[:2]:
            x = block(x)
        if len(self.blocks) > 2:
            deep = x
            for block in self.blocks[2:]:
                deep = block(deep)
            deep = F.interpolate(deep, x.shape[-2:], mode="bilinear", align_corners=False)
            x = torch.cat([x, deep], 1)
        scores: Tensor = self.classifier(self.decoder(x))
        return scores


def _block(before: int, after: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )
