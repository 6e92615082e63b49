"""When a student reads its own text: a threshold that rises with the validation loss.

A student is first taught on given text, which is cheap. Once its validation loss stops falling,
more and more steps are taken on text it has written itself, either fresh or drawn from a buffer
of earlier samples; the share of fresh ones falls over the training.

Source: DistiLLM (Ko et al., ICML 2024), `finetune.py` at d47e77f.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import RecipeError
from stillhouse.objective import Part

Branch = Literal["sample", "replay", "truth"]


class AdaptiveThreshold(Part):
    """The share of steps that are taken on a student's own text.

    Both numbers are buffers, so that a resumed run goes on with them.

    Args:
        start: at first, in [0, 1]; at 0 no own text is read until the validation loss rises.
        margin: by how much the validation loss must exceed the last one to raise it.
        step: by how much it rises.

    Attributes:
        phi: the threshold, 0-dim float64.
        previous: the validation loss it last rose at, or else the first one; infinite before.

    Raises:
        RecipeError: a start outside of [0, 1].
    """

    phi: Tensor
    previous: Tensor

    def __init__(self, start: float = 0.0, *, margin: float = 0.1, step: float = 0.1) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise RecipeError(f"the threshold begins in [0, 1], not at {start}")
        self.margin, self.step = margin, step
        self.register_buffer("phi", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("previous", torch.tensor(math.inf, dtype=torch.float64))

    def observe(self, loss: float) -> float:
        """Take a validation loss in: the first is that before training.

        The loss it is compared with changes only when the threshold rises.

        Returns:
            The threshold from now on.
        """
        if math.isinf(float(self.previous)):
            self.previous.fill_(loss)
        elif loss >= float(self.previous) + self.margin:
            self.phi.fill_(min(float(self.phi) + self.step, 1.0))
            self.previous.fill_(loss)
        return float(self.phi)


def fresh_share(phi: float, step: int, total: int) -> float:
    """rho: the share of steps that must write anew; it falls to 0 over the training."""
    return phi * (1.0 - step / max(1, total))


def choose_branch(chance: float, phi: float, step: int, total: int, *, full: bool) -> Branch:
    """What a step reads.

    Args:
        chance: uniform in [0, 1).
        phi: the threshold.
        step: of the training, from 0.
        total: its steps.
        full: the buffer of earlier samples is full.

    Returns:
        "sample": the student writes, and the buffer keeps it; "replay": earlier samples;
        "truth": the given responses.
    """
    if chance < fresh_share(phi, step, total) or (chance < phi and not full):
        return "sample"
    return "replay" if chance < phi else "truth"
