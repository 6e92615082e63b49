"""Boxes as maps of their centres, and back: Gaussians, targets of centre heads, decoding.

Sources: Gaussian radius of CornerNet (Law and Deng, ECCV 2018) in the form of CenterNet's
code; targets and decoding of CenterPoint (Yin et al., CVPR 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.parts.bev_grid import Grid

# Regression branches of a centre head in the order in which they are joined, with their widths.
BRANCHES = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2, "iou": 1}


def gaussian_radius(length: Tensor, width: Tensor, min_overlap: float = 0.7) -> Tensor:
    """How far a box's centre may move until the overlap of the two boxes falls below a bound.

    The usual form of detectors' code: "/ 2" in all three branches.

    Args:
        length: (...) in cells.
        width: (...) in cells.
        min_overlap: in (0, 1).
    """
    m = min_overlap
    total, area = length + width, length * width
    first = (total + (total.square() - 4 * area * (1 - m) / (1 + m)).clamp_min(0).sqrt()) / 2
    double = 2 * total
    second = (double + (double.square() - 16 * (1 - m) * area).clamp_min(0).sqrt()) / 2
    shrunk = -2 * m * total
    third = (shrunk + (shrunk.square() - 16 * m * (m - 1) * area).clamp_min(0).sqrt()) / 2
    return torch.minimum(torch.minimum(first, second), third)


def gaussians(
    boxes: Tensor,
    valid: Tensor,
    grid: Grid,
    *,
    min_overlap: float = 0.7,
    min_radius: int = 0,
) -> Tensor:
    """A Gaussian at each box's centre cell, cut off at its radius: (B, M, H, W), float32.

    sigma = (2 radius + 1) / 6, value 1 at the centre cell. Boxes that are not valid or whose
    centre cell is beyond the grid have none.

    Args:
        boxes: (B, M, >= 7).
        valid: (B, M) bool.
        grid: in whose cells.
        min_overlap: see `gaussian_radius`.
        min_radius: in cells.
    """
    height, width = grid.shape
    place = grid.cells(boxes).trunc().long()
    size = boxes[..., 3:5] / boxes.new_tensor(grid.cell)
    radius = gaussian_radius(size[..., 0], size[..., 1], min_overlap).long().clamp_min(min_radius)
    shown = valid & grid.inside(boxes)
    sigma = (2.0 * radius.float() + 1.0) / 6.0
    along = [
        torch.arange(count, device=boxes.device) - place[..., axis, None]
        for axis, count in ((0, width), (1, height))
    ]
    # A Gaussian of two variables is the product of two of one; so is the square it is cut to.
    sides = [
        torch.exp(-steps.float().square() / (2 * sigma[..., None].square()))
        * (steps.abs() <= radius[..., None])
        for steps in along
    ]
    return sides[1][..., :, None] * sides[0][..., None, :] * shown[..., None, None]


def gaussian_mask(
    boxes: Tensor, valid: Tensor, grid: Grid, *, min_overlap: float = 0.7, min_radius: int = 0
) -> Tensor:
    """The largest of the boxes' Gaussians in every cell: (B, H, W), float32, 0 without boxes."""
    if boxes.shape[1] == 0:
        return torch.zeros(len(boxes), *grid.shape, device=boxes.device)
    drawn = gaussians(boxes, valid, grid, min_overlap=min_overlap, min_radius=min_radius)
    return drawn.amax(1)


def class_maps(
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    grid: Grid,
    classes: int,
    *,
    min_overlap: float = 0.5,
    min_radius: int = 1,
) -> Tensor:
    """Targets of a centre head's heat maps: (B, K, H, W), the boxes' Gaussians by class."""
    if boxes.shape[1] == 0:
        return torch.zeros(len(boxes), classes, *grid.shape, device=boxes.device)
    drawn = gaussians(boxes, valid, grid, min_overlap=min_overlap, min_radius=min_radius)
    of_class = [drawn * (labels == k)[..., None, None] for k in range(classes)]
    return torch.stack([own.amax(1) for own in of_class], dim=1)


def centre_targets(boxes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """What the regression branches are to say at a box's centre cell, by branch: (B, M, n).

    `reg` is the centre within its cell, `height` its z, `dim` the logarithms of l, w, h, `rot`
    sine and cosine of the yaw, `vel` the velocity where boxes have one.
    """
    cells = grid.cells(boxes)
    found = {
        "reg": cells - cells.floor(),
        "height": boxes[..., 2:3],
        "dim": boxes[..., 3:6].clamp_min(1e-3).log(),
        "rot": torch.stack([boxes[..., 6].sin(), boxes[..., 6].cos()], dim=-1),
    }
    if boxes.shape[-1] >= 9:
        found["vel"] = boxes[..., 7:9]
    return found


def at_centres(maps: Tensor, boxes: Tensor, grid: Grid) -> Tensor:
    """Values (B, M, C) of maps (B, C, H, W) at the boxes' centre cells (clamped to the map)."""
    height, width = maps.shape[-2:]
    place = grid.cells(boxes).floor().long()
    column, row = place[..., 0].clamp(0, width - 1), place[..., 1].clamp(0, height - 1)
    flat = (row * width + column)[:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, flat).transpose(1, 2)


def decode_centres(
    head: Mapping[str, Tensor],
    grid: Grid,
    *,
    first_label: int = 0,
    most: int = 50,
    least_score: float = 0.1,
    apart: float | Sequence[float] = 1.0,
    rectify: float = 0.65,
) -> list[dict[str, Tensor]]:
    """Boxes of one centre head: peaks of the heat maps, what the branches say there, circle NMS.

    Args:
        head: "hm" (B, K, H, W) logits and the branches `BRANCHES`, maps (B, n, H, W).
        grid: whose range the maps cover.
        first_label: the number of this head's first class.
        most: peaks that are kept of a frame.
        least_score: below it a peak is dropped.
        apart: metres below which a box of lower score is dropped beside one of its class; one
            number, or one a class.
        rectify: share a of the "iou" branch, where there is one: the score is
            p^(1 - a) iou^a with iou = (value + 1) / 2 clamped to [0, 1].

    Returns:
        Per frame "boxes" (n, 7 or 9), "scores" (n,), "labels" (n,), by falling score.

    Raises:
        ModelError: a branch that boxes need is missing.
    """
    score = head["hm"].sigmoid()
    if "iou" in head:
        overlap = ((head["iou"] + 1) / 2).clamp(0, 1)
        score = score ** (1 - rectify) * overlap**rectify
    grid = grid.over(score)
    peak = F.max_pool2d(score, 3, stride=1, padding=1) == score
    _, classes, height, width = score.shape
    top, place = (score * peak).flatten(1).topk(min(most, classes * height * width), dim=1)
    label, cell = place // (height * width), place % (height * width)
    column, row = cell % width, cell // width
    said = {
        name: maps.flatten(2).gather(2, cell[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
        for name, maps in head.items()
        if name in BRANCHES
    }
    lacking = {"reg", "height", "dim", "rot"} - set(said)
    if lacking:
        raise ModelError(f"a centre head without {', '.join(sorted(lacking))} gives no boxes")
    centre = grid.metres(torch.stack([column, row], -1).to(score.dtype) + said["reg"])
    yaw = torch.atan2(said["rot"][..., 0], said["rot"][..., 1])[..., None]
    parts = [centre, said["height"], said["dim"].clamp(-5, 5).exp(), yaw]
    if "vel" in said:
        parts.append(said["vel"])
    boxes = torch.cat(parts, dim=-1)
    bounds = boxes.new_tensor([apart] * classes if isinstance(apart, (int, float)) else apart)
    found = []
    for frame in range(len(boxes)):
        kept = top[frame] >= least_score
        own = {
            "boxes": boxes[frame, kept],
            "scores": top[frame, kept],
            "labels": label[frame, kept],
        }
        chosen = circle_nms(own["boxes"], own["labels"], bounds)
        own = {name: value[chosen] for name, value in own.items()}
        own["labels"] = own["labels"] + first_label
        found.append(own)
    return found


def circle_nms(boxes: Tensor, labels: Tensor, apart: Tensor) -> Tensor:
    """Positions of the boxes that are kept, of boxes by falling score.

    Args:
        boxes: (n, >= 2).
        labels: (n,).
        apart: (K,) metres by class: a box is dropped when a kept one of its class is nearer.
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    near = torch.cdist(boxes[:, :2], boxes[:, :2]) < apart[labels][:, None]
    near &= labels[:, None] == labels[None]
    table = near.tolist()
    kept: list[int] = []
    for number in range(len(boxes)):
        if not any(table[number][other] for other in kept):
            kept.append(number)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)
