"""Images with a class for every pixel: their options, sizes, sources and what is checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views
from stillhouse.data.augment_scenes import AugmentScenes
from stillhouse.data.options import DataOptions
from stillhouse.errors import DataError
from stillhouse.losses.spatial import IGNORE

SceneAugment = Literal["none", "flip", "scale+flip"]


class SceneOptions(DataOptions):
    """Options of images with label maps."""

    image_size: list[int] | None = Field(
        None,
        description="[height, width] that images and label maps are brought to; none: as they are",
    )
    augment: SceneAugment = Field(
        "none",
        description="of training reads: flip (left to right, half of them), or scale+flip (random "
        "scale, a random window of the original size, and flip); image and labels alike",
    )
    scale: tuple[float, float] = Field(
        (0.5, 2.0), description="least and largest enlargement for scale+flip"
    )

    class_weights: list[float] | None = Field(
        None,
        description="weight of each class's pixels in the cross-entropy, in the order of the "
        "classes, such as median frequency / frequency; none: all count alike",
    )

    @field_validator("class_weights")
    @classmethod
    def _weights_not_negative(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (min(value, default=0.0) < 0 or sum(value) <= 0):
            raise ValueError("one number per class, none below 0 and not all 0")
        return value

    @field_validator("image_size")
    @classmethod
    def _two_numbers(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (len(value) != 2 or min(value) < 4):
            raise ValueError("[height, width], each at least 4")
        return value

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError("[least, largest] above 0")
        return value

    def augmentation(self, ignore: int = IGNORE) -> AugmentScenes | None:
        """What training reads go through."""
        if self.augment == "none":
            return None
        scale = self.scale if "scale" in self.augment else (1.0, 1.0)
        return AugmentScenes(scale=scale, flip=True, ignore=ignore)


class SceneSource(TensorSource):
    """Images (N, 3, H, W) uint8 and label maps (N, H, W) in memory, read as float and int16.

    Arguments as for `TensorSource`.
    """

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The samples at positions `rows`; augmented unless `views` is None."""
        batch = Batch(id=self.ids.index_select(0, rows))
        for name, value in self.views.items():
            batch[name] = value.index_select(0, rows)
        if self.augment is not None and views is not None:
            batch = self.augment(batch, views)
        if batch["x"].dtype == torch.uint8:
            batch["x"] = batch["x"].float().div_(255.0)
        return batch


def resized_images(images: Tensor, size: Sequence[int] | None) -> Tensor:
    """Images (N, C, H, W) uint8 at [height, width]: means where it divides, else bilinear."""
    height, width = images.shape[-2:]
    if size is None or (height, width) == tuple(size):
        return images
    target = (int(size[0]), int(size[1]))
    whole = height % target[0] == 0 and width % target[1] == 0
    made = []
    for block in torch.split(images, 256):
        pixels = block.float()
        small = (
            F.interpolate(pixels, target, mode="area")
            if whole
            else F.interpolate(pixels, target, mode="bilinear", align_corners=False, antialias=True)
        )
        made.append(small.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(made)


def resized_labels(labels: Tensor, size: Sequence[int] | None) -> Tensor:
    """Label maps (N, H, W) at [height, width], by nearest neighbour."""
    if size is None or tuple(labels.shape[-2:]) == tuple(size):
        return labels
    target = (int(size[0]), int(size[1]))
    small = F.interpolate(labels.unsqueeze(1).float(), target, mode="nearest-exact")
    return small.squeeze(1).to(labels.dtype)


def translated(labels: Tensor, table: Tensor) -> Tensor:
    """Values as they stand in files as class numbers.

    Args:
        labels: (...) whole numbers in [0, 256).
        table: (256,) int16: the class of each value, or the label that is ignored.
    """
    return table[labels.long()]


def check_label_maps(labels: Tensor, classes: int, where: str, ignore: int = IGNORE) -> None:
    """Refuse label maps with values that are no class, or without any class at all.

    Args:
        labels: (N, H, W).
        classes: how many classes there are.
        where: data and split, for the error.
        ignore: the label of pixels that count for nothing.

    Raises:
        DataError: names the first row.
    """
    valid = labels != ignore
    wrong = valid & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        row = int(wrong.flatten(1).any(1).nonzero()[0, 0])
        value = int(labels[row][wrong[row]][0])
        raise DataError(
            f"{where}, row {row}: the label map holds {value}; there are {classes} classes, "
            f"numbered from 0, and {ignore} for what does not count"
        )
    if not bool(valid.any()):
        raise DataError(f"{where}: every pixel is {ignore} (ignored); there is nothing to learn")


def about_scenes(
    classes: Sequence[str],
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    class_weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What tasks and models must know of images with label maps.

    Args:
        classes: names, in the order of the labels.
        size: [height, width] of the images, px.
        mean: of each channel.
        std: likewise.
        class_weights: see `SceneOptions`.

    Raises:
        DataError: another number of weights than of classes.
    """
    about: dict[str, Any] = {
        "classes": list(classes),
        "ignore": IGNORE,
        "input": [3, int(size[0]), int(size[1])],
        "mean": list(mean),
        "std": list(std),
    }
    if class_weights is not None:
        if len(class_weights) != len(classes):
            raise DataError(
                f"data option 'class_weights' has {len(class_weights)} numbers, the data "
                f"{len(classes)} classes: {', '.join(map(str, classes))}"
            )
        about["class_weights"] = [float(weight) for weight in class_weights]
    return about


def hash_of(*parts: object) -> str:
    """A short hash of plain values, for fingerprints."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
