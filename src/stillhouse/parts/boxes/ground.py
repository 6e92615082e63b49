"""Boxes that stand on the ground: corners, points within, frames, in torch and batched.

A box is (x, y, z, l, w, h, yaw, ...): its centre, its sizes along its own axes, the angle of
its length against the x axis, counter-clockwise seen from above; metres and radians. Further
entries (velocity along x and y) ride along.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Corners in units of half the sizes, clockwise from (-, -) as released code of many detectors.
_CORNERS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0))
_EDGES = ((0, 1), (1, 2), (2, 3), (0, 3))


def turned(xy: Tensor, angle: Tensor) -> Tensor:
    """Vectors (..., 2) turned counter-clockwise by angles that broadcast to (...)."""
    cosine, sine = angle.cos(), angle.sin()
    x, y = xy[..., 0], xy[..., 1]
    return torch.stack([x * cosine - y * sine, x * sine + y * cosine], dim=-1)


def ground_corners(boxes: Tensor) -> Tensor:
    """The four corners seen from above, (..., 4, 2), clockwise from (-l/2, -w/2)."""
    half = boxes[..., None, 3:5] / 2
    own = half * boxes.new_tensor(_CORNERS)
    return turned(own, boxes[..., 6, None]) + boxes[..., None, :2]


def nine_points(boxes: Tensor) -> Tensor:
    """Four corners, the centre, and the middles of the four edges, seen from above.

    Returns:
        (..., 9, 2) metres: corners as `ground_corners`; the mean of them; the means of corner
        pairs (0, 1), (1, 2), (2, 3), (0, 3).
    """
    corners = ground_corners(boxes)
    centre = corners.mean(-2, keepdim=True)
    middles = [(corners[..., i, :] + corners[..., j, :]) / 2 for i, j in _EDGES]
    return torch.cat([corners, centre, torch.stack(middles, dim=-2)], dim=-2)


def corners(boxes: Tensor) -> Tensor:
    """All eight corners, (..., 8, 3): those of the bottom, then those above them."""
    ground = ground_corners(boxes)
    half = boxes[..., None, 5:6] / 2
    low = (boxes[..., None, 2:3] - half).expand(*ground.shape[:-1], 1)
    high = (boxes[..., None, 2:3] + half).expand(*ground.shape[:-1], 1)
    return torch.cat([torch.cat([ground, low], -1), torch.cat([ground, high], -1)], dim=-2)


def into_box(points: Tensor, boxes: Tensor) -> Tensor:
    """Points in the frames of boxes: the centre is the origin, the length lies along x.

    Args:
        points: (..., N, >= 3).
        boxes: (..., M, >= 7).

    Returns:
        (..., M, N, 3).
    """
    away = points[..., None, :, :3] - boxes[..., :, None, :3]
    flat = turned(away[..., :2], -boxes[..., :, None, 6])
    return torch.cat([flat, away[..., 2:]], dim=-1)


def out_of_box(points: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of `into_box` for points (..., M, N, 3) of the boxes' own frames."""
    flat = turned(points[..., :2], boxes[..., :, None, 6])
    return torch.cat([flat, points[..., 2:3]], dim=-1) + boxes[..., :, None, :3]


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points lie in which boxes, borders included.

    Args:
        points: (..., N, >= 3).
        boxes: (..., M, >= 7).

    Returns:
        (..., M, N) bool.
    """
    away = into_box(points, boxes).abs()
    return (away <= boxes[..., :, None, 3:6] / 2).all(-1)


def points_per_box(points: Tensor, boxes: Tensor, present: Tensor | None = None) -> Tensor:
    """How many points lie in each box: (..., M) int64.

    Args:
        points: (..., N, >= 3).
        boxes: (..., M, >= 7).
        present: (..., N) bool, which rows of `points` are points; all by default.
    """
    inside = points_in_boxes(points, boxes)
    if present is not None:
        inside = inside & present[..., None, :]
    return inside.sum(-1)


def moved(boxes: Tensor, angle: Tensor, mirror: Tensor, shift: Tensor | None = None) -> Tensor:
    """Boxes after the world is mirrored (y to -y), then turned, then shifted.

    Args:
        boxes: (B, M, 7 or 9); entries 7 and 8 are a velocity.
        angle: (B,) radians, counter-clockwise.
        mirror: (B,) 1 or -1; -1 mirrors.
        shift: (B, 2) metres, or None.
    """
    sign = mirror[:, None]
    centre = turned(torch.stack([boxes[..., 0], boxes[..., 1] * sign], -1), angle[:, None])
    if shift is not None:
        centre = centre + shift[:, None]
    yaw = wrapped(boxes[..., 6] * sign + angle[:, None])
    parts = [centre, boxes[..., 2:6], yaw[..., None]]
    if boxes.shape[-1] >= 9:
        speed = torch.stack([boxes[..., 7], boxes[..., 8] * sign], -1)
        parts.append(turned(speed, angle[:, None]))
    return torch.cat(parts, dim=-1)


def wrapped(angle: Tensor) -> Tensor:
    """Angles in [-pi, pi)."""
    return (angle + math.pi).remainder(2 * math.pi) - math.pi
