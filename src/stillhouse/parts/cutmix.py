"""CutMix: a box of each image is replaced by that of another, and the labels share the loss.

Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features, ICCV 2019. Everything is a pure function of a generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stillhouse.errors import RecipeError


@dataclass(frozen=True)
class Box:
    """Rows [top, bottom) and columns [left, right) of an image.

    Attributes:
        share: of the image that stays its own, 1 minus the box's area.
    """

    top: int
    left: int
    bottom: int
    right: int
    share: float


def box_of(height: int, width: int, lam: float, row: int, col: int) -> Box:
    """The box of a mixing ratio and a centre, clipped at the border.

    Its sides are `int(side * sqrt(1 - lam))`; half of one, rounded down, lies on each side of
    the centre. Since the border clips it, `share` is computed anew from the area.

    Args:
        height: of the image.
        width: of the image.
        lam: in [0, 1], the share that would stay without clipping.
        row: of the centre, in 0 ... height - 1.
        col: of the centre, in 0 ... width - 1.
    """
    cut = math.sqrt(1.0 - lam)
    down, across = int(height * cut) // 2, int(width * cut) // 2
    top, bottom = max(row - down, 0), min(row + down, height)
    left, right = max(col - across, 0), min(col + across, width)
    area = (bottom - top) * (right - left)
    return Box(top, left, bottom, right, 1.0 - area / (height * width))


@dataclass(frozen=True)
class Mix:
    """A drawn mixture of a batch: one box for all, and who gives to whom.

    Attributes:
        box: what is replaced.
        partner: (B,) positions in the batch.
    """

    box: Box
    partner: Tensor

    def images(self, own: Tensor, others: Tensor | None = None) -> Tensor:
        """(B, C, H, W) with the box taken from the partners.

        Args:
            own: (B, C, H, W).
            others: the global batch, when `own` is a part of it.
        """
        box = self.box
        source = own if others is None else others
        mixed = own.clone()
        rows, cols = slice(box.top, box.bottom), slice(box.left, box.right)
        mixed[:, :, rows, cols] = source[self.partner.to(own.device)][:, :, rows, cols]
        return mixed


@dataclass(frozen=True)
class CutMix:
    """Draws mixtures.

    Attributes:
        probability: that a batch is mixed at all.
        beta: both parameters of the ratio's Beta distribution; 1 is uniform.

    Raises:
        RecipeError: a probability outside [0, 1], or a beta that is not positive.
    """

    probability: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0 or self.beta <= 0:
            raise RecipeError(
                "CutMix needs a probability in [0, 1] and a positive beta, got "
                f"{self.probability} and {self.beta}"
            )

    def draw(self, rows: int, size: tuple[int, int], generator: Generator) -> Mix | None:
        """The mixture of a batch, or None when it stays as it is.

        Args:
            rows: of the (global) batch.
            size: (height, width) of the images.
            generator: CPU generator; it moves on.
        """
        if self.probability == 0 or rows == 0:
            return None
        if float(torch.rand((), generator=generator)) >= self.probability:
            return None
        height, width = size
        lam = _beta(self.beta, generator)
        row = int(torch.randint(0, height, (), generator=generator))
        col = int(torch.randint(0, width, (), generator=generator))
        partner = torch.randperm(rows, generator=generator)
        return Mix(box_of(height, width, lam, row, col), partner)


def _beta(beta: float, generator: Generator) -> float:
    """A draw of Beta(beta, beta), which torch's distributions cannot make from a generator."""
    if beta == 1.0:
        return float(torch.rand((), generator=generator))
    alpha = torch.tensor([beta, beta], dtype=torch.float64)
    pair = torch._standard_gamma(alpha, generator=generator)
    return float(pair[0] / pair.sum())
