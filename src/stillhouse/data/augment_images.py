"""Batched augmentation of images in memory: random shifts and flips for training reads.

Normalisation is not here: it belongs to the network, because teacher and student may each
want their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Views
from stillhouse.errors import DataError

_STREAM = "geometry"


class AugmentImages:
    """Random crop with zero padding and horizontal flip, one draw per sample for all views.

    The usual training augmentation of small images (He et al. 2016, section 4.2: 4 pixels of
    padding on CIFAR). Numbers come from `views.uniform(ids, ...)` alone, so that a sample's
    augmentation depends on its id and the draw, not on the batch it is read in.

    Args:
        padding: the image is shifted by up to this many pixels each way; 0: no shift.
        flip: mirror half of the reads left to right.
        names: views that are transformed alike, each (B, C, H, W) or (B, H, W) of one common
            height and width, uint8 or float.

    Attributes:
        fingerprint: tells these settings apart in a source's fingerprint.
    """

    def __init__(
        self, *, padding: int = 4, flip: bool = True, names: Sequence[str] = ("x",)
    ) -> None:
        if padding < 0:
            raise DataError(f"padding must be at least 0, not {padding}")
        self.padding = padding
        self.flip = flip
        self.names = tuple(names)
        self.fingerprint = f"AugmentImages(padding={padding}, flip={flip}, names={self.names})"

    def __repr__(self) -> str:
        return self.fingerprint

    def __call__(self, batch: Batch, views: Views) -> Batch:
        """The batch with its image views shifted and flipped.

        Raises:
            DataError: a view that is missing or no image, or views of different size.
        """
        if not self.padding and not self.flip:
            return batch
        images = {name: batch.view(name) for name in self.names}
        self._check(images)
        # Three numbers whatever is switched on: switching flips off leaves the shifts equal.
        drawn = views.uniform(batch["id"], _STREAM, 3)
        shifts = (drawn[:, :2] * (2 * self.padding + 1)).long()
        mirrored = drawn[:, 2] < 0.5
        moved = Batch(batch)
        for name, image in images.items():
            moved[name] = self._move(image, shifts, mirrored)
        return moved

    def _move(self, image: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
        if not self.padding:
            return flipped(image, mirrored)
        image = shifted(image, shifts, self.padding)
        return _mirror_(image, mirrored) if self.flip else image

    def _check(self, images: dict[str, Tensor]) -> None:
        sizes = {}
        for name, image in images.items():
            if not isinstance(image, Tensor) or image.ndim not in {3, 4}:
                what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise DataError(
                    f"the view '{name}' cannot be augmented as an image: it is {what}, "
                    "(B, C, H, W) or (B, H, W) is needed"
                )
            sizes[name] = tuple(image.shape[-2:])
        if len(set(sizes.values())) > 1:
            raise DataError(f"views that are augmented alike differ in size: {sizes}")


def shifted(image: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Crops of the original size out of zero-padded images.

    Args:
        image: (B, C, H, W) or (B, H, W).
        shifts: (B, 2) int64 in [0, 2 * padding]: top row and left column of each crop in the
            padded image; `padding` itself is no shift.
        padding: pixels added on each side.

    Returns:
        A new tensor of the same shape.
    """
    height, width = image.shape[-2:]
    rows = image.shape[0]
    flat = torch.nn.functional.pad(image, (padding,) * 4).reshape(rows, -1)
    channels = flat.shape[1] // ((height + 2 * padding) * (width + 2 * padding))
    # Every line of the result is a run of `width` neighbours in the padded memory; an index
    # over overlapping runs copies it in one piece, which is far faster than a gather.
    wide, tall = width + 2 * padding, height + 2 * padding
    shifts = shifts.to(image.device)
    line = torch.arange(rows * channels, device=image.device).view(rows, channels, 1) * tall
    line = line + torch.arange(height, device=image.device) + shifts[:, :1, None]
    first = (line * wide + shifts[:, 1, None, None]).reshape(-1)
    runs = flat.as_strided((flat.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, first).view(image.shape)


def flipped(image: Tensor, mirrored: Tensor) -> Tensor:
    """Images whose flag is set, mirrored left to right, in a new tensor.

    Args:
        image: (B, ..., W).
        mirrored: (B,) bool.
    """
    return _mirror_(image.clone(), mirrored)


def _mirror_(image: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the flagged rows in place."""
    if image.device.type == "cpu" and image.dtype in {torch.uint8, torch.float32}:
        # On the CPU torch's flip and index_copy of bytes take four times as long as NumPy's.
        pixels, rows = image.numpy(), mirrored.cpu().numpy()
        pixels[rows] = pixels[rows][..., ::-1]
        return image
    flags = mirrored.to(image.device)
    image[flags] = image[flags].flip(-1)
    return image
