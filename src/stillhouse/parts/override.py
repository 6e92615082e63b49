"""Which class takes the place of one that should be forgotten."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from stillhouse.errors import ModelError


def random_override(count: int, classes: int, forget: int, rng: Generator) -> Tensor:
    """Uniformly drawn classes other than one.

    Released code draws from 0 to 8 and maps the forgotten class to 9, for ten classes only; here
    every other class is equally likely for any number of classes and any forgotten one.

    Args:
        count: how many.
        classes: K >= 2.
        forget: never drawn.
        rng: of the draw.

    Returns:
        (count,) int64.

    Raises:
        ModelError: no other class is left.
    """
    if classes < 2 or not 0 <= forget < classes:
        raise ModelError(f"no class but {forget} is left of {classes}")
    drawn = torch.randint(0, classes - 1, (count,), generator=rng)
    return drawn + (drawn >= forget).long()


def chosen_override(scores: Tensor, forget: int, uniform: Tensor | None = None) -> Tensor:
    """The class that a classifier would rather see, the forgotten one left out.

    Args:
        scores: (n, K) logits.
        forget: never chosen.
        uniform: (n,) numbers in [0, 1): one is drawn by the probabilities among the others;
            None: the highest.

    Returns:
        (n,) int64.
    """
    left = scores.detach().float().clone()
    left[:, forget] = -torch.inf
    if uniform is None:
        return left.argmax(1)
    reached = left.softmax(1).cumsum(1)
    # The last class may be a hair below 1, and a class without probability must not be drawn.
    target = uniform.to(reached)[:, None] * reached[:, -1:]
    return (reached <= target).sum(1).clamp(max=scores.shape[1] - 1)
