"""EDSR-baseline: the plain residual network that super-resolution is compared with.

Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR
workshops 2017, arXiv 1707.02921: residual blocks without normalisation, a global residual,
and pixel shuffles. State-dict names are those of the released networks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError

# Mean RGB of DIV2K, as in the released code.
MEAN = (0.4488, 0.4371, 0.4040)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResidualBlock(nn.Module):
    """x + strength * conv(relu(conv(x))). Keys: `body.0`, `body.2`."""

    def __init__(self, channels: int, strength: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), nn.ReLU(), _conv(channels, channels))
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to the same shape."""
        y: Tensor = self.body(x)
        return x + (y if self.strength == 1.0 else y * self.strength)


class EDSR(nn.Module):
    """EDSR-baseline, of any size: (B, 3, H, W) in [0, 1] to (B, 3, sH, sW).

    With 16 blocks of 64 channels at x2 it has 1,369,859 parameters. Images are centred by
    the mean of DIV2K; the released networks work on 0-255, these on 0-1.

    Args:
        channels: width.
        blocks: number of residual blocks.
        scale: 1, 2, 3, 4 or 8.
        strength: factor on each block's residual (0.1 in the large EDSR).

    Attributes:
        taps: "block1" ... to the module path of each residual block.

    Raises:
        ModelError: a scale without a tail, or a number below 1.
    """

    mean: Tensor
    multiple = 1

    def __init__(
        self, channels: int = 64, blocks: int = 16, scale: int = 2, *, strength: float = 1.0
    ) -> None:
        super().__init__()
        if scale not in {1, 2, 3, 4, 8}:
            raise ModelError(f"EDSR has scales 1, 2, 3, 4 and 8, not {scale}")
        if min(channels, blocks) < 1:
            raise ModelError(f"EDSR: channels {channels} and blocks {blocks} must be at least 1")
        self.scale, self.channels, self.blocks = scale, channels, blocks
        self.head = nn.Sequential(_conv(3, channels))
        body = [ResidualBlock(channels, strength) for _ in range(blocks)]
        self.body = nn.Sequential(*body, _conv(channels, channels))
        self.tail = nn.Sequential(_upsampler(channels, scale), _conv(channels, 3))
        self.taps = {f"block{n + 1}": f"body.{n}" for n in range(blocks)}
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """The restored image; not clamped.

        Raises:
            ModelError: not a batch of RGB images.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ModelError(f"EDSR takes images (B, 3, H, W), got {tuple(image.shape)}")
        first = self.head(image - self.mean)
        restored: Tensor = self.tail(self.body(first) + first)
        return restored + self.mean


def _upsampler(channels: int, scale: int) -> nn.Sequential:
    steps = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}[scale]
    layers: list[nn.Module] = []
    for step in steps:
        layers += [_conv(channels, channels * step * step), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)


def edsr(scale: int = 2, channels: int = 64, blocks: int = 16) -> EDSR:
    """EDSR-baseline at 64 channels and 16 blocks; see `EDSR`."""
    return EDSR(channels, blocks, scale)
