"""Rays against simple solids: what a laser or a camera sees of boxes, posts and the ground.

All in numpy, float32, one origin for all rays of a call. Solids are upright: boxes turned about
the vertical, cylinders, and the plane of the ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Indices = NDArray[np.int64]
FAR = np.float32(1e9)
_TINY = np.float32(1e-9)
GROUND = -2  # as the number of a solid
SKY = -1


@dataclass
class Solids:
    """What stands on the ground.

    Attributes:
        boxes: (n, 7) x, y, z, l, w, h, yaw.
        cylinders: (m, 5) x, y, z of the middle, radius, height.
        ground: height of the ground.
    """

    boxes: Array
    cylinders: Array
    ground: float

    def __len__(self) -> int:
        return len(self.boxes) + len(self.cylinders)


@dataclass
class Hits:
    """The first thing that each ray meets.

    Attributes:
        distance: (R,) along the ray, in units of its direction; `FAR` for none.
        solid: (R,) number of the solid, boxes first; `GROUND` or `SKY`.
        normal: (R, 3) of the surface, outwards.
        local: (R, 3) the point in the solid's own frame.
    """

    distance: Array
    solid: Indices
    normal: Array
    local: Array


def cast(origin: Array, rays: Array, solids: Solids) -> Hits:
    """The nearest hit of each ray.

    Args:
        origin: (3,).
        rays: (R, 3) directions, of any length.
        solids: to hit.
    """
    count = len(rays)
    best = np.full(count, FAR, np.float32)
    solid = np.full(count, SKY, np.int64)
    falling = rays[:, 2] < -1e-6
    drop = np.where(falling, (solids.ground - origin[2]) / np.where(falling, rays[:, 2], -1), FAR)
    best, solid = np.where(falling, drop, best).astype(np.float32), np.where(falling, GROUND, solid)
    azimuth = np.arctan2(rays[:, 1], rays[:, 0])
    order = np.argsort(azimuth)
    azimuth = azimuth[order]
    for number in range(len(solids)):
        chosen = order[_towards(origin, azimuth, solids, number)]
        if not len(chosen):
            continue
        if number < len(solids.boxes):
            reach = _box(origin, rays[chosen], solids.boxes[number])
        else:
            reach = _cylinder(origin, rays[chosen], solids.cylinders[number - len(solids.boxes)])
        nearer = reach < best[chosen]
        best[chosen[nearer]] = reach[nearer]
        solid[chosen[nearer]] = number
    return _surfaces(origin, rays, solids, best, solid)


def _towards(origin: Array, azimuth: Array, solids: Solids, number: int) -> Indices:
    """Places of the sorted azimuths that may meet a solid: the others need no arithmetic."""
    if number < len(solids.boxes):
        x, y, _, length, width, _, _ = solids.boxes[number]
        radius = float(np.hypot(length, width)) / 2
    else:
        x, y, _, radius, _ = (float(v) for v in solids.cylinders[number - len(solids.boxes)])
    dx, dy = float(x - origin[0]), float(y - origin[1])
    away = float(np.hypot(dx, dy))
    if away <= radius * 1.001:
        return np.arange(len(azimuth))
    half, middle = float(np.arcsin(radius / away)) + 1e-3, float(np.arctan2(dy, dx))
    parts = []
    for turn in (-2 * np.pi, 0.0, 2 * np.pi):
        # Of the array's own type, else all of it is converted for every search.
        low = int(np.searchsorted(azimuth, azimuth.dtype.type(middle - half + turn)))
        high = int(np.searchsorted(azimuth, azimuth.dtype.type(middle + half + turn), side="right"))
        if high > low:
            parts.append(np.arange(low, high))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _into(box: Array, points: Array, *, vectors: bool = False) -> Array:
    cosine, sine = np.float32(np.cos(box[6])), np.float32(np.sin(box[6]))
    away = points if vectors else points - box[:3]
    x = away[..., 0] * cosine + away[..., 1] * sine
    y = away[..., 1] * cosine - away[..., 0] * sine
    return np.stack([x, y, away[..., 2]], -1).astype(np.float32)


def _box(origin: Array, rays: Array, box: Array) -> Array:
    start, way = _into(box, origin), _into(box, rays, vectors=True)
    way = np.where(np.abs(way) < _TINY, _TINY, way)
    near, far = (-box[3:6] / 2 - start) / way, (box[3:6] / 2 - start) / way
    enter = np.minimum(near, far).max(1)
    leave = np.maximum(near, far).min(1)
    met = (leave >= enter) & (enter > 0)
    return np.where(met, enter, FAR).astype(np.float32)


def _cylinder(origin: Array, rays: Array, cylinder: Array) -> Array:
    x, y, z, radius, height = cylinder
    start = origin - np.array([x, y, z], np.float32)
    a = np.maximum(rays[:, 0] ** 2 + rays[:, 1] ** 2, _TINY)
    b = rays[:, 0] * start[0] + rays[:, 1] * start[1]
    c = start[0] ** 2 + start[1] ** 2 - radius**2
    root = b * b - a * c
    side = (-b - np.sqrt(np.maximum(root, 0))) / a
    level = start[2] + side * rays[:, 2]
    on_side = (root >= 0) & (side > 0) & (np.abs(level) <= height / 2)
    falling = rays[:, 2] < -1e-6
    top = np.where(falling, (height / 2 - start[2]) / np.where(falling, rays[:, 2], -1), FAR)
    px, py = start[0] + top * rays[:, 0], start[1] + top * rays[:, 1]
    on_top = falling & (top > 0) & (px * px + py * py <= radius**2)
    reach = np.where(on_side, side, FAR)
    return np.minimum(reach, np.where(on_top, top, FAR)).astype(np.float32)


def _surfaces(origin: Array, rays: Array, solids: Solids, distance: Array, solid: Indices) -> Hits:
    normal = np.zeros((len(rays), 3), np.float32)
    reach = np.where(distance < FAR, distance, 0)[:, None]
    points = (origin + reach * rays).astype(np.float32)
    local = points.copy()
    normal[solid == GROUND, 2] = 1
    for number in np.unique(solid[solid >= 0]):
        own = solid == number
        if number < len(solids.boxes):
            box = solids.boxes[number]
            local[own] = _into(box, points[own])
            share = local[own] / (box[3:6] / 2)
            axis = np.abs(share).argmax(1)
            faces = np.zeros_like(share)
            rows = np.arange(len(share))
            faces[rows, axis] = np.sign(share[rows, axis])
            cosine, sine = np.cos(box[6]), np.sin(box[6])
            normal[own, 0] = faces[:, 0] * cosine - faces[:, 1] * sine
            normal[own, 1] = faces[:, 0] * sine + faces[:, 1] * cosine
            normal[own, 2] = faces[:, 2]
        else:
            cylinder = solids.cylinders[number - len(solids.boxes)]
            local[own] = points[own] - cylinder[:3]
            top = local[own, 2] > cylinder[4] / 2 - 1e-3
            out = local[own] / cylinder[3]
            out[:, 2] = 0
            out[top] = (0, 0, 1)
            normal[own] = out
    return Hits(distance, solid, normal, local)
