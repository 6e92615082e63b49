"""Mean and deviation of every class's channels: what a client may tell of its images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from stillhouse.errors import DataError, RecipeError

Form = Literal["per_class", "official"]


def class_statistics(
    images: Tensor, labels: Tensor, classes: int, form: Form = "per_class"
) -> tuple[Tensor, Tensor, Tensor]:
    """Channel mean, population deviation and image count of every class.

    Args:
        images: (N, C, H, W).
        labels: (N,) in 0..K-1.
        classes: K.
        form: "per_class" divides a class's sums by its own pixels; "official", as released with
            FedLGD, by those of ALL images, which makes the means about K times too small.

    Returns:
        `(mean, std, count)`: (K, C), (K, C) in the images' dtype, float32 at least, and (K,)
        int64; 0 for a class without images.

    Raises:
        DataError: shapes that do not fit, or labels out of range.
        RecipeError: an unknown form.
    """
    if form not in ("per_class", "official"):
        raise RecipeError(f"class statistics are 'per_class' or 'official', not '{form}'")
    if images.ndim != 4 or labels.shape != images.shape[:1] or len(images) == 0:
        raise DataError(
            f"images (N, C, H, W) and labels (N,) are needed, got {tuple(images.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(f"labels must lie in 0..{classes - 1}")
    values = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    channels, pixels = values.shape[1], values.shape[2] * values.shape[3]
    count = torch.bincount(labels, minlength=classes)
    total = values.new_zeros(classes, channels).index_add_(0, labels, values.sum((2, 3)))
    if form == "official":
        number = values.new_tensor(float(len(values) * pixels))
        squares = values.new_zeros(classes, channels)
        squares.index_add_(0, labels, values.square().sum((2, 3)))
        mean = total / number
        return mean, (squares / number - mean.square()).clamp_min(0).sqrt(), count
    own = (count * pixels).clamp_min(1)[:, None].to(values)
    mean = total / own
    # From the differences, not from the squares: a constant colour has no deviation at all.
    apart = (values - mean[labels][:, :, None, None]).square().sum((2, 3))
    spread = values.new_zeros(classes, channels).index_add_(0, labels, apart)
    return mean, (spread / own).sqrt(), count


def normal_images(
    mean: Tensor, std: Tensor, each: int, size: tuple[int, int], generator: Generator
) -> Tensor:
    """Normal noise with the statistics of every class, class by class.

    Args:
        mean: (K, C).
        std: (K, C).
        each: images per class.
        size: height and width.
        generator: CPU generator.

    Returns:
        (K * each, C, H, W) on the device of `mean`.
    """
    classes, channels = mean.shape
    noise = torch.randn(classes, each, channels, *size, generator=generator)
    noise = noise.to(mean.device, mean.dtype)
    shape = (classes, 1, channels, 1, 1)
    return (noise * std.reshape(shape) + mean.reshape(shape)).flatten(0, 1)
