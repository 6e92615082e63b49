"""Bicubic resizing as Matlab's imresize does it: how low-resolution images are made.

The pairs of super-resolution benchmarks were made by Matlab, whose reduction widens the cubic
kernel by the scale (antialiasing), repeats the border symmetrically, and rounds 8-bit images
after EACH of its two passes. Resizers that leave one of these out cost tenths of a decibel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import DataError

Image = TypeVar("Image", Tensor, NDArray[Any])


def imresize(
    image: Image,
    scale: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    rounded: bool = True,
    antialias: bool = True,
) -> Image:
    """Resize by Matlab's bicubic rule (Keys' kernel, a = -0.5).

    Output pixel j (from 1) is centred at input j / scale + (1 - 1 / scale) / 2. The dimension
    with the smaller scale goes first, the vertical one when they are equal. Checked against
    the low-resolution files of Set5, bit for bit.

    Args:
        image: a tensor (..., H, W), or an array (H, W) or (H, W, C). 8-bit images hold grey
            levels 0-255; floating point images any range.
        scale: output size / input size, below 1 to reduce; the output has
            ceil(scale * input) pixels a side.
        size: output (height, width) instead of `scale`.
        rounded: for 8-bit images: round half up and clip to 0-255 after each pass, as Matlab
            does with uint8. Without effect on floating point images.
        antialias: widen the kernel when reducing; False is ordinary bicubic interpolation.

    Returns:
        The resized image: uint8 for 8-bit input when `rounded`, float64 grey levels for 8-bit
        input otherwise, else the input's own floating point type. All sums run in float64.

    Raises:
        DataError: an empty image, a size or scale that is not positive, or both or neither of
            `scale` and `size`.
    """
    if isinstance(image, np.ndarray):
        # A copy where memory-mapped: torch does not take arrays that cannot be written.
        planes = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if planes.ndim not in {2, 3}:
            raise DataError(f"an array to resize must be (H, W) or (H, W, C), not {image.shape}")
        moved = planes if planes.ndim == 2 else planes.permute(2, 0, 1)
        done = _resize(moved, scale, size, rounded, antialias)
        result: NDArray[Any] = (
            done if done.ndim == 2 else done.permute(1, 2, 0).contiguous()
        ).numpy()
        return result
    return _resize(image, scale, size, rounded, antialias)


def downscale(image: Image, factor: float, *, rounded: bool = True) -> Image:
    """Reduce by `factor` >= 1: the low-resolution image of a high-resolution one."""
    return imresize(image, 1.0 / factor, rounded=rounded)


def upscale(image: Image, factor: float, *, rounded: bool = False) -> Image:
    """Enlarge by `factor` >= 1: the bicubic baseline of super-resolution."""
    return imresize(image, float(factor), rounded=rounded)


def _resize(
    image: Tensor,
    scale: float | None,
    size: tuple[int, int] | None,
    rounded: bool,
    antialias: bool,
) -> Tensor:
    if image.ndim < 2 or min(image.shape[-2:]) < 1:
        raise DataError(f"an image to resize needs (..., H, W) with H, W >= 1, not {image.shape}")
    height, width = int(image.shape[-2]), int(image.shape[-1])
    if (scale is None) == (size is None):
        raise DataError("resizing needs either a scale or a size")
    if size is not None:
        target = (int(size[0]), int(size[1]))
        scales = (target[0] / height, target[1] / width)
    else:
        assert scale is not None
        if not (scale > 0 and math.isfinite(scale)):
            raise DataError(f"the scale of resizing must be positive, not {scale}")
        target = (math.ceil(scale * height - 1e-9), math.ceil(scale * width - 1e-9))
        scales = (scale, scale)
    if min(target) < 1:
        raise DataError(f"an image cannot be resized to {target[0]}x{target[1]} pixels")

    eight_bit = image.dtype == torch.uint8
    if not eight_bit and not image.is_floating_point():
        raise DataError(f"an image to resize must be uint8 or floating point, not {image.dtype}")
    # Some accelerators have no float64.
    wide = torch.float32 if image.device.type == "mps" else torch.float64
    values = image.to(wide).contiguous()
    # sorted is stable: with equal scales the vertical pass comes first, as in Matlab.
    for axis in sorted((0, 1), key=lambda a: scales[a]):
        values = _pass(values, axis - 2, target[axis], scales[axis], antialias)
        if eight_bit and rounded:
            values = (values + 0.5).floor_().clamp_(0.0, 255.0)
    if eight_bit:
        return values.to(torch.uint8) if rounded else values
    return values.to(image.dtype)


def _pass(values: Tensor, axis: int, length: int, scale: float, antialias: bool) -> Tensor:
    """One pass along `axis` (-2 or -1) of float64 `values`."""
    source = int(values.shape[axis])
    if length == source and scale == 1.0:
        return values
    weights, places = _contributions(source, length, scale, antialias)
    shape = [1] * values.ndim
    shape[axis] = length
    total: Tensor | None = None
    # A loop over the few taps: no (length, source) matrix, so large images stay cheap.
    for tap in range(weights.shape[1]):
        weight = torch.tensor(weights[:, tap], dtype=values.dtype, device=values.device)
        place = torch.tensor(places[:, tap], device=values.device)
        weight, taken = weight.view(shape), values.index_select(axis, place)
        total = taken * weight if total is None else total.addcmul_(taken, weight)
    assert total is not None
    return total


@lru_cache(maxsize=256)
def _contributions(
    source: int, length: int, scale: float, antialias: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Weights (length, taps) that sum to 1, and the input places they belong to.

    Arrays, not tensors: a tensor kept from under inference_mode could enter no graph later.
    """
    stretch = min(scale, 1.0) if antialias else 1.0
    support = 4.0 / stretch
    centre = np.arange(1, length + 1, dtype=np.float64) / scale + 0.5 * (1.0 - 1.0 / scale)
    first = np.floor(centre - support / 2.0)
    offsets = np.arange(math.ceil(support) + 2, dtype=np.float64)
    places = first[:, None] + offsets[None, :]
    weights = stretch * _cubic(stretch * (centre[:, None] - places))
    weights /= weights.sum(axis=1, keepdims=True)
    # Symmetric border: 1..n, n..1, repeated; the edge pixel itself is repeated.
    mirror = np.concatenate([np.arange(source), np.arange(source)[::-1]])
    wrapped = mirror[np.mod(places.astype(np.int64) - 1, 2 * source)]
    used = np.abs(weights).max(axis=0) > 0
    return weights[:, used], wrapped[:, used]


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5."""
    size = np.abs(x)
    near = 1.5 * size**3 - 2.5 * size**2 + 1.0
    far = -0.5 * size**3 + 2.5 * size**2 - 4.0 * size + 2.0
    return np.asarray(np.where(size <= 1.0, near, np.where(size <= 2.0, far, 0.0)))
