"""Pictures of driving: a frame from above, a map over the ground, boxes in camera images.

From above, x points up and y to the left, as the driver sees it. All return a PNG as base64.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.boxes import corners, ground_corners
from stillhouse.parts.cameras import project

SIDE = 360
_COLOURS = {"green": (40, 200, 80), "red": (235, 60, 50)}
_EDGES = [(i, (i + 1) % 4) for i in range(4)]
_EDGES += [(i + 4, j + 4) for i, j in _EDGES] + [(i, i + 4) for i in range(4)]


def _encoded(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _pixels(places: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """(..., 2) columns and rows of places in metres: x up, y to the left."""
    x0, y0, _, x1, y1, _ = grid.range
    column = (y1 - places[..., 1]) / (y1 - y0) * size[0]
    row = (x1 - places[..., 0]) / (x1 - x0) * size[1]
    return torch.stack([column, row], -1)


def _size(grid: Grid) -> tuple[int, int]:
    """(width, height) of a picture; the longer side is `SIDE`."""
    x0, y0, _, x1, y1, _ = grid.range
    longest = max(x1 - x0, y1 - y0)
    return max(1, round(SIDE * (y1 - y0) / longest)), max(1, round(SIDE * (x1 - x0) / longest))


def _outline(draw: Any, boxes: Tensor, grid: Grid, size: tuple[int, int], colour: str) -> None:
    for shape in _pixels(ground_corners(boxes), grid, size).tolist():
        draw.polygon([tuple(p) for p in shape], outline=_COLOURS[colour])
    front = boxes[:, :2] + torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin()], -1) * (
        boxes[:, 3:4] / 2
    )
    ends = zip(
        _pixels(boxes[:, :2], grid, size).tolist(),
        _pixels(front, grid, size).tolist(),
        strict=True,
    )
    for start, end in ends:
        draw.line([tuple(start), tuple(end)], fill=_COLOURS[colour])


def from_above(points: Tensor, true: Tensor, told: Tensor, grid: Grid) -> str:
    """A frame from above.

    Args:
        points: (N, >= 3), shaded by height; may be none.
        true: (n, >= 7) boxes in green.
        told: (m, >= 7) boxes in red.
        grid: ground that is shown.
    """
    from PIL import Image, ImageDraw

    size = _size(grid)
    pixels = torch.full((size[1], size[0], 3), 18, dtype=torch.uint8)
    shown = points[grid.inside(points)] if len(points) else points
    if len(shown):
        place = _pixels(shown, grid, size).long()
        low, high = grid.range[2], grid.range[5]
        level = ((shown[:, 2] - low) / (high - low)).clamp(0, 1)
        shade = torch.stack([90 + 120 * level, 110 + 100 * level, 200 - 60 * level], -1)
        column, row = place[:, 0].clamp(0, size[0] - 1), place[:, 1].clamp(0, size[1] - 1)
        pixels[row, column] = shade.to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    draw = ImageDraw.Draw(image)
    _outline(draw, true, grid, size, "green")
    _outline(draw, told, grid, size, "red")
    return _encoded(image)


def map_picture(values: Tensor, boxes: Tensor, grid: Grid) -> str:
    """A map (H = y, W = x) over the ground, its largest value white, with boxes in green."""
    from PIL import Image, ImageDraw

    size = _size(grid)
    low, high = values.min(), values.max()
    level = (values - low) / (high - low).clamp_min(1e-9)
    # Rows of the picture follow falling x, columns falling y.
    turned = level.T.flip(0, 1)
    shade = torch.stack([turned.sqrt(), turned, turned.square()], -1)
    pixels = (shade * 255).to(torch.uint8).contiguous().numpy()
    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    _outline(ImageDraw.Draw(image), boxes, grid, size, "green")
    return _encoded(image)


def camera_picture(
    images: Tensor,
    intrinsics: Tensor,
    cameras: Tensor,
    boxes: Sequence[tuple[Tensor, str]],
    *,
    width: int = 480,
) -> str:
    """Camera images below each other with the edges of boxes.

    Args:
        images: (V, 3, h, w) in [0, 1].
        intrinsics: (V, 3, 3).
        cameras: (V, 4, 4), from each camera to the boxes' frame.
        boxes: sets of (n, >= 7) with a colour, "green" or "red".
        width: of the picture in pixels.
    """
    from PIL import Image, ImageDraw

    views = []
    for view in range(len(images)):
        pixels = (images[view].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        image = Image.fromarray(pixels.numpy())
        scale = width / image.width
        image = image.resize((width, max(1, round(image.height * scale))))
        draw = ImageDraw.Draw(image)
        for own, colour in boxes:
            _edges(draw, own, intrinsics[view], cameras[view], scale, colour)
        views.append(image)
    sheet = Image.new("RGB", (width, sum(v.height for v in views)))
    top = 0
    for image in views:
        sheet.paste(image, (0, top))
        top += image.height
    return _encoded(sheet)


def _edges(
    draw: Any, boxes: Tensor, intrinsics: Tensor, camera: Tensor, scale: float, colour: str
) -> None:
    if len(boxes) == 0:
        return
    pixels, depth = project(corners(boxes).flatten(0, 1), intrinsics, camera)
    ends = (pixels * scale).reshape(len(boxes), 8, 2).tolist()
    ahead = (depth.reshape(len(boxes), 8) > 0.3).all(1).tolist()
    for shape, seen in zip(ends, ahead, strict=True):
        if seen:
            for i, j in _EDGES:
                draw.line([tuple(shape[i]), tuple(shape[j])], fill=_COLOURS[colour])
