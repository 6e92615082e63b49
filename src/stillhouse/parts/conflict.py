"""Do two losses pull the same way? The cosine of the angle between their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.objective import Part
from stillhouse.parts.gradient import cosine


class ConflictProbe(Part):
    """Measures the cosine between the gradients of two losses in chosen parameters, now and then.

    The losses' graph is kept and nothing of the training changes.

    Args:
        every: steps between measurements; 0 never.

    Attributes:
        sums: (2,) sum of the cosines over the training, and their number.

    Raises:
        RecipeError: a negative number of steps.
    """

    sums: Tensor

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 0:
            raise RecipeError(f"the steps between measurements are at least 0, not {every}")
        self.every = every
        self.register_buffer("sums", torch.zeros(2))

    def due(self, clock: Clock) -> bool:
        """Whether this step is measured."""
        return self.every > 0 and clock.step % self.every == 0 and torch.is_grad_enabled()

    def measure(self, one: Tensor, other: Tensor, params: Sequence[Tensor]) -> Tensor | None:
        """The cosine between the gradients of two losses.

        Args:
            one: scalar with a graph.
            other: scalar with a graph.
            params: where the gradients are compared: the backbone.

        Returns:
            A scalar in [-1, 1]; None when no parameter is reached by both.
        """
        pair = [
            torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            for loss in (one, other)
        ]
        found = cosine(*pair)
        if found is not None:
            added = torch.stack([found.to(self.sums), torch.ones_like(self.sums[0])])
            self.propose(sums=self.sums + added)
        return found

    def mean(self) -> float | None:
        """The mean cosine over the training; None when nothing was measured."""
        total, count = self.sums.tolist()
        return total / count if count else None
