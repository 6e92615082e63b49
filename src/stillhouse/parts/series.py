"""Time series of several channels: one length for all, by resampling or by padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError


def resampled(series: Tensor, length: int) -> Tensor:
    """Linear interpolation to `length` points with half-pixel centres.

    COMODO resamples every recording to the 512 points that Mantis reads (released code,
    `resize`).

    Args:
        series: (C, T) or (B, C, T).
        length: points of the result, >= 1.

    Returns:
        (C, length) or (B, C, length); the series itself when it has that length.

    Raises:
        DataError: another number of axes, or a length below 1.
    """
    if series.ndim not in (2, 3) or length < 1:
        raise DataError(
            f"series (C, T) or (B, C, T) and a length >= 1 are needed, got "
            f"{tuple(series.shape)} and {length}"
        )
    if series.shape[-1] == length:
        return series
    whole = series if series.ndim == 3 else series[None]
    made = F.interpolate(whole, size=length, mode="linear", align_corners=False)
    return made if series.ndim == 3 else made[0]


def left_padded(series: Sequence[Tensor], least: int = 1) -> tuple[Tensor, Tensor]:
    """Recordings of different length side by side, each at the right end of its row.

    COMODO's collation for MOMENT: zeros on the left up to max(512, longest of the batch).

    Args:
        series: each (C, T_i), with equal C.
        least: shortest length of the result.

    Returns:
        (padded (B, C, T), mask (B, T) int64, 1 on real samples).

    Raises:
        DataError: nothing to pad, or channels that differ.
    """
    if not series or any(s.ndim != 2 or len(s) != len(series[0]) for s in series):
        shapes = [tuple(s.shape) for s in series[:4]]
        raise DataError(f"recordings (channels, time) of equal channels are needed, got {shapes}")
    length = max(least, *(s.shape[1] for s in series))
    padded = series[0].new_zeros(len(series), len(series[0]), length)
    mask = torch.zeros(len(series), length, dtype=torch.int64, device=padded.device)
    for row, own in enumerate(series):
        padded[row, :, length - own.shape[1] :] = own
        mask[row, length - own.shape[1] :] = 1
    return padded, mask


def windows(series: Tensor, length: int, stride: int) -> Tensor:
    """Windows of a recording, one after another.

    Args:
        series: (..., T).
        length: of a window, at most T.
        stride: from one window's start to the next.

    Returns:
        (n, ..., length), n = (T - length) // stride + 1.

    Raises:
        DataError: the window is longer than the recording, or a number below 1.
    """
    if not 1 <= length <= series.shape[-1] or stride < 1:
        raise DataError(
            f"windows of {length} at a stride of {stride} do not fit {series.shape[-1]} samples"
        )
    return series.unfold(-1, length, stride).movedim(-2, 0).contiguous()
