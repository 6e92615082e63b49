"""Running an image network on images of any size: in tiles, and by adaptive cropping.

Three tools that compose. `adaptive_crops` (ACS of IMDN) and `padded` serve networks that need
sides divisible by some number; `tiled` bounds the memory for large images:

    tiled(lambda part: adaptive_crops(net, part), image, tile=256)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import DataError, ModelError

Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Crop:
    """How one side of an image is cut in two overlapping crops.

    Attributes:
        length: the side H.
        half: H // 2; the first crop answers for [0, half).
        size: length of either crop.
    """

    length: int
    half: int
    size: int

    @property
    def start(self) -> int:
        """Where the far crop begins; negative when the side is too short."""
        return self.length - self.size

    @property
    def far(self) -> tuple[int, int]:
        """The part [first, last) of the far crop that is kept."""
        return self.half - self.start, self.size

    @property
    def applicable(self) -> bool:
        """Whether both crops lie within the side."""
        return self.start >= 0


def crop_geometry(length: int, *, shave: int = 32, modulus: int = 4) -> Crop:
    """The adaptive crop of one side (IMDN, released code of the any-scale test).

    The crop is half the side plus `shave`, reduced to a multiple of `modulus`, so that each
    half keeps about `shave` pixels of real context beyond the seam.

    Args:
        length: the side H in pixels.
        shave: context beyond the seam.
        modulus: what crop sides must be divisible by.
    """
    half = length // 2
    return Crop(length, half, half + shave - (half + shave) % modulus)


def adaptive_crops(model: Restore, image: Tensor, *, shave: int = 32, modulus: int = 4) -> Tensor:
    """Run a network that keeps the size but needs sides divisible by `modulus` (ACS).

    Sides that are divisible already go through whole. Otherwise four corner crops are run as
    one batch, and each gives its own quadrant. Where a side is too short for the rule (below
    60 px with the defaults: the released code fails there) the image is padded by reflection
    instead (our choice).

    Args:
        model: (4B, C, h, w) -> (4B, C', h, w).
        image: (B, C, H, W), H and W >= 1.
        shave: context beyond the seam in pixels.
        modulus: what the network's input sides must be divisible by.

    Returns:
        (B, C', H, W).

    Raises:
        ModelError: the network does not keep the size of a crop.
    """
    height, width = _sides(image)
    if height % modulus == 0 and width % modulus == 0:
        return _same_size(model, image)
    rows = crop_geometry(height, shave=shave, modulus=modulus)
    columns = crop_geometry(width, shave=shave, modulus=modulus)
    if not (rows.applicable and columns.applicable):
        return padded(lambda part: _same_size(model, part), image, modulus=modulus)

    top, bottom = image[..., : rows.size, :], image[..., rows.start :, :]
    corners = [
        top[..., : columns.size],
        top[..., columns.start :],
        bottom[..., : columns.size],
        bottom[..., columns.start :],
    ]
    done = _same_size(model, torch.cat(corners)).chunk(4)
    near_rows, near_columns = slice(0, rows.half), slice(0, columns.half)
    far_rows, far_columns = slice(*rows.far), slice(*columns.far)
    upper = torch.cat(
        [done[0][..., near_rows, near_columns], done[1][..., near_rows, far_columns]], dim=-1
    )
    lower = torch.cat(
        [done[2][..., far_rows, near_columns], done[3][..., far_rows, far_columns]], dim=-1
    )
    return torch.cat([upper, lower], dim=-2)


def padded(model: Restore, image: Tensor, *, modulus: int, least: int = 1) -> Tensor:
    """Run a network on the image padded by reflection at the far sides, and crop the result.

    Args:
        model: (B, C, h, w) -> (B, C', s h, s w) for a whole number s >= 1.
        image: (B, C, H, W).
        modulus: what the network's input sides must be divisible by.
        least: the shortest side the network takes.

    Returns:
        (B, C', s H, s W).
    """
    height, width = _sides(image)
    to_height, to_width = (-(-max(side, least) // modulus) * modulus for side in (height, width))
    if (to_height, to_width) == (height, width):
        return model(image)
    rows = _reflected(height, to_height).to(image.device)
    columns = _reflected(width, to_width).to(image.device)
    done = model(image.index_select(-2, rows).index_select(-1, columns))
    scale = _scale_of(done, to_height, to_width)
    return done[..., : height * scale, : width * scale]


def _reflected(length: int, padded_length: int) -> Tensor:
    """Places that continue 0..length-1 by reflection, as often as it takes."""
    period = max(1, 2 * (length - 1))
    places = torch.arange(padded_length) % period
    return torch.where(places < length, places, period - places)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one side: equal tiles, the last one flush with the end.

    Args:
        length: the side in pixels.
        tile: pixels of a tile, context included.
        overlap: context that a tile's inner borders have at least.
    """
    if length <= tile:
        return [0]
    step = tile - 2 * overlap
    count = -(-(length - tile) // step) + 1
    # Spread evenly, so that the context is shared out instead of piled up at the end.
    return [(length - tile) * i // (count - 1) for i in range(count)]


def tiled(
    model: Restore,
    image: Tensor,
    *,
    tile: int = 256,
    overlap: int = 32,
    scale: int | None = None,
    batch: int = 1,
) -> Tensor:
    """Run a network tile by tile; memory is bounded by the tile, not by the image.

    Each tile's own part ends halfway into its overlaps, so every kept pixel has at least
    `overlap` pixels of context from within the image or lies at the image's border. Networks
    whose receptive radius is at most `overlap` give what they give on the whole image; those
    with global statistics (channel attention) see the tile's instead of the image's.

    Args:
        model: (B, C, h, w) -> (B, C', s h, s w) for a whole number s >= 1.
        image: (B, C, H, W).
        tile: longest side of a tile in input pixels, context included; 0 runs the image whole.
        overlap: context in input pixels.
        scale: s; read off the first tile's result when not given.
        batch: tiles of one image run at once.

    Returns:
        (B, C', s H, s W).

    Raises:
        DataError: tiles that are all context.
        ModelError: the results' size is no whole multiple of the tile's, or not s.
    """
    height, width = _sides(image)
    if tile <= 0 or (height <= tile and width <= tile):
        done = model(image)
        _check_scale(_scale_of(done, height, width), scale)
        return done
    if overlap < 0 or tile - 2 * overlap < 1:
        raise DataError(
            f"tiles of {tile} px with {overlap} px of context on each side keep nothing; "
            f"tile must be more than {2 * overlap}"
        )
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    high, wide = min(tile, height), min(tile, width)
    places = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    result: Tensor | None = None
    for begin in range(0, len(places), max(1, batch)):
        group = places[begin : begin + max(1, batch)]
        parts = [
            image[..., rows[i] : rows[i] + high, columns[j] : columns[j] + wide] for i, j in group
        ]
        done = model(torch.cat(parts))
        found = _scale_of(done, high, wide)
        _check_scale(found, scale)
        scale = found
        if result is None:
            shape = (image.shape[0], done.shape[1], height * scale, width * scale)
            result = done.new_empty(shape)
        for (i, j), piece in zip(group, done.chunk(len(group)), strict=True):
            top, bottom = (scale * edge for edge in _own(rows, i, high, height))
            left, right = (scale * edge for edge in _own(columns, j, wide, width))
            y, x = scale * rows[i], scale * columns[j]
            result[..., top:bottom, left:right] = piece[
                ..., top - y : bottom - y, left - x : right - x
            ]
    assert result is not None
    return result


def any_size(
    model: Restore,
    image: Tensor,
    *,
    multiple: int = 1,
    scale: int | None = None,
    tile: int = 0,
    overlap: int = 32,
) -> Tensor:
    """Run an image network on images of any size, large ones in tiles.

    Args:
        model: (B, C, h, w) -> (B, C', s h, s w), for h and w divisible by `multiple`.
        image: (B, C, H, W).
        multiple: what the network's input sides must be divisible by. Other sizes go through
            adaptive cropping where the network keeps the size (`scale` 1), else are padded.
        scale: s; read off the result when not given.
        tile: see `tiled`; 0 runs the image whole.
        overlap: see `tiled`.

    Returns:
        (B, C', s H, s W).
    """

    def whole(part: Tensor) -> Tensor:
        if multiple == 1:
            return model(part)
        if scale == 1:
            return adaptive_crops(model, part, modulus=multiple)
        return padded(model, part, modulus=multiple)

    return tiled(whole, image, tile=tile, overlap=overlap, scale=scale)


def _own(starts: list[int], index: int, tile: int, length: int) -> tuple[int, int]:
    """The part [first, last) of the side that tile `index` answers for."""
    first = 0 if index == 0 else (starts[index] + starts[index - 1] + tile) // 2
    last = length
    if index + 1 < len(starts):
        last = (starts[index + 1] + starts[index] + tile) // 2
    return first, last


def _sides(image: Tensor) -> tuple[int, int]:
    if image.ndim != 4 or min(image.shape) < 1:
        raise DataError(f"an image batch must be (B, C, H, W) and not empty, got {image.shape}")
    return int(image.shape[-2]), int(image.shape[-1])


def _same_size(model: Restore, image: Tensor) -> Tensor:
    done = model(image)
    if done.shape[-2:] != image.shape[-2:]:
        raise ModelError(
            "adaptive cropping needs a network that keeps the size; got "
            f"{tuple(image.shape)} -> {tuple(done.shape)}"
        )
    return done


def _scale_of(done: Tensor, height: int, width: int) -> int:
    scale = done.shape[-2] // height
    if scale < 1 or tuple(done.shape[-2:]) != (scale * height, scale * width):
        raise ModelError(
            f"a network made {done.shape[-2]}x{done.shape[-1]} of {height}x{width} pixels; "
            "both sides must grow by the same whole number"
        )
    return int(scale)


def _check_scale(found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise ModelError(f"a network enlarged by {found}; {expected} was expected")
