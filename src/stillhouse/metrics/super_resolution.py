"""Y-PSNR and SSIM as tables of super-resolution report them, and PSNR on RGB.

The convention: clamp to [0, 1], round RGB to 8 bits, cut `scale` pixels off each border, take
the luma Y of BT.601, PSNR with peak 255. Published tables (Matlab) keep Y in floating point;
the released Python script of IMDN rounds it to 8 bits as well, which costs .02-.09 dB. Float
is the default, `quantize_y=True` the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillhouse.errors import DataError

_LUMA = (65.481, 128.553, 24.966)


def to_grey_levels(image: Tensor) -> Tensor:
    """Grey levels 0-255 (float64) of an image: [0, 1] is clamped and rounded to 8 bits.

    Args:
        image: floating point in [0, 1] (anything beyond is clamped), or uint8 as it is.
    """
    if image.dtype == torch.uint8:
        return image.double()
    # Scaled in float32 as released evaluation scripts do, not in float64.
    image = image.float() if image.dtype in {torch.float16, torch.bfloat16} else image
    return (image.clamp(0.0, 1.0) * 255.0).round().double()


def luma(levels: Tensor, *, quantize: bool = False) -> Tensor:
    """Y of BT.601 in [16, 235] from RGB grey levels.

    Args:
        levels: (..., 3, H, W), 0-255.
        quantize: round Y to whole grey levels.

    Returns:
        (..., 1, H, W) float64.
    """
    if levels.ndim < 3 or levels.shape[-3] != 3:
        raise DataError(f"luma needs RGB images (..., 3, H, W), got {tuple(levels.shape)}")
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=levels.device).view(3, 1, 1)
    y = 16.0 + (levels.double() * weights).sum(dim=-3, keepdim=True) / 255.0
    return y.clamp(0.0, 255.0).round() if quantize else y


def shave(image: Tensor, border: int) -> Tensor:
    """The image without `border` pixels at each side.

    Raises:
        DataError: nothing would be left.
    """
    if border <= 0:
        return image
    if min(image.shape[-2:]) <= 2 * border:
        raise DataError(
            f"an image of {image.shape[-2]}x{image.shape[-1]} has nothing left after {border} px "
            "are cut off each side"
        )
    return image[..., border:-border, border:-border]


def modcrop(image: Tensor, modulus: int) -> Tensor:
    """The image cut at its far sides to a multiple of `modulus`.

    Raises:
        DataError: a side is shorter than `modulus`.
    """
    height, width = image.shape[-2:]
    if min(height, width) < modulus:
        raise DataError(f"an image of {height}x{width} is smaller than {modulus} px")
    return image[..., : height - height % modulus, : width - width % modulus]


def psnr(first: Tensor, second: Tensor, *, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB over all values; infinite for equal images.

    Raises:
        DataError: different shapes.
    """
    _same_shape(first, second)
    error = float((first.double() - second.double()).square().mean())
    return math.inf if error == 0.0 else 10.0 * math.log10(peak * peak / error)


def ssim(
    first: Tensor,
    second: Tensor,
    *,
    peak: float = 255.0,
    window: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window, population covariance.

    Averaged over the places where the whole window lies within the image, and over channels.

    Args:
        first: (C, H, W).
        second: the same shape.
        peak: range of the values.
        window: side of the Gaussian window in pixels.
        sigma: its standard deviation.
        k1: constant of the luminance term.
        k2: constant of the contrast term.

    Raises:
        DataError: different shapes, or an image smaller than the window.
    """
    _same_shape(first, second)
    if first.ndim != 3 or min(first.shape[-2:]) < window:
        raise DataError(
            f"SSIM needs (C, H, W) of at least {window} px a side, got {tuple(first.shape)}"
        )
    x, y = first.double(), second.double()
    reach = torch.arange(window, dtype=torch.float64, device=x.device) - (window - 1) / 2
    kernel = torch.exp(-0.5 * (reach / sigma) ** 2)
    kernel = kernel / kernel.sum()
    moments = torch.cat([x, y, x * x, y * y, x * y]).unsqueeze(1)
    moments = functional.conv2d(moments, kernel.view(1, 1, -1, 1))
    moments = functional.conv2d(moments, kernel.view(1, 1, 1, -1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments.squeeze(1).chunk(5)
    c1, c2 = (k1 * peak) ** 2, (k2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variance = (mean_xx - mean_x**2) + (mean_yy - mean_y**2)
    structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (variance + c2)
    return float((luminance * structure).mean())


def compare(
    sr: Tensor,
    hr: Tensor,
    scale: int,
    *,
    border: int | None = None,
    quantize_y: bool = False,
    with_ssim: bool = True,
) -> dict[str, float]:
    """All figures of one super-resolved image against the true one.

    Args:
        sr: (3, H, W) floating point in [0, 1] (clamped and rounded here) or uint8.
        hr: (3, H', W') alike; what exceeds a multiple of `scale` is cut off first.
        scale: the factor of enlargement.
        border: pixels cut off each border; `scale` when not given.
        quantize_y: round Y to 8 bits, as the released script does.
        with_ssim: also SSIM, which needs 11 px a side after the border is cut.

    Returns:
        `psnr_y` and `psnr_rgb` in dB, and `ssim_y`.

    Raises:
        DataError: the sizes do not fit each other, or the image is too small.
    """
    if hr.shape != sr.shape:
        hr = modcrop(hr, scale)
    if hr.shape != sr.shape:
        raise DataError(
            f"a super-resolved image of {tuple(sr.shape)} cannot be compared with "
            f"{tuple(hr.shape)} (after cutting it to a multiple of {scale})"
        )
    border = scale if border is None else border
    made = shave(to_grey_levels(sr), border)
    true = shave(to_grey_levels(hr.to(sr.device)), border)
    y_made, y_true = luma(made, quantize=quantize_y), luma(true, quantize=quantize_y)
    figures = {"psnr_y": psnr(y_made, y_true)}
    if with_ssim:
        figures["ssim_y"] = ssim(y_made, y_true)
    figures["psnr_rgb"] = psnr(made, true)
    return figures


class Fidelity:
    """Figures of restored images over a split, the mean over images.

    Reads `out["image"]` and `batch["target"]`: (B, 3, H, W) tensors in [0, 1], or lists of
    (3, H, W) where sizes differ.

    Args:
        scale: the factor of enlargement.
        border: pixels cut off each border; `scale` when not given.
        more: also SSIM and PSNR on 8-bit Y, which take longer.

    Attributes:
        higher_is_better: always.
    """

    higher_is_better = True

    def __init__(self, scale: int, *, border: int | None = None, more: bool = True) -> None:
        self.scale = scale
        self.border = scale if border is None else border
        self.more = more
        names = ("psnr_y", "ssim_y", "psnr_rgb", "psnr_y_8bit") if more else ("psnr_y", "psnr_rgb")
        self._names = names
        self._sums = torch.zeros(len(names) + 1, dtype=torch.float64)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take the images of one batch in."""
        for made, true in zip(out["image"], batch["target"], strict=True):
            self.add(made, true)

    def add(self, made: Tensor, true: Tensor) -> dict[str, float]:
        """Take one image in; its own figures."""
        figures = compare(made, true, self.scale, border=self.border, with_ssim=self.more)
        if self.more:
            coarse = compare(
                made, true, self.scale, border=self.border, quantize_y=True, with_ssim=False
            )
            figures["psnr_y_8bit"] = coarse["psnr_y"]
        row = [*(figures[name] for name in self._names), 1.0]
        self._sums += torch.tensor(row, dtype=torch.float64)
        return figures

    def totals(self) -> Tensor:
        """The sums kept so far."""
        return self._sums

    def take(self, totals: Tensor) -> None:
        """Replace the sums by those of all processes."""
        self._sums = totals.to(self._sums)

    def compute(self) -> dict[str, float]:
        """The means: PSNR in dB, SSIM in [-1, 1].

        Raises:
            DataError: no image was seen.
        """
        count = float(self._sums[-1])
        if count == 0:
            raise DataError("no image was judged: the split is empty")
        means = (self._sums[:-1] / count).tolist()
        return dict(zip(self._names, means, strict=True))


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise DataError(
            f"images of different shape cannot be compared: {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
