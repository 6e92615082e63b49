"""Another model that sees its images enlarged: pretrained networks on small images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model


class Resized(nn.Module):
    """A model behind a bilinear resize, so that both networks read the same images.

    Grey images are repeated to three channels.

    Args:
        model: id of the model inside.
        pixels: height and width it sees.
        classes: number of classes; the data's.
        options: of the model inside.
        weights: of the model inside.

    Attributes:
        input_mean: of the model inside, where its weights come with a normalisation.
        input_std: likewise.

    Raises:
        ModelError: no such model, or fewer than 1 pixel.
    """

    def __init__(
        self,
        model: str,
        pixels: int,
        classes: int = 10,
        options: Mapping[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if pixels < 1:
            raise ModelError(f"images are resized to at least 1 pixel, not {pixels}")
        about = {"classes": classes, "input": [3, pixels, pixels]}
        self.pixels = pixels
        self.model = load_model(model, options=options, weights=weights, about=about)
        for name in ("input_mean", "input_std"):
            if hasattr(self.model, name):
                setattr(self, name, getattr(self.model, name))

    def forward(self, images: Tensor) -> Any:
        """What the model inside gives for images (B, C, H, W)."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[-2:] != (self.pixels, self.pixels):
            size = (self.pixels, self.pixels)
            images = F.interpolate(
                images, size, mode="bilinear", align_corners=False, antialias=False
            )
        return self.model(images)
