"""MiniBEV: a detector in bird's-eye view small enough for a processor core, for any sensors.

Every sensor is brought to one map over the ground ("low"), an encoder widens it ("high"), a
centre head says what stands where. LiDAR: pillars as in PointPillars (Lang et al., CVPR 2019)
with a maximum by scatter, so that no number of points is fixed. Cameras: lift, splat (Philion
and Fidler, ECCV 2020). Both: their maps joined by a convolution. Maps are (B, C, H = y, W = x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError, nearest
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.cameras import apply_pose, pixel_rays

SENSORS = ("lidar", "camera")
_STRIDE = 8  # of the camera's features
_POINT = 9  # numbers that describe a point in its pillar


def _block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class Pillars(nn.Module):
    """Points to a map: a linear layer for each point, the maximum over each pillar.

    Args:
        grid: of the map.
        width: channels C.
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.layer = nn.Linear(_POINT, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.smooth = _block(width, width)

    def forward(self, points: Tensor, point_count: Tensor) -> Tensor:
        """(B, C, H, W) of points (B, N, >= 4), of which the first `point_count` (B,) are real."""
        height, width = self.grid.shape
        rows, most = points.shape[:2]
        pillars = rows * height * width
        real = torch.arange(most, device=points.device) < point_count[:, None]
        low, high = self.grid.range[2], self.grid.range[5]
        z = points[..., 2]
        seen = real & self.grid.inside(points) & (z >= low) & (z < high)
        whole = torch.compiler.is_exporting()
        if whole:  # shapes of a graph do not depend on values: all points are carried
            frame = torch.arange(rows, device=points.device)[:, None].expand(rows, most).flatten()
            own = points[..., :4].flatten(0, 1)
        else:
            frame, place = seen.nonzero(as_tuple=True)
            own = points[frame, place, :4]
        cells = self.grid.cells(own).floor()
        pillar = (frame * height + cells[:, 1].long()) * width + cells[:, 0].long()
        if whole:  # those that are not seen go to one pillar more, which is cut off below
            pillar = torch.where(seen.flatten(), pillar, pillars)
        flat = own.new_zeros(pillars + whole, self.width)
        if own.shape[0] > 1:
            described = self._described(own, cells, pillar, flat.shape[0])
            strength = F.relu(self.norm(self.layer(described)))
            spread = pillar[:, None].expand_as(strength)
            flat = flat.scatter_reduce(0, spread, strength, "amax", include_self=True)
        else:  # nothing was seen: the map is empty, but not without a gradient
            flat = flat + 0.0 * (self.layer.weight.sum() + self.norm.weight.sum())
            flat = flat + 0.0 * self.norm.bias.sum()
        maps = flat[:pillars].reshape(rows, height, width, self.width).permute(0, 3, 1, 2)
        smooth: Tensor = self.smooth(maps)
        return smooth

    def _described(self, own: Tensor, cells: Tensor, pillar: Tensor, pillars: int) -> Tensor:
        """(n, 9): x, y, z, intensity, away from the pillar's mean, away from its middle."""
        total = own.new_zeros(pillars, 4)
        ones = torch.ones_like(own[:, :1])
        total = total.index_add(0, pillar, torch.cat([own[:, :3], ones], 1))
        mean = total[pillar]
        away = own[:, :3] - mean[:, :3] / mean[:, 3:]
        middle = own[:, :2] - self.grid.metres(cells + 0.5)
        # Metres over tens of metres: as large as the other numbers.
        scaled = torch.cat([own[:, :2] / 10.0, own[:, 2:]], 1)
        return torch.cat([scaled, away, middle], 1)


class LiftSplat(nn.Module):
    """Images to a map: features with a distribution over depth, put where their rays lead.

    Args:
        grid: of the map.
        width: channels C.
        depths: (first, last, number of bins), metres.
        image_width: channels of the image network's last layers.
    """

    def __init__(
        self,
        grid: Grid,
        width: int,
        depths: tuple[float, float, int],
        image_width: int,
    ) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        first, last, bins = depths
        self.register_buffer("depths", torch.linspace(first, last, bins), persistent=False)
        quarter, half = max(4, image_width // 4), max(8, image_width // 2)
        self.trunk = nn.Sequential(
            _block(3, quarter, 2),
            _block(quarter, half, 2),
            _block(half, image_width, 2),
            _block(image_width, image_width),
        )
        self.lift = nn.Conv2d(image_width, bins + width, 1)
        self.smooth = _block(width, width)

    def forward(self, images: Tensor, intrinsics: Tensor, cameras: Tensor) -> Tensor:
        """(B, C, H, W) of images (B, V, 3, h, w), intrinsics (B, V, 3, 3), poses (B, V, 4, 4)."""
        rows, views = images.shape[:2]
        depths: Tensor = self.depths  # type: ignore[assignment]
        bins = len(depths)
        lifted = self.lift(self.trunk(images.flatten(0, 1) * 2 - 1))
        share = lifted[:, :bins].softmax(1).flatten(2)  # (B V, D, P)
        content = lifted[:, bins:].flatten(2).transpose(1, 2)  # (B V, P, C)
        with torch.no_grad():
            cell, inside = self._cells(intrinsics, cameras, lifted.shape[-2:])
        height, width = self.grid.shape
        frame = torch.arange(rows, device=images.device)[:, None].expand(rows, views).flatten()
        cell = cell + (frame * height * width)[:, None, None]
        # Rays thin out with the distance: weighed by it, near cells do not drown the far ones.
        far = depths / depths[-1]
        if torch.compiler.is_exporting():  # shapes of a graph do not depend on values
            weight = share * far[:, None] * inside
            thrown = (weight[..., None] * content[:, None]).flatten(0, 2)
            place = torch.where(inside, cell, 0).flatten()
        else:
            camera, depth, pixel = inside.nonzero(as_tuple=True)
            weight = share[camera, depth, pixel] * far[depth]
            thrown = weight[:, None] * content[camera, pixel]
            place = cell[camera, depth, pixel]
        flat = content.new_zeros(rows * height * width, self.width)
        flat = flat.index_add(0, place, thrown)
        maps = flat.reshape(rows, height, width, self.width).permute(0, 3, 1, 2)
        smooth: Tensor = self.smooth(maps)
        return smooth

    def _cells(
        self, intrinsics: Tensor, cameras: Tensor, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Cell numbers (B V, D, P) of every pixel at every depth, and whether they are inside.

        Args:
            intrinsics: (B, V, 3, 3).
            cameras: (B, V, 4, 4).
            size: (height, width) of the trunk's map, which rounds odd sides up.
        """
        depths: Tensor = self.depths  # type: ignore[assignment]
        sides = (size[0] * _STRIDE, size[1] * _STRIDE)
        rays = pixel_rays(intrinsics.flatten(0, 1), sides, _STRIDE)  # (B V, P, 3)
        places = (rays[:, None] * depths[:, None, None]).flatten(1, 2)
        places = apply_pose(cameras.flatten(0, 1), places)
        z, (low, high) = places[..., 2], (self.grid.range[2], self.grid.range[5])
        inside = self.grid.inside(places) & (z >= low) & (z < high)
        cells = self.grid.cells(places).floor().long()
        number = cells[..., 1] * self.grid.shape[1] + cells[..., 0]
        shape = (rays.shape[0], len(depths), rays.shape[1])
        return number.reshape(shape), inside.reshape(shape)


class BevEncoder(nn.Module):
    """Convolutions at strides 1, 2 and 4, joined again at stride 2.

    Args:
        before: channels of the sensors' map.
        widths: channels at the three strides; the output has the sum of the last two.
    """

    def __init__(self, before: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, two, four = widths
        self.fine = _block(before, one)
        self.middle = nn.Sequential(_block(one, two, 2), _block(two, two))
        self.coarse = nn.Sequential(_block(two, four, 2), _block(four, four))
        self.width = two + four

    def forward(self, low: Tensor) -> Tensor:
        """(B, C', H / 2, W / 2)."""
        middle = self.middle(self.fine(low))
        coarse = F.interpolate(self.coarse(middle), size=middle.shape[-2:], mode="nearest")
        return torch.cat([middle, coarse], 1)


class CentreHead(nn.Module):
    """Heat maps of the classes, and what stands at their peaks.

    Args:
        before: channels of the map.
        classes: number of classes.
        width: channels of the shared layer.
        velocity: whether boxes have one.
    """

    def __init__(self, before: int, classes: int, width: int, *, velocity: bool) -> None:
        super().__init__()
        self.shared = _block(before, width)
        branches = {"hm": classes, "reg": 2, "height": 1, "dim": 3, "rot": 2}
        if velocity:
            branches["vel"] = 2
        self.branches = nn.ModuleDict(
            {name: nn.Conv2d(width, count, 1) for name, count in branches.items()}
        )
        # A share of 0.1 of all cells at the start, as focal losses need it.
        nn.init.constant_(self.branches["hm"].bias, -2.19)  # type: ignore[arg-type]

    def forward(self, high: Tensor) -> dict[str, Tensor]:
        """Branch to maps (B, n, H', W')."""
        shared = self.shared(high)
        return {name: layer(shared) for name, layer in self.branches.items()}


class MiniBEV(nn.Module):
    """A detector over the ground, of LiDAR, cameras or both.

    Args:
        sensors: what it reads.
        categories: names of the classes.
        grid: of the sensors' map, plain values of a `Grid`.
        width: channels of the sensors' map.
        widths: of the encoder at strides 1, 2, 4.
        head_width: of the head's shared layer.
        image_width: of the image network.
        depths: first and last depth in metres, and number of bins.
        velocity: whether the head tells velocities.

    Attributes:
        taps: "low", the map before the encoder; "high", the one after it.
        free_axes: of each input, the axes that have any size.

    Raises:
        ModelError: an unknown sensor, or none.
    """

    free_axes: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "points": {0: "batch", 1: "points"},
        "point_count": {0: "batch"},
        "images": {0: "batch", 1: "views", 3: "height", 4: "width"},
        "intrinsics": {0: "batch", 1: "views"},
        "cameras": {0: "batch", 1: "views"},
    }

    def __init__(
        self,
        categories: Sequence[str],
        grid: Mapping[str, Any],
        sensors: Sequence[str] = ("lidar",),
        width: int = 32,
        widths: Sequence[int] = (32, 48, 48),
        head_width: int = 48,
        image_width: int = 48,
        depths: Sequence[float] = (1.0, 25.0, 24),
        velocity: bool = False,
    ) -> None:
        super().__init__()
        for name in sensors:
            if name not in SENSORS:
                raise ModelError(f"MiniBEV reads no sensor '{name}'{nearest(name, SENSORS)}")
        if not sensors or len(widths) != 3 or len(depths) != 3:
            raise ModelError(
                "MiniBEV needs one sensor at least, three widths and (first, last, bins) of depth"
            )
        self.grid = Grid.of(grid)
        self.sensors = tuple(name for name in SENSORS if name in sensors)
        self.lidar = Pillars(self.grid, width) if "lidar" in sensors else None
        self.camera: LiftSplat | None = None
        if "camera" in sensors:
            bins = (float(depths[0]), float(depths[1]), int(depths[2]))
            self.camera = LiftSplat(self.grid, width, bins, image_width)
        both = len(self.sensors) > 1
        self.low: nn.Module = _block(2 * width, width) if both else nn.Identity()
        self.high = BevEncoder(width, widths)
        self.head = CentreHead(self.high.width, len(categories), head_width, velocity=velocity)
        self.taps = {"low": "low", "high": "high"}

    def forward(
        self,
        points: Tensor | None = None,
        point_count: Tensor | None = None,
        images: Tensor | None = None,
        intrinsics: Tensor | None = None,
        cameras: Tensor | None = None,
    ) -> dict[str, Any]:
        """`head`: a list of one task's branches.

        Args:
            points: (B, N, >= 4), padded.
            point_count: (B,).
            images: (B, V, 3, h, w) in [0, 1].
            intrinsics: (B, V, 3, 3).
            cameras: (B, V, 4, 4), from each camera to the grid's frame.

        Raises:
            ModelError: what a sensor needs is not given.
        """
        maps = []
        if self.lidar is not None:
            if points is None or point_count is None:
                raise ModelError("this MiniBEV reads a LiDAR, and the view has no points")
            maps.append(self.lidar(points, point_count))
        if self.camera is not None:
            if images is None or intrinsics is None or cameras is None:
                raise ModelError("this MiniBEV reads cameras, and the view has no images")
            maps.append(self.camera(images, intrinsics, cameras))
        low = self.low(maps[0] if len(maps) == 1 else torch.cat(maps, 1))
        return {"head": [self.head(self.high(low))]}

    def example_view(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Two frames of what its sensors read: points around, two cameras that look about.

        Images are small, so that no ray ends by chance on the border of two cells, where
        rounding alone would decide.
        """
        view: dict[str, Tensor] = {}
        if self.lidar is not None:
            low, high = (torch.tensor(self.grid.range[i : i + 3]) for i in (0, 3))
            # Some of them lie beyond the grid.
            places = low + (high - low) * (1.1 * torch.rand(2, 64, 3, generator=generator) - 0.05)
            strength = torch.rand(2, 64, 1, generator=generator)
            view["points"] = torch.cat([places, strength], -1)
            view["point_count"] = torch.tensor([64, 40])
        if self.camera is not None:
            tall, wide = 2 * _STRIDE, 3 * _STRIDE
            view["images"] = torch.rand(2, 2, 3, tall, wide, generator=generator)
            lens = torch.tensor([[wide, 0.0, wide / 2], [0.0, wide, tall / 2], [0.0, 0.0, 1.0]])
            view["intrinsics"] = lens.repeat(2, 2, 1, 1)
            view["cameras"] = _looking(torch.rand(2, 2, generator=generator) * 2 * torch.pi)
        return view


def _looking(angle: Tensor) -> Tensor:
    """Poses (..., 4, 4) of cameras that look along directions (...) over the ground."""
    sine, cosine, none = angle.sin(), angle.cos(), torch.zeros_like(angle)
    rows = [
        torch.stack([sine, none, cosine, none], -1),
        torch.stack([-cosine, none, sine, none], -1),
        torch.stack([none, none - 1, none, none], -1),
        torch.stack([none, none, none, none + 1], -1),
    ]
    return torch.stack(rows, -2)
