"""Mosaics: several small images in the place of one, and back.

Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization (IDC), ICML
2022; used by NCFM (decoded at the same rate it is optimised) and RDED.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError


def tile_sides(side: int, factor: int) -> list[int]:
    """The sides of `factor` tiles that fill `side`; the first ones are one pixel larger."""
    short, longer = divmod(side, factor)
    return [short + (number < longer) for number in range(factor)]


def mosaic(images: Tensor, factor: int) -> Tensor:
    """Images of one class shrunk into mosaics of factor x factor tiles.

    Tile k (row by row) of mosaic i is image `k * n + i`, n the number of mosaics, shrunk by
    nearest-neighbour interpolation. Where the factor does not divide a side, the first tiles
    are one pixel larger (as released; decoding pads instead).

    Args:
        images: (factor^2 * n, C, H, W).
        factor: tiles per side; 1 gives the images back.

    Returns:
        (n, C, H, W).

    Raises:
        DataError: a number of images that fills no whole mosaics, or tiles without pixels.
    """
    height, width = images.shape[2:]
    if factor < 1 or len(images) % factor**2:
        raise DataError(f"{len(images)} images fill no whole number of {factor}x{factor} mosaics")
    if factor == 1:
        return images
    if factor > min(height, width):
        raise DataError(f"images of {height}x{width} have no {factor}x{factor} tiles")
    tiles = iter(torch.split(images, len(images) // factor**2))
    rows = []
    for high in tile_sides(height, factor):
        shrunk = [
            F.interpolate(next(tiles), size=(high, wide), mode="nearest")
            for wide in tile_sides(width, factor)
        ]
        rows.append(torch.cat(shrunk, dim=3))
    return torch.cat(rows, dim=2)
