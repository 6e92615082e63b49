"""Two classifiers answer as one: their probabilities are mixed after training.

With logits a and b of two heads, p = alpha softmax(a) + (1 - alpha) softmax(b / beta). Nothing is
trained: alpha and beta are searched on stored logits of validation data, which takes
milliseconds and may be done again on other data at any time (DHO, Kang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import wide

# The grid of erjui/DHO, train_others.py:evaluate; beta is the outer loop.
ALPHAS = tuple(step / 20 for step in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class Mix:
    """How two heads are mixed, and what that is worth where it was searched.

    Attributes:
        alpha: share of the first head's probabilities, in [0, 1].
        beta: temperature of the second head; below 1 it sharpens.
        accuracy: share of rows that are right, in [0, 1].
        counts: (betas, alphas) int64, right rows at every point of the grid.
    """

    alpha: float
    beta: float
    accuracy: float
    counts: Tensor


def mix_probabilities(
    first: Tensor, second: Tensor, *, alpha: float | Tensor, beta: float | Tensor
) -> Tensor:
    """Mixed probabilities: alpha softmax(first) + (1 - alpha) softmax(second / beta).

    Args:
        first: (..., classes) logits.
        second: (..., classes) logits, same shape.
        alpha: share of the first, in [0, 1].
        beta: temperature of the second alone, > 0.

    Returns:
        (..., classes) probabilities, at least in float32.

    Raises:
        ModelError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ModelError(
            f"two heads are mixed over the same classes: logits are {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    one, other = wide(first).softmax(-1), (wide(second) / beta).softmax(-1)
    return alpha * one + (1 - alpha) * other


def search_mix(
    first: Tensor,
    second: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Mix:
    """The alpha and beta of a grid with the highest accuracy on stored logits.

    The first in order wins a tie, beta being the outer loop. Where no point gets a row right,
    what comes back is accuracy 0, alpha 0, beta 1.

    Args:
        first: (N, classes) logits.
        second: (N, classes) logits.
        target: (N,) int64.
        alphas: of the grid.
        betas: of the grid.

    Raises:
        ModelError: the shapes do not fit.
        RecipeError: an empty grid, or a number out of range.
    """
    counts = right_rows(first, second, target, alphas=alphas, betas=betas)
    flat = counts.reshape(-1)
    right = int(flat.max())
    if right == 0:
        return Mix(0.0, 1.0, 0.0, counts)
    # Not argmax, which need not give the first of equals.
    row, column = divmod(int((flat == right).nonzero()[0, 0]), len(alphas))
    return Mix(float(alphas[column]), float(betas[row]), right / len(target), counts)


def right_rows(
    first: Tensor,
    second: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] = ALPHAS,
    betas: Sequence[float] = BETAS,
) -> Tensor:
    """How many rows each point of the grid gets right; see `search_mix`.

    Returns:
        (betas, alphas) int64.
    """
    if not alphas or not betas:
        raise RecipeError("the search for alpha and beta needs one point of each at least")
    if min(alphas) < 0 or max(alphas) > 1 or min(betas) <= 0:
        raise RecipeError(f"alpha lies in [0, 1] and beta above 0, not {alphas} and {betas}")
    if first.shape != second.shape or target.shape != first.shape[:1] or first.ndim != 2:
        raise ModelError(
            f"logits of shape {tuple(first.shape)} and {tuple(second.shape)} and targets of shape "
            f"{tuple(target.shape)} do not fit: (N, classes), (N, classes) and (N,) are needed"
        )
    counts = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
    one = wide(first).softmax(-1)
    for row, beta in enumerate(betas):
        other = (wide(second) / beta).softmax(-1)
        for column, alpha in enumerate(alphas):
            # Mixed as `mix_probabilities` does, in the same order of operations.
            answer = (alpha * one + (1 - alpha) * other).argmax(-1)
            counts[row, column] = (answer == target).sum()
    return counts
