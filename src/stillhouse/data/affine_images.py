"""Batched random affine changes of images in memory, for training reads of signs and digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Batch
from stillhouse.clock import Views
from stillhouse.errors import DataError

_STREAM = "affine"


class AffineImages:
    """Turned, scaled, sheared and shifted images, zeros around; one draw for all views.

    Numbers come from `views.uniform(ids, ...)` alone, so that a sample's change depends on its
    id and the draw, not on the batch it is read in. Bilinear.

    Args:
        turn: largest angle either way, degrees.
        zoom: largest natural logarithm of the scale either way; height has half as much again
            of its own.
        shear: largest horizontal shift per unit of height.
        shift: largest shift either way, as a share of the size.
        names: views that are changed alike, each (B, C, H, W), uint8 or float.

    Attributes:
        fingerprint: tells these settings apart in a source's fingerprint.
    """

    def __init__(
        self,
        *,
        turn: float = 15.0,
        zoom: float = 0.2,
        shear: float = 0.2,
        shift: float = 0.1,
        names: Sequence[str] = ("x",),
    ) -> None:
        if min(turn, zoom, shear, shift) < 0:
            raise DataError("the limits of an affine change are at least 0")
        self.turn, self.zoom, self.shear, self.shift = turn, zoom, shear, shift
        self.names = tuple(names)
        self.fingerprint = (
            f"AffineImages(turn={turn}, zoom={zoom}, shear={shear}, shift={shift}, "
            f"names={self.names})"
        )

    def __repr__(self) -> str:
        return self.fingerprint

    def __call__(self, batch: Batch, views: Views) -> Batch:
        """The batch with its image views changed; bytes become floats in [0, 1].

        Raises:
            DataError: a view that is missing or no batch of images.
        """
        matrices = self.matrices(views.uniform(batch["id"], _STREAM, 6))
        moved = Batch(batch)
        for name in self.names:
            image = batch.view(name)
            if not isinstance(image, Tensor) or image.ndim != 4:
                what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise DataError(
                    f"the view '{name}' cannot be augmented as an image: it is {what}, "
                    "(B, C, H, W) is needed"
                )
            pixels = image.float() / 255.0 if image.dtype == torch.uint8 else image
            grid = F.affine_grid(matrices.to(pixels), list(pixels.shape), align_corners=False)
            moved[name] = F.grid_sample(pixels, grid, align_corners=False)
        return moved

    def matrices(self, drawn: Tensor) -> Tensor:
        """From six uniform numbers a row (B, 6) to (B, 2, 3): where each pixel is taken from."""
        signed = 2.0 * drawn - 1.0
        angle = signed[:, 0] * self.turn * (torch.pi / 180.0)
        wide = torch.exp(signed[:, 1] * self.zoom)
        tall = wide * torch.exp(signed[:, 2] * self.zoom / 2)
        rows = torch.zeros(len(drawn), 2, 3)
        rows[:, 0, 0], rows[:, 1, 1] = angle.cos() / wide, angle.cos() / tall
        rows[:, 0, 1] = -angle.sin() / wide + signed[:, 3] * self.shear
        rows[:, 1, 0] = angle.sin() / tall
        rows[:, :, 2] = 2.0 * self.shift * signed[:, 4:6]
        return rows
