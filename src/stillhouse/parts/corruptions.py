"""Weather, optics and night laid over clean images: what moves a domain away from another.

Geometry stays, so boxes and masks are those of the clean image. Every draw comes from the
generator that is handed in.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError, nearest
from stillhouse.parts.strong_views import blurred, grey

CORRUPTIONS = ("none", "fog", "blur", "night", "mixed")


def corrupted(image: Tensor, kind: str, rng: Generator, *, strength: float = 1.0) -> Tensor:
    """An image under other conditions.

    Args:
        image: (3, H, W) in [0, 1].
        kind: "none", "fog", "blur", "night", or "mixed": one of the three, drawn.
        rng: the chance.
        strength: 1 is as told at each kind; smaller is weaker, 0 leaves the image.

    Returns:
        (3, H, W) in [0, 1].

    Raises:
        DataError: an unknown kind.
    """
    if kind == "mixed":
        kind = ("fog", "blur", "night")[int(torch.randint(0, 3, (), generator=rng))]
    if kind == "none" or strength <= 0:
        return image
    if kind == "fog":
        return fog(image, rng, strength)
    if kind == "blur":
        return out_of_focus(image, rng, strength)
    if kind == "night":
        return night(image, rng, strength)
    raise DataError(f"no corruption is called '{kind}'{nearest(kind, CORRUPTIONS)}")


def fog(image: Tensor, rng: Generator, strength: float = 1.0) -> Tensor:
    """Scattered light: I t + (1 - t) A with transmission t in [0.4, 0.7], thicker in clouds.

    The airlight A is a light grey; t varies smoothly over the image by up to a fifth.
    """
    clouds = torch.rand(1, 1, 4, 4, generator=rng).to(image)
    clouds = F.interpolate(clouds, size=image.shape[-2:], mode="bicubic").clamp(0.0, 1.0)[0]
    through = 0.4 + 0.3 * float(torch.rand((), generator=rng))
    passed = 1.0 - strength * (1.0 - through) * (0.8 + 0.4 * clouds)
    air = 0.75 + 0.2 * float(torch.rand((), generator=rng))
    return (image * passed + (1.0 - passed) * air).clamp(0.0, 1.0)


def out_of_focus(image: Tensor, rng: Generator, strength: float = 1.0) -> Tensor:
    """A blur of 1 to 2 px deviation, and contrast cut to 0.5 to 0.8 around the mean."""
    deviation = (1.0 + float(torch.rand((), generator=rng))) * strength
    contrast = 1.0 - strength * (0.2 + 0.3 * float(torch.rand((), generator=rng)))
    soft = blurred(image, deviation)
    return ((soft - soft.mean()) * contrast + soft.mean()).clamp(0.0, 1.0)


def night(image: Tensor, rng: Generator, strength: float = 1.0) -> Tensor:
    """Little light: darkened to 0.15 to 0.35, colours lost by half, bluish, with sensor noise."""
    light = 1.0 - strength * (0.65 + 0.2 * float(torch.rand((), generator=rng)))
    pale = image + 0.5 * strength * (grey(image) - image)
    tint = 1.0 - strength * image.new_tensor([0.25, 0.15, 0.0])[:, None, None]
    noise = torch.randn(image.shape, generator=rng).to(image) * 0.03 * strength
    return (pale * tint * light + noise).clamp(0.0, 1.0)
