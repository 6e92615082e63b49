"""A small U-Net that predicts the noise in an image, given time and class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.parts.noise import NoiseSchedule


def time_embedding(times: Tensor, width: int) -> Tensor:
    """Sines and cosines of (real-valued) times: [sin, cos], frequencies exp(-ln(1e4) i/(h-1)).

    Args:
        times: (B,), as numbers, not normalised.
        width: of the result; an odd one ends in a column of zeros.

    Returns:
        (B, width).
    """
    half = width // 2
    order = torch.arange(half, device=times.device, dtype=torch.float32)
    rates = torch.exp(order * (-math.log(10000.0) / max(1, half - 1)))
    angles = times.float()[:, None] * rates[None, :]
    found = torch.cat([angles.sin(), angles.cos()], 1)
    return F.pad(found, (0, width - 2 * half))


class _Block(nn.Module):
    """Norm, SiLU, 3x3 twice, with time and class added between, around a shortcut."""

    def __init__(self, inner: int, outer: int, embedded: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(inner), inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.shift = nn.Linear(embedded, outer)
        self.norm2 = nn.GroupNorm(_groups(outer), outer)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(embedded)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        out: Tensor = self.shortcut(x) + h
        return out


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


class MiniUNet(nn.Module):
    """Noise in images of a class: a residual block per level down, one between, one per level up.

    With the default width, two levels and ten classes it has about 70 k parameters.

    Args:
        classes: number K of classes; row K of the embedding stands for no class.
        channels: image channels.
        size: height and width, or one number; divisible by 2 for every level but the first.
        width: channels of the first level.
        multipliers: of the width at each level.
        dropout: within the blocks while training.
        label_dropout: share of rows that are shown without their class in training, so that
            guidance is possible.
        timesteps: T, number of times.
        first_beta: of the linear noise schedule.
        last_beta: of the linear noise schedule.

    Attributes:
        null: the number that stands for no class.
        schedule: of the noise.
        shape: (C, H, W) of an image.

    Raises:
        ModelError: sides that cannot be halved so often, or a number that makes no network.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        size: int | Sequence[int] = 8,
        width: int = 16,
        multipliers: Sequence[int] = (1, 2),
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        timesteps: int = 1000,
        first_beta: float = 1e-4,
        last_beta: float = 0.02,
    ) -> None:
        super().__init__()
        height, across = (size, size) if isinstance(size, int) else size
        halvings = len(multipliers) - 1
        if not multipliers or min(classes, channels, width, *multipliers) < 1:
            raise ModelError(
                "a U-Net needs one level at least and numbers >= 1, got "
                f"classes={classes}, channels={channels}, width={width}, "
                f"multipliers={tuple(multipliers)}"
            )
        if height % 2**halvings or across % 2**halvings:
            raise ModelError(
                f"images of {height}x{across} cannot be halved {halvings} times: bring them to a "
                f"multiple of {2**halvings} (data.options image_size, or canvas where the data "
                "can be padded), or give fewer multipliers"
            )
        self.classes, self.null, self.label_dropout = classes, classes, label_dropout
        self.shape = (channels, height, across)
        self.schedule = NoiseSchedule.linear(timesteps, first_beta, last_beta)
        self.width = width
        embedded = 4 * width
        self.times = nn.Sequential(
            nn.Linear(width, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        self.labels = nn.Embedding(classes + 1, embedded)
        widths = [width * m for m in multipliers]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            _Block(before, after, embedded, dropout)
            for before, after in zip([width, *widths[:-1]], widths, strict=True)
        )
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        self.middle = _Block(widths[-1], widths[-1], embedded, dropout)
        self.up = nn.ModuleList(
            _Block(above + own, own, embedded, dropout)
            for above, own in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True)
        )
        self.norm = nn.GroupNorm(_groups(widths[0]), widths[0])
        self.last = nn.Conv2d(widths[0], channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The noise.

        Args:
            noisy: (B, C, H, W).
            time: (B,) in [0, T).
            condition: (B,) classes in [0, K], K for none.

        Returns:
            (B, C, H, W).
        """
        dtype = self.first.weight.dtype
        embedded = self.times(time_embedding(time, self.width).to(dtype)) + self.labels(condition)
        embedded = F.silu(embedded)
        h = self.first(noisy)
        kept = []
        for level, block in enumerate(self.down):
            h = block(h, embedded)
            kept.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = self.middle(h, embedded)
        for level, block in enumerate(self.up):
            if level:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = block(torch.cat([h, kept.pop()], 1), embedded)
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out
