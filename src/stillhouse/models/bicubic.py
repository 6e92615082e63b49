"""Bicubic enlargement as a network without parameters: what super-resolution is measured from."""

from __future__ import annotations

from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.parts.degrade import upscale


class Bicubic(nn.Module):
    """Matlab's bicubic enlargement of images in [0, 1]; the identity at scale 1.

    Args:
        scale: factor of enlargement, a whole number.
    """

    multiple = 1

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        if scale < 1:
            raise ModelError(f"Bicubic: scale must be at least 1, got {scale}")
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        """The enlarged image of `image` (B, C, H, W); not clamped, not rounded."""
        return image if self.scale == 1 else upscale(image, self.scale)


def bicubic(scale: int = 2) -> Bicubic:
    """See `Bicubic`."""
    return Bicubic(scale)
