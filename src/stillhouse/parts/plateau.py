"""A learning rate that falls when a figure no longer does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.objective import Part


class Plateau(Part):
    """A factor that is cut when a figure has not fallen for a while; state, not time.

    The rule of torch's ReduceLROnPlateau (mode "min", relative threshold): a figure below
    `best * (1 - threshold)` is progress; after more than `patience` figures without progress
    the factor is multiplied by `factor`. It is a schedule: hand it to `job.fit(schedule=...)`.
    Its state is buffers, so it is saved with the objective that holds it.

    Args:
        factor: in (0, 1).
        patience: figures without progress that are borne.
        threshold: least relative progress.

    Raises:
        RecipeError: a factor outside (0, 1), or a negative patience.
    """

    scale: Tensor
    best: Tensor
    waited: Tensor

    def __init__(self, factor: float = 0.5, patience: int = 10, threshold: float = 1e-4) -> None:
        super().__init__()
        if not 0.0 < factor < 1.0 or patience < 0:
            raise RecipeError(
                f"a plateau needs a factor in (0, 1) and a patience >= 0, got {factor}, {patience}"
            )
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("best", torch.full((), math.inf, dtype=torch.float64))
        self.register_buffer("waited", torch.zeros((), dtype=torch.int64))

    def __call__(self, clock: Clock) -> float:
        """The present factor of the learning rate."""
        return float(self.scale)

    @torch.no_grad()
    def see(self, figure: float) -> None:
        """Take in the next figure; call it once an accepted step, or once an iteration."""
        best = float(self.best)
        if figure < (best * (1.0 - self.threshold) if math.isfinite(best) else best):
            self.best.fill_(figure)
            self.waited.zero_()
            return
        self.waited += 1
        if int(self.waited) > self.patience:
            self.scale *= self.factor
            self.waited.zero_()
