"""Strong photometric views of images for self-training: geometry stays, so boxes transfer.

Colour jitter, greyscale, blur and random erasing, as detectors are adapted with (unbiased
teacher and its successors; the values below are LPLD's released ones). Every draw comes from
the generator that is handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

# (chance, smallest and largest share of the area, smallest and largest ratio)
Erasing = tuple[float, tuple[float, float], tuple[float, float]]
ERASINGS: tuple[Erasing, ...] = (
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6.0)),
    (0.3, (0.02, 0.2), (0.05, 8.0)),
)
_GREY = (0.299, 0.587, 0.114)
_TRIES = 10


@dataclass(frozen=True)
class StrongView:
    """The settings of a strong view; call it with an image and a generator.

    Attributes:
        jitter: largest change of brightness, contrast, saturation (factors in 1 +- this) and hue
            (shares of the circle).
        jitter_chance: of the four, which then come in random order.
        grey_chance: of losing all colour.
        blur_chance: of a Gaussian blur, with `blur` its least and largest deviation in pixels.
        blur: see there.
        erasings: rectangles filled with uniform noise.
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_chance: float = 0.8
    grey_chance: float = 0.2
    blur_chance: float = 0.5
    blur: tuple[float, float] = (0.1, 2.0)
    erasings: tuple[Erasing, ...] = field(default=ERASINGS)

    def __call__(self, image: Tensor, rng: Generator) -> Tensor:
        """A view of (3, H, W) in [0, 1], of the same size; the image itself is not changed."""
        made = image
        if _chance(rng) < self.jitter_chance:
            made = self._jittered(made, rng)
        if _chance(rng) < self.grey_chance:
            made = grey(made).expand_as(made)
        if _chance(rng) < self.blur_chance:
            made = blurred(made, _between(rng, *self.blur))
        made = made.clone()
        for chance, scale, ratio in self.erasings:
            if _chance(rng) < chance:
                erase(made, scale, ratio, rng)
        return made

    def _jittered(self, image: Tensor, rng: Generator) -> Tensor:
        brightness, contrast, saturation, hue = self.jitter
        for which in torch.randperm(4, generator=rng).tolist():
            if which == 3:
                image = hue_turned(image, _between(rng, -hue, hue))
                continue
            spread = (brightness, contrast, saturation)[which]
            factor = _between(rng, max(0.0, 1.0 - spread), 1.0 + spread)
            if which == 0:
                image = (image * factor).clamp(0.0, 1.0)
            elif which == 1:
                image = blended(image, grey(image).mean(), factor)
            else:
                image = blended(image, grey(image), factor)
        return image


def grey(image: Tensor) -> Tensor:
    """(3, H, W) to its luma (1, H, W)."""
    return (image * image.new_tensor(_GREY)[:, None, None]).sum(0, keepdim=True)


def blended(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """`factor` parts of the image and 1 - `factor` of another, kept in [0, 1]."""
    return (factor * image + (1.0 - factor) * other).clamp(0.0, 1.0)


def hue_turned(image: Tensor, turn: float) -> Tensor:
    """All hues turned by a share of the circle; value and saturation stay.

    Args:
        image: (3, H, W) in [0, 1].
        turn: in [-0.5, 0.5].
    """
    high, which = image.max(0)
    low = image.min(0).values
    span = high - low
    safe = torch.where(span > 0, span, torch.ones_like(span))
    r, g, b = ((high - channel) / safe for channel in image)
    hue = torch.where(which == 0, b - g, torch.where(which == 1, 2.0 + r - b, 4.0 + g - r))
    hue = torch.where(span > 0, hue / 6.0, torch.zeros_like(hue)) + turn
    # f(n) = v - c max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6: the inverse without cases.
    k = (image.new_tensor([5.0, 3.0, 1.0])[:, None, None] + 6.0 * hue) % 6.0
    return high - span * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)


def blurred(image: Tensor, deviation: float) -> Tensor:
    """A Gaussian blur of (C, H, W), borders reflected.

    Args:
        image: any channels.
        deviation: in pixels; 0 leaves it.
    """
    reach = min(math.ceil(3.0 * deviation), min(image.shape[-2:]) - 1)
    if reach < 1:
        return image
    steps = torch.arange(-reach, reach + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (steps / deviation) ** 2)
    kernel = kernel / kernel.sum()
    rows = F.pad(image[:, None], (reach, reach, reach, reach), mode="reflect")
    rows = F.conv2d(rows, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def erase(
    image: Tensor, scale: tuple[float, float], ratio: tuple[float, float], rng: Generator
) -> None:
    """Fill a random rectangle of (C, H, W) with uniform noise, in place.

    Args:
        image: changed.
        scale: least and largest share of its area.
        ratio: least and largest height / width; its logarithm is drawn evenly.
        rng: the chance. A rectangle that does not fit is drawn again, ten times at most.
    """
    channels, height, width = image.shape
    for _ in range(_TRIES):
        area = _between(rng, *scale) * height * width
        form = math.exp(_between(rng, math.log(ratio[0]), math.log(ratio[1])))
        high, wide = round(math.sqrt(area * form)), round(math.sqrt(area / form))
        if 0 < high < height and 0 < wide < width:
            top = int(torch.randint(0, height - high + 1, (), generator=rng))
            left = int(torch.randint(0, width - wide + 1, (), generator=rng))
            noise = torch.rand(channels, high, wide, generator=rng)
            image[:, top : top + high, left : left + wide] = noise.to(image)
            return


def _chance(rng: Generator) -> float:
    return float(torch.rand((), generator=rng))


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * _chance(rng)
