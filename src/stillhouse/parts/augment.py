"""Differentiable siamese augmentation (DSA): single operations, and the whole call.

Also the layered form of the released NCFM (Wang et al., CVPR 2025), which takes the same
operations in another way: mode "layered".

Source: Zhao & Bilen, Dataset Condensation with Differentiable Siamese Augmentation, ICML
2021, with the constants of the released code. All operations take images (B, C, H, W) in any
floating space, are differentiable in them, and take their parameters explicitly. Nothing here
touches the global random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from stillhouse.errors import RecipeError, nearest

BRIGHTNESS = 1.0  # width of the range of what is added
SATURATION = 2.0  # largest factor on the distance from the channel mean
CONTRAST = 0.5  # smallest factor on the distance from the sample's mean
CROP = 0.125  # largest shift as a share of the side
CUTOUT = 0.5  # side of the hole as a share of the side
SCALE = 1.2  # largest zoom, also 1 / the smallest
ROTATE = 15.0  # largest angle in degrees

FULL = "color_crop_cutout_flip_scale_rotate"
# The layered form as released: in matching, in training on the set, in training the pool.
LAYERED_MATCHING = "color_crop_cutout"
LAYERED_TRAINING = "color_crop_flip_scale_rotate"
LAYERED_POOL = "color_crop"
# For digits and other data with chirality, where a mirror image is another class.
WITHOUT_FLIP = "color_crop_cutout_scale_rotate"


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """Adds `(u - 0.5)` to every pixel of a sample; `u` (B,) in [0, 1)."""
    return x + (_column(u, x) - 0.5) * BRIGHTNESS


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """Scales the distance from the mean over channels by `2u`; `u` (B,) in [0, 1).

    One-channel images stay as they are: they are their own mean.
    """
    mean = x.mean(dim=1, keepdim=True)
    return (x - mean) * (_column(u, x) * SATURATION) + mean


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """Scales the distance from the sample's mean by `u + 0.5`; `u` (B,) in [0, 1)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_column(u, x) + CONTRAST) + mean


def crop(x: Tensor, row_shift: Tensor, col_shift: Tensor) -> Tensor:
    """`out[i, j] = x[i + row_shift, j + col_shift]`, 0 outside the image.

    Args:
        x: (B, C, H, W).
        row_shift: (B,) int64, along dimension 2.
        col_shift: (B,) int64, along dimension 3.
    """
    size, _, height, width = x.shape
    # One row and column of zeros on each side; whatever lies outside reads from there.
    padded = F.pad(x, (1, 1, 1, 1))
    rows = _positions(row_shift, height, x).clamp(-1, height) + 1
    cols = _positions(col_shift, width, x).clamp(-1, width) + 1
    sample = torch.arange(size, device=x.device)[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], cols[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def translate(x: Tensor, col_shift: Tensor) -> Tensor:
    """`out[i, j] = x[i, j + col_shift]`, 0 outside the image; `col_shift` (B,) int64."""
    return crop(x, torch.zeros_like(col_shift), col_shift)


def cutout(x: Tensor, row_offset: Tensor, col_offset: Tensor) -> Tensor:
    """Zeroes a hole of half the side, clipped at the border.

    The zeroed rows are `offset - k // 2 ... offset - k // 2 + k - 1` with
    `k = int(height * 0.5 + 0.5)`; columns alike.

    Args:
        x: (B, C, H, W).
        row_offset: (B,) int64.
        col_offset: (B,) int64.
    """
    _, _, height, width = x.shape
    in_rows = _in_hole(row_offset, height, x)
    in_cols = _in_hole(col_offset, width, x)
    hole = in_rows[:, None, :, None] & in_cols[:, None, None, :]
    return x.masked_fill(hole, 0.0)


def flip(x: Tensor, flipped: Tensor) -> Tensor:
    """Mirrors left and right the samples whose flag `flipped` (B,) is set."""
    return torch.where(_column(flipped, x).bool(), x.flip(3), x)


def scale(x: Tensor, sx: Tensor, sy: Tensor, *, align_corners: bool = False) -> Tensor:
    """Resamples by the matrix diag(sx, sy); a value above 1 shrinks the content.

    Args:
        x: (B, C, H, W).
        sx: (B,) factor along the width.
        sy: (B,) factor along the height.
        align_corners: as in `torch.nn.functional.grid_sample`.
    """
    theta = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
    theta[:, 0, 0] = sx.to(theta)
    theta[:, 1, 1] = sy.to(theta)
    return _resample(x, theta, align_corners)


def rotate(x: Tensor, angle: Tensor, *, align_corners: bool = False) -> Tensor:
    """Resamples by the matrix [[cos, -sin], [sin, cos]].

    Args:
        x: (B, C, H, W).
        angle: (B,) in degrees.
        align_corners: as in `torch.nn.functional.grid_sample`.
    """
    # The angle stays float32 through cosine and sine at least, whatever the images are.
    turn = angle.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    turn = turn * (math.pi / 180.0)
    theta = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = turn.cos().to(x.dtype)
    theta[:, 0, 1] = -turn.sin().to(x.dtype)
    theta[:, 1, 0] = turn.sin().to(x.dtype)
    return _resample(x, theta, align_corners)


class _Draws:
    """The stream of draws behind one call.

    Siamese: every draw comes from a generator seeded anew with a seed that grows by one, and
    the first sample's value serves the whole batch, so batches of different size receive the
    identical transform. Otherwise the draws follow each other in one stream, per sample: made
    for the global batch, of which the own rows are kept.
    """

    def __init__(
        self,
        seed: int | Generator,
        siamese: bool,
        rows: slice | Tensor | None = None,
        of: int | None = None,
    ) -> None:
        self.siamese, self.rows, self.of = siamese, rows, of
        if isinstance(seed, Generator) and siamese:
            seed = int(torch.randint(0, 2**31 - 1, (), generator=seed))
        self.stream = seed if isinstance(seed, Generator) else Generator().manual_seed(seed)
        self.seed = seed if isinstance(seed, int) else 0

    def _next(self) -> Generator:
        if self.siamese:
            self.stream.manual_seed(self.seed)
            self.seed += 1
        return self.stream

    def family(self, count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=self._next()))

    def uniform(self, rows: int) -> Tensor:
        drawn = torch.rand(self._drawn_rows(rows), generator=self._next())
        return self._own(drawn, rows)

    def integers(self, low: int, high: int, rows: int) -> Tensor:
        """(rows,) int64 in [low, high], both ends included."""
        shape = (self._drawn_rows(rows),)
        return self._own(torch.randint(low, high + 1, shape, generator=self._next()), rows)

    def _drawn_rows(self, rows: int) -> int:
        return rows if self.siamese or self.of is None else self.of

    def _own(self, drawn: Tensor, rows: int) -> Tensor:
        if self.siamese:
            # An explicit copy: the released in-place assignment fails for a batch of one.
            return drawn[:1].expand(rows).clone()
        if self.rows is None:
            return drawn
        return drawn[self.rows if isinstance(self.rows, slice) else self.rows.cpu()]


def _draw_color(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    x = brightness(x, draws.uniform(len(x)))
    x = saturation(x, draws.uniform(len(x)))
    return contrast(x, draws.uniform(len(x)))


def _draw_crop(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    reach = [int(side * CROP + 0.5) for side in x.shape[2:]]
    row_shift = draws.integers(-reach[0], reach[0], len(x))
    return crop(x, row_shift, draws.integers(-reach[1], reach[1], len(x)))


def _draw_translate(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    reach = int(x.shape[3] * CROP + 0.5)
    return translate(x, draws.integers(-reach, reach, len(x)))


def _draw_cutout(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    # With an even hole the offset may be `side` itself, so that both borders are alike.
    last = [side - int(side * CUTOUT + 0.5) % 2 for side in x.shape[2:]]
    row_offset = draws.integers(0, last[0], len(x))
    return cutout(x, row_offset, draws.integers(0, last[1], len(x)))


def _draw_flip(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    return flip(x, draws.uniform(len(x)) < 0.5)


def _draw_scale(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    smallest = 1.0 / SCALE
    sx = draws.uniform(len(x)) * (SCALE - smallest) + smallest
    sy = draws.uniform(len(x)) * (SCALE - smallest) + smallest
    return scale(x, sx, sy, align_corners=align_corners)


def _draw_rotate(x: Tensor, draws: _Draws, align_corners: bool) -> Tensor:
    angle = (draws.uniform(len(x)) - 0.5) * (2.0 * ROTATE)
    return rotate(x, angle, align_corners=align_corners)


FAMILIES: Mapping[str, Callable[[Tensor, _Draws, bool], Tensor]] = {
    "color": _draw_color,
    "crop": _draw_crop,
    "cutout": _draw_cutout,
    "flip": _draw_flip,
    "scale": _draw_scale,
    "rotate": _draw_rotate,
    "translate": _draw_translate,
}
# In the layered form these are applied whenever they are named; one of the others is drawn.
_ALWAYS_FIRST = ("flip", "color")
_ALWAYS_LAST = ("cutout",)


@dataclass(frozen=True)
class DSA:
    """One call of differentiable siamese augmentation; a pure function of its seed.

    In mode "one" a single family of the strategy is drawn per call and applied to the whole
    batch; in mode "all" every family is applied in the strategy's order (the released modes
    'S' and 'M'). In mode "layered" flip and colour come first whenever they are named, then ONE
    drawn family of the others, then cutout; parameters are the batch's when siamese, else the
    sample's (released NCFM). The draws repeat the released stream of the other two modes: with
    seed s the family is drawn under s, the further draws under s+1, s+2, ... (siamese), or all
    in one stream (not siamese).

    Attributes:
        strategy: families joined by "_", or "none": color, crop, cutout, flip, scale, rotate,
            translate.
        siamese: one transform for the whole batch, equal for batches of any size under one
            seed; else parameters differ per sample (the family does not).
        align_corners: of the two resampling families. False in the released code of
            DC, DSA, DM and their kin; True in that of trajectory matching and its kin.
        mode: "one", "all" or "layered".

    Raises:
        RecipeError: unknown family or mode, or a family named twice.
    """

    strategy: str = FULL
    siamese: bool = False
    align_corners: bool = False
    mode: Literal["one", "all", "layered"] = "one"

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise RecipeError(f"augmentation has no family '{name}'{nearest(name, FAMILIES)}")
        if len(set(self.families)) < len(self.families):
            raise RecipeError(f"augmentation strategy '{self.strategy}' names a family twice")
        if self.mode not in ("one", "all", "layered"):
            raise RecipeError(
                f"augmentation mode must be 'one', 'all' or 'layered', got '{self.mode}'"
            )

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families, in order."""
        return () if self.strategy.lower() in ("", "none") else tuple(self.strategy.split("_"))

    def __call__(
        self,
        x: Tensor,
        seed: int | Generator,
        *,
        rows: slice | Tensor | None = None,
        of: int | None = None,
    ) -> Tensor:
        """Augments a batch.

        Args:
            x: (B, C, H, W) images.
            seed: an integer (its low 32 bits count) or a CPU generator, which moves on.
            rows: positions of the B images in a global batch of `of` rows. Parameters per
                sample are drawn for the global batch then, so that processes and
                micro-batches give what one process gives.
            of: rows of the global batch; B by default.

        Returns:
            (B, C, H, W), differentiable in `x`.
        """
        if not self.families or len(x) == 0:
            return x
        return self.apply(x, _Draws(seed, self.siamese, rows, of))

    def apply(self, x: Tensor, draws: _Draws) -> Tensor:
        """The call with a given stream of draws.

        The stream is asked in this order. "one": family, its parameters. "all": the
        parameters of each family. "layered": the flip's coin, brightness, saturation, contrast,
        which of the other families, its parameters, cutout's row and column.
        """
        if self.mode == "layered":
            return self._layered(x, draws)
        chosen = self.families
        if self.mode == "one":
            chosen = (chosen[draws.family(len(chosen))],)
        for name in chosen:
            x = FAMILIES[name](x, draws, self.align_corners)
        return x.contiguous()

    def _layered(self, x: Tensor, draws: _Draws) -> Tensor:
        for name in _ALWAYS_FIRST:
            if name in self.families:
                x = FAMILIES[name](x, draws, self.align_corners)
        rest = [n for n in self.families if n not in (*_ALWAYS_FIRST, *_ALWAYS_LAST)]
        if rest:
            x = FAMILIES[rest[draws.family(len(rest))]](x, draws, self.align_corners)
        for name in _ALWAYS_LAST:
            if name in self.families:
                x = FAMILIES[name](x, draws, self.align_corners)
        return x.contiguous()


def _column(value: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) on the images' device, in their dtype unless it is a flag."""
    dtype = x.dtype if value.is_floating_point() else value.dtype
    return value.to(device=x.device, dtype=dtype, non_blocking=True).reshape(-1, 1, 1, 1)


def _positions(shift: Tensor, side: int, x: Tensor) -> Tensor:
    """(B, side) source positions i + shift."""
    return torch.arange(side, device=x.device) + shift.to(x.device).reshape(-1, 1)


def _in_hole(offset: Tensor, side: int, x: Tensor) -> Tensor:
    """(B, side) flags of what lies in the hole."""
    hole = int(side * CUTOUT + 0.5)
    start = offset.to(x.device).reshape(-1, 1) - hole // 2
    position = torch.arange(side, device=x.device)
    return (position >= start) & (position < start + hole)


def _resample(x: Tensor, theta: Tensor, align_corners: bool) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=align_corners)
    return F.grid_sample(
        x, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners
    )
