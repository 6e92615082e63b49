"""Losses on maps (B, C, h, w): masks of class borders, distributions over space, hard pixels.

Channels come second here, as in images and in the logits of a segmentation network; the
divergences of `losses.logits` take classes last and are called on a moved axis. Student
first, then teacher; half precision is widened to float32 inside, float64 stays.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import kl

IGNORE = 255
_BITS = 62  # classes in one 64-bit word


def classes_last(maps: Tensor) -> Tensor:
    """(B, C, h, w) as (B, h, w, C), a view: what the divergences of `losses.logits` take."""
    return maps.movedim(1, -1)


def resized_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) brought to another size: bilinear, corners not aligned; itself if equal."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def mean_of_rows(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over the rows of a batch, those counting as 0 on which no teacher has spoken.

    So the mean of several pieces of a batch, weighted by their rows, is that of the whole.

    Args:
        values: (B,).
        valid: (B,) bool; None for all.
    """
    if valid is not None:
        values = values.masked_fill(~valid.to(values.device), 0.0)
    return values.mean()


# ------------------------------------------------------------------------- class borders


def class_edges(
    labels: Tensor,
    classes: int,
    radius: int,
    *,
    ignore: int = IGNORE,
    erase_ignored_band: bool = False,
) -> Tensor:
    """Where each class ends: dilation minus erosion of its own region, at label resolution.

    A band of `radius` pixels on both sides of the border of every class (BPKD, WACV 2024, its
    framework figure), so one pixel may be edge for one class and body for another. Image
    borders are no edges. Ignored pixels are never edge; those of a class beside them are, as
    in the third-party code, unless `erase_ignored_band`.

    Args:
        labels: (B, H, W) whole numbers in [0, classes), or `ignore`.
        classes: C.
        radius: r >= 0, pixels; the window is 2 r + 1 a side.
        ignore: the label of pixels that count for nothing.
        erase_ignored_band: what an ignored region cuts off a class is no edge of it.

    Returns:
        (B, C, H, W) float32, 0 or 1.

    Raises:
        ModelError: labels of another shape or out of range.
        RecipeError: a negative radius.
    """
    if labels.ndim != 3:
        raise ModelError(f"label maps must be (B, H, W), got {tuple(labels.shape)}")
    if radius < 0:
        raise RecipeError(f"the radius of class borders must be at least 0, not {radius}")
    labels = labels.long()
    valid = labels != ignore
    _refuse_range(labels, valid, classes)
    seen, mixed = _windows(labels, valid, classes, radius)
    if not erase_ignored_band:
        mixed = mixed | _spread(~valid, radius)
    edge = mixed & valid
    found = [
        (word.unsqueeze(1) >> torch.arange(count, device=labels.device).view(1, -1, 1, 1)) & 1
        for word, count in seen
    ]
    return torch.cat(found, 1).float() * edge.unsqueeze(1)


def _windows(
    labels: Tensor, valid: Tensor, classes: int, radius: int
) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """The classes in the window around each pixel, a bit each, and whether there are several.

    Dilation minus erosion of a class is 1 where its window holds the class and something else.
    Sets of bits take a few operations per pixel, maps per class many times as much.

    Returns:
        Words (B, H, W) int64 with the number of classes in each, and (B, H, W) bool.
    """
    words: list[tuple[Tensor, int]] = []
    mixed = torch.zeros_like(valid)
    any_seen = torch.zeros_like(valid)
    for first in range(0, classes, _BITS):
        count = min(_BITS, classes - first)
        own = valid & (labels >= first) & (labels < first + count)
        bits = torch.ones_like(labels) << (labels - first).masked_fill(~own, 0)
        word = _spread(bits.masked_fill(~own, 0), radius)
        here = word != 0
        mixed = mixed | (here & any_seen) | ((word & (word - 1)) != 0)
        any_seen = any_seen | here
        words.append((word, count))
    return words, mixed


def _spread(values: Tensor, radius: int) -> Tensor:
    """Bits (B, H, W) joined over a square window, along rows and then along columns.

    What lies beyond the image has no bits.
    """
    for axis in (1, 2):
        joined, length = values.clone(), values.shape[axis]
        for shift in range(1, min(radius, length - 1) + 1):
            kept = length - shift
            joined.narrow(axis, 0, kept).bitwise_or_(values.narrow(axis, shift, kept))
            joined.narrow(axis, shift, kept).bitwise_or_(values.narrow(axis, 0, kept))
        values = joined
    return values


def _refuse_range(labels: Tensor, valid: Tensor, classes: int) -> None:
    # Elsewhere than on the CPU a look would wait for the device; such a label has no class.
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = valid & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        found = int(labels[wrong][0])
        raise ModelError(
            f"a label map holds the class {found}; there are {classes} classes, numbered from 0"
        )


def soft_trimap(
    labels: Tensor,
    classes: int,
    size: tuple[int, int],
    *,
    radius: int = 3,
    ignore: int = IGNORE,
    erase_ignored_band: bool = False,
) -> tuple[Tensor, Tensor]:
    """How much of each position of a smaller map is edge of each class, and how much counts.

    Borders are found at the labels' resolution and then averaged; on reduced labels the band
    would be as many times wider (BPKD; the third-party code agrees).

    Args:
        labels: (B, H, W), see `class_edges`.
        classes: C.
        size: (h, w) of the map that is masked.
        radius: pixels of the labels.
        ignore: see `class_edges`.
        erase_ignored_band: see `class_edges`.

    Returns:
        The edge mask M (B, C, h, w) in [0, 1], times the validity; and the validity V
        (B, 1, h, w) in [0, 1], the share of a position's pixels that is not ignored. The body
        mask of BPKD is (1 - M) V.

    Raises:
        ModelError: see `class_edges`.
        RecipeError: see `class_edges`.
    """
    edges = class_edges(
        labels, classes, radius, ignore=ignore, erase_ignored_band=erase_ignored_band
    )
    valid = (labels != ignore).unsqueeze(1).float()
    # Where sizes divide, the adaptive mean is the plain one over H/h x W/w pixels.
    share = F.adaptive_avg_pool2d(valid, size)
    return F.adaptive_avg_pool2d(edges, size) * share, share


# ------------------------------------------------------------------- distributions on maps


def kl_space(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Channel-wise distillation: each channel's softmax over space (CWD, Shu et al., ICCV 2021).

    temperature^2 / (B C) times the sum over samples and channels of KL(teacher || student)
    between distributions over the h w positions.

    Args:
        student: (B, C, h, w).
        teacher: the same shape; see `resized_to`.
        temperature: > 0.
        reduction: "mean" over samples and channels, or "none".

    Returns:
        A scalar, or (B, C).

    Raises:
        ModelError: shapes differ, or a single position.
    """
    _same_maps(student, teacher)
    return kl(student.flatten(2), teacher.flatten(2), temperature=temperature, reduction=reduction)


def kl_pixels(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Distillation pixel by pixel: the softmax over channels at each position.

    Args:
        student: (B, C, h, w).
        teacher: the same shape; see `resized_to`.
        temperature: > 0; the result is multiplied by its square.
        mask: (B, h, w) weights >= 0 of the positions; all alike when not given.
        reduction: "mean" over positions by their weights, or "none".

    Returns:
        A scalar, or (B, h, w).

    Raises:
        ModelError: shapes differ, or a single channel.
    """
    _same_maps(student, teacher)
    return kl(
        classes_last(student),
        classes_last(teacher),
        temperature=temperature,
        mask=mask,
        reduction=reduction,
    )


def _same_maps(student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 4 or student.shape != teacher.shape:
        raise ModelError(
            f"maps of {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher) "
            "cannot be compared: both must be (B, C, h, w) of one shape and one order of channels"
        )


# ------------------------------------------------------------------------- supervision


def pixel_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore: int = IGNORE, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every pixel, on logits enlarged to the labels' size.

    Args:
        logits: (B, C, h, w); enlarged bilinearly.
        labels: (B, H, W) whole numbers.
        ignore: pixels of this label are 0 and send no gradient.
        weight: (C,) per class.

    Returns:
        (B, H, W), at least float32.

    Raises:
        ModelError: another number of rows or dimensions.
    """
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ModelError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}: "
            "(B, C, h, w) and (B, H, W) are needed"
        )
    size = (labels.shape[1], labels.shape[2])
    enlarged = resized_to(wide(logits), size)
    return F.cross_entropy(
        enlarged, labels.long(), weight=weight, ignore_index=ignore, reduction="none"
    )


def ohem(losses: Tensor, *, share: float = 0.2) -> Tensor:
    """The mean of the hardest share of items (online hard example mining).

    As in the DeepLab cross-entropy that P2Seg and Panoptic-DeepLab train with: all items of
    the batch are ranked together, ignored pixels (loss 0) among them.

    Args:
        losses: any shape, >= 0.
        share: of the items, in (0, 1]; at least one is kept.

    Returns:
        A scalar.

    Raises:
        RecipeError: a share out of range.
    """
    if not 0.0 < share <= 1.0:
        raise RecipeError(f"the share of hard pixels must lie in (0, 1], not {share}")
    flat = wide(losses).reshape(-1)
    if flat.numel() == 0:
        return flat.sum()
    kept = max(1, int(share * flat.numel()))
    return flat.topk(kept).values.mean() if kept < flat.numel() else flat.mean()
