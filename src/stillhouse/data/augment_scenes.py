"""Batched augmentation of images with label maps: scale, crop and flip, one draw for both."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Batch
from stillhouse.clock import Views
from stillhouse.errors import DataError
from stillhouse.losses.spatial import IGNORE

_STREAM = "scene"
_DRAWS = 4  # scale, top, left, flip


class AugmentScenes:
    """Random scale, a random window of the original size, horizontal flip.

    What mmsegmentation's training does (resize by 0.5-2, crop, flip), in one resampling. The
    image is read bilinearly, the label map by nearest neighbour; beyond the image the label
    is `ignore` and the picture grey (its own mean). Numbers come from
    `views.uniform(ids, ...)` alone, so a sample's augmentation does not depend on its batch.

    Args:
        scale: least and largest enlargement; (1, 1): neither scaled nor cropped.
        flip: mirror half of the reads left to right.
        ignore: the label beyond the image.

    Attributes:
        fingerprint: tells these settings apart in a source's fingerprint.

    Raises:
        DataError: scales that are not 0 < least <= largest.
    """

    def __init__(
        self, *, scale: tuple[float, float] = (0.5, 2.0), flip: bool = True, ignore: int = IGNORE
    ) -> None:
        if not 0.0 < scale[0] <= scale[1]:
            raise DataError(f"scales must be 0 < least <= largest, got {scale}")
        self.scale, self.flip, self.ignore = (float(scale[0]), float(scale[1])), flip, ignore
        self.fingerprint = f"AugmentScenes(scale={self.scale}, flip={flip}, ignore={ignore})"

    def __repr__(self) -> str:
        return self.fingerprint

    def __call__(self, batch: Batch, views: Views) -> Batch:
        """The batch with "x" (B, C, H, W) and "target" (B, H, W) resampled alike.

        Raises:
            DataError: the two are not of one size.
        """
        image, labels = batch["x"], batch["target"]
        if image.shape[-2:] != labels.shape[-2:]:
            raise DataError(
                f"an image of {tuple(image.shape[-2:])} and a label map of "
                f"{tuple(labels.shape[-2:])} cannot be augmented alike"
            )
        numbers = views.uniform(batch["id"], _STREAM, _DRAWS)
        moved = Batch(batch)
        mirrored = (numbers[:, 3] < 0.5) & self.flip
        if self.scale == (1.0, 1.0):
            flags = mirrored.to(image.device)
            moved["x"] = torch.where(flags.view(-1, 1, 1, 1), image.flip(-1), image)
            moved["target"] = torch.where(flags.view(-1, 1, 1), labels.flip(-1), labels)
            return moved
        grid = self._grid(numbers, mirrored, image)
        moved["x"], moved["target"] = self._resampled(image, labels, grid)
        return moved

    def _grid(self, numbers: Tensor, mirrored: Tensor, image: Tensor) -> Tensor:
        """Where each pixel of the result lies in the image, in [-1, 1] across it."""
        low, high = self.scale
        size = low * (high / low) ** numbers[:, 0]
        # A window of 1 / size of the image; smaller than it, it lies anywhere within; larger,
        # the image lies anywhere within the window. Both: its centre is within |1 - 1 / size|.
        reach = 1.0 / size
        free = (1.0 - reach).abs()
        centre_y, centre_x = ((2.0 * numbers[:, k] - 1.0) * free for k in (1, 2))
        across = torch.where(mirrored, -reach, reach)
        zero = torch.zeros_like(reach)
        theta = torch.stack(
            [torch.stack([across, zero, centre_x], 1), torch.stack([zero, reach, centre_y], 1)], 1
        )
        return F.affine_grid(
            theta.to(image.device), [len(theta), 1, *image.shape[-2:]], align_corners=False
        )

    def _resampled(self, image: Tensor, labels: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image.float() / 255.0 if image.dtype == torch.uint8 else image.float()
        mean = pixels.mean((-2, -1), keepdim=True)
        picture = F.grid_sample(pixels - mean, grid, mode="bilinear", align_corners=False) + mean
        # Beyond the image zeros are read: labels are shifted so that 0 there means `ignore`.
        shifted = (labels.float() - self.ignore).unsqueeze(1)
        read = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)
        return picture, (read.squeeze(1) + self.ignore).round_().to(labels.dtype)
