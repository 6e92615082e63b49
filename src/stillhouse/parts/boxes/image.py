"""Boxes in images: overlap, the usual coding by four differences, flips and changes of size.

A box is (left, top, right, bottom) in pixels; the right and lower edges are not inside, so its
area is (right - left) * (bottom - top). Everything is pure and works in the dtype it is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CODING = (10.0, 10.0, 5.0, 5.0)
# Regressed sizes are at most 1000/16 times those of the box they start from.
LARGEST = math.log(1000.0 / 16.0)


def areas(boxes: Tensor) -> Tensor:
    """(..., 4) to (...): areas in square pixels; negative for turned boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersections(first: Tensor, second: Tensor) -> Tensor:
    """(N, 4) and (M, 4) to (N, M): shared areas in square pixels."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        first: (N, 4).
        second: (M, 4).

    Returns:
        (N, M) in [0, 1]; 0 where two boxes share nothing, also for boxes without area.
    """
    shared = intersections(first, second)
    union = areas(first)[:, None] + areas(second)[None, :] - shared
    return torch.where(shared > 0, shared / torch.where(shared > 0, union, 1), 0)


def covered(first: Tensor, second: Tensor) -> Tensor:
    """(N, M): the share of each box of `first` that lies in each box of `second`."""
    shared = intersections(first, second)
    return torch.where(shared > 0, shared / areas(first)[:, None], 0)


def decode(
    deltas: Tensor,
    boxes: Tensor,
    *,
    coding: tuple[float, float, float, float] = CODING,
    largest: float = LARGEST,
) -> Tensor:
    """Boxes that are `deltas` away from `boxes`; not clipped to the image.

    Args:
        deltas: (N, 4) dx, dy, dw, dh: shifts of the centre in widths and heights, logarithms of
            the change of size, each multiplied by its `coding`.
        boxes: (N, 4) where they start.
        coding: factors of the four.
        largest: the logarithms are at most this.

    Returns:
        (N, 4).
    """
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    centre_x, centre_y = boxes[:, 0] + 0.5 * wide, boxes[:, 1] + 0.5 * high
    dx, dy, dw, dh = (deltas[:, i] / coding[i] for i in range(4))
    x, y = dx * wide + centre_x, dy * high + centre_y
    w, h = dw.clamp(max=largest).exp() * wide, dh.clamp(max=largest).exp() * high
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], dim=1)


def encode(
    targets: Tensor, boxes: Tensor, *, coding: tuple[float, float, float, float] = CODING
) -> Tensor:
    """The deltas that lead from `boxes` (N, 4) to `targets` (N, 4); the inverse of `decode`."""
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    wider, higher = targets[:, 2] - targets[:, 0], targets[:, 3] - targets[:, 1]
    dx = (targets[:, 0] + 0.5 * wider - boxes[:, 0] - 0.5 * wide) / wide
    dy = (targets[:, 1] + 0.5 * higher - boxes[:, 1] - 0.5 * high) / high
    parts = (dx, dy, (wider / wide).log(), (higher / high).log())
    return torch.stack([part * factor for part, factor in zip(parts, coding, strict=True)], dim=1)


def clipped(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes (N, 4) cut at the borders of an image."""
    x = boxes[:, 0::2].clamp(0, width)
    y = boxes[:, 1::2].clamp(0, height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def flipped(boxes: Tensor, width: float) -> Tensor:
    """Boxes (N, 4) of an image that is mirrored left to right."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def resized(boxes: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of an image that is resized.

    Args:
        boxes: in the old image.
        before: its height and width.
        after: the new ones.
    """
    y, x = after[0] / before[0], after[1] / before[1]
    return boxes * boxes.new_tensor([x, y, x, y])
