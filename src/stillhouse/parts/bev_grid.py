"""The grid that a bird's-eye-view (BEV) map covers, and reading such maps at places in metres.

Maps are laid out (B, C, H = y, W = x): row r covers [y_min + r cell, y_min + (r + 1) cell). Cell
units are continuous: column j covers [j, j + 1), so its centre is j + 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError


@dataclass(frozen=True)
class Grid:
    """The ground that BEV maps cover, in metres of the frame that boxes are given in.

    Attributes:
        range: (x_min, y_min, z_min, x_max, y_max, z_max).
        cell: sides of a cell along x and y, of the map the sensors are brought to. Maps of
            other resolution over the same range are told by their own size.

    Raises:
        ModelError: an empty range, or a cell that does not divide it.
    """

    range: tuple[float, float, float, float, float, float]
    cell: tuple[float, float]

    def __post_init__(self) -> None:
        x0, y0, z0, x1, y1, z1 = self.range
        if not (x0 < x1 and y0 < y1 and z0 < z1) or min(self.cell) <= 0:
            raise ModelError(f"no grid has the range {self.range} with cells of {self.cell} m")
        for name, count in (("x", (x1 - x0) / self.cell[0]), ("y", (y1 - y0) / self.cell[1])):
            if abs(count - round(count)) > 1e-4:
                raise ModelError(
                    f"cells of {self.cell} m do not divide the range {self.range}: {count:.3f} of "
                    f"them along {name}"
                )

    @classmethod
    def of(cls, given: Grid | Mapping[str, Any]) -> Grid:
        """A grid from plain values: {"range": six numbers, "cell": one or two}.

        Raises:
            ModelError: other keys or numbers of values.
        """
        if isinstance(given, Grid):
            return given
        span, cell = given.get("range"), given.get("cell")
        pair: Any = cell if isinstance(cell, Sequence) else (cell, cell)
        if not isinstance(span, Sequence) or len(span) != 6 or len(pair) != 2 or None in pair:
            raise ModelError(
                "a grid is {range: [x_min, y_min, z_min, x_max, y_max, z_max], cell: metres}, "
                f"not {dict(given)}"
            )
        x0, y0, z0, x1, y1, z1 = (float(value) for value in span)
        return cls((x0, y0, z0, x1, y1, z1), (float(pair[0]), float(pair[1])))

    def plain(self) -> dict[str, Any]:
        """Plain values, for `of`."""
        return {"range": list(self.range), "cell": list(self.cell)}

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W): cells along y and x."""
        x0, y0, _, x1, y1, _ = self.range
        return round((y1 - y0) / self.cell[1]), round((x1 - x0) / self.cell[0])

    def strided(self, stride: int) -> Grid:
        """The same ground in cells `stride` times as large."""
        return Grid(self.range, (self.cell[0] * stride, self.cell[1] * stride))

    def over(self, maps: Tensor) -> Grid:
        """The same ground in cells of a map (..., H, W) of any resolution."""
        height, width = maps.shape[-2:]
        x0, y0, _, x1, y1, _ = self.range
        return Grid(self.range, ((x1 - x0) / width, (y1 - y0) / height))

    def _column(self, values: tuple[float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    def cells(self, places: Tensor) -> Tensor:
        """Continuous cell units (u along x, v along y) of places.

        Args:
            places: (..., >= 2) x, y in metres.
        """
        start = self._column(self.range[:2], places)
        return (places[..., :2] - start) / self._column(self.cell, places)

    def metres(self, cells: Tensor) -> Tensor:
        """The inverse of `cells`, of (..., 2)."""
        return cells * self._column(self.cell, cells) + self._column(self.range[:2], cells)

    def inside(self, places: Tensor) -> Tensor:
        """Whether places (..., >= 2) lie on the grid: (...) bool; the far borders are outside."""
        low = self._column(self.range[:2], places)
        high = self._column(self.range[3:5], places)
        xy = places[..., :2]
        return ((xy >= low) & (xy < high)).all(-1)


def sample_maps(
    maps: Tensor, places: Tensor, grid: Grid, *, transpose_points: bool = False
) -> Tensor:
    """Features at places, bilinear between the centres of cells, zero beyond the map.

    Args:
        maps: (B, C, H, W) over the range of `grid`, of any resolution.
        places: (B, P, 2) x, y in metres.
        grid: whose range the maps cover.
        transpose_points: exchange the two normalised coordinates before sampling, as the
            released code of UniDistill does; only to compare with it.

    Returns:
        (B, P, C).
    """
    x0, y0, _, x1, y1, _ = grid.range
    low = places.new_tensor((x0, y0))
    size = places.new_tensor((x1 - x0, y1 - y0))
    normal = ((places - low) / size * 2.0 - 1.0).to(maps.dtype)
    if transpose_points:
        normal = normal.flip(-1)
    found = F.grid_sample(
        maps, normal[:, :, None], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return found[..., 0].transpose(1, 2)
