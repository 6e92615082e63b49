"""Cameras and the ground: projecting points into images, lifting pixels into the world.

A camera is a matrix of intrinsics K (3, 3) and a pose (4, 4) that takes points of the camera's
frame (x right, y down, z forward) to the frame of the boxes. Pixel (column, row) has its centre
at (column + 0.5, row + 0.5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_pose(pose: Tensor, points: Tensor) -> Tensor:
    """Points (..., N, 3) after a pose (..., 4, 4); leading dimensions broadcast."""
    return points @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]


def inverse_pose(pose: Tensor) -> Tensor:
    """The inverse of affine maps (..., 4, 4), whatever their linear part."""
    inverse: Tensor = torch.linalg.inv(pose)
    return inverse


def project(points: Tensor, intrinsics: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and depths of points.

    Args:
        points: (..., N, >= 3) in the frame of the boxes.
        intrinsics: (..., 3, 3).
        pose: (..., 4, 4) from the camera to the frame of the boxes.

    Returns:
        (..., N, 2) columns and rows, (..., N) depths in metres; points behind the camera have
        depths <= 0 and pixels that mean nothing.
    """
    seen = apply_pose(inverse_pose(pose), points[..., :3])
    flat = seen @ intrinsics.transpose(-1, -2)
    depth = flat[..., 2]
    return flat[..., :2] / depth[..., None].clamp_min(1e-6), depth


def visible(
    pixels: Tensor, depth: Tensor, size: tuple[int, int], *, nearest: float = 0.5
) -> Tensor:
    """Which projected points lie inside an image.

    Args:
        pixels: (..., N, 2) columns and rows.
        depth: (..., N) metres.
        size: (height, width) in pixels.
        nearest: least depth.
    """
    column, row = pixels.unbind(-1)
    return (depth > nearest) & (column >= 0) & (column < size[1]) & (row >= 0) & (row < size[0])


def not_hidden(
    pixels: Tensor, depth: Tensor, inside: Tensor, *, size: int = 8, slack: float = 0.05
) -> Tensor:
    """Which points of ONE image are not behind others: nearly the least depth of their square.

    Args:
        pixels: (N, 2) columns and rows.
        depth: (N,).
        inside: (N,) bool, points that count.
        size: side of a square in pixels.
        slack: share of the least depth that a point may lie behind it.
    """
    square = torch.div(pixels, size, rounding_mode="floor").long().clamp_min(0)
    width = int(square[..., 0].max()) + 1 if len(square) else 1
    place = square[:, 1] * width + square[:, 0]
    far = depth.new_full((int(place.max()) + 1 if len(place) else 1,), float("inf"))
    least = far.scatter_reduce(0, place[inside], depth[inside], "amin", include_self=True)
    return inside & (depth <= least[place] * (1 + slack))


def pixel_rays(intrinsics: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
    """Directions of depth 1 through the centres of squares of pixels, in the camera's frame.

    Args:
        intrinsics: (..., 3, 3).
        size: (height, width) of the image in pixels.
        stride: side of a square.

    Returns:
        (..., h * w, 3), row by row, with h = height / stride.
    """
    like = intrinsics
    rows, columns = (
        (torch.arange(side // stride, dtype=like.dtype, device=like.device) + 0.5) * stride
        for side in size
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flip(-1).reshape(-1, 2)
    pixels = torch.cat([grid, torch.ones_like(grid[:, :1])], dim=1)
    rays: Tensor = pixels @ _inverse(intrinsics).transpose(-1, -2)
    return rays


def _inverse(matrices: Tensor) -> Tensor:
    """The inverse of matrices (..., 3, 3), in products and sums where a graph is written."""
    if not torch.compiler.is_exporting():
        inverse: Tensor = torch.linalg.inv(matrices)
        return inverse
    # ONNX has no inverse. The columns of the inverse are cross products of the rows.
    first, second, third = matrices.unbind(-2)
    columns = [_cross(second, third), _cross(third, first), _cross(first, second)]
    return torch.stack(columns, -1) / (first * columns[0]).sum(-1)[..., None, None]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross products of vectors (..., 3)."""
    x, y, z = a.unbind(-1)
    u, v, w = b.unbind(-1)
    return torch.stack([y * w - z * v, z * u - x * w, x * v - y * u], -1)


def on_ground(intrinsics: Tensor, pose: Tensor, pixels: Tensor, height: float) -> Tensor:
    """Where the rays of pixels meet the plane z = height, in the frame of the boxes.

    Args:
        intrinsics: (..., 3, 3).
        pose: (..., 4, 4).
        pixels: (..., N, 2) columns and rows.
        height: of the plane.

    Returns:
        (..., N, 3); NaN where the ray does not meet it in front of the camera.
    """
    flat = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
    rays = flat @ torch.linalg.inv(intrinsics).transpose(-1, -2)
    rays = rays @ pose[..., :3, :3].transpose(-1, -2)
    start = pose[..., None, :3, 3]
    reach = (height - start[..., 2]) / rays[..., 2]
    reach = torch.where(reach > 0, reach, torch.full_like(reach, float("nan")))
    met: Tensor = start + reach[..., None] * rays
    return met
