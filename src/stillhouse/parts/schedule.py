"""Schedules: pure functions of the clock, for learning rates, weights, temperatures, decays.

Each returns a factor or value; a schedule of the learning rate is a factor of the base rate.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from stillhouse.clock import Clock

Schedule = Callable[[Clock], float]


def constant(value: float = 1.0) -> Schedule:
    """Always `value`."""
    return lambda clock: value


def linear(start: float = 1.0, end: float = 0.0) -> Schedule:
    """From `start` at the first step straight to `end` at the last."""
    return lambda clock: start + (end - start) * clock.step / max(1, clock.total - 1)


def cosine(start: float = 1.0, end: float = 0.0) -> Schedule:
    """Half a cosine from `start` at step 0 towards `end` after the last step."""

    def value(clock: Clock) -> float:
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * clock.progress))

    return value


def steps(milestones: Sequence[float], gamma: float = 0.1, unit: str = "epoch") -> Schedule:
    """Multiplied by `gamma` at each milestone.

    Args:
        milestones: epochs or steps from which on the factor applies; or shares of the stage
            in (0, 1) when `unit` is "progress".
        gamma: the factor.
        unit: "epoch", "step" or "progress".
    """
    ordered = sorted(milestones)
    return lambda clock: gamma ** bisect.bisect_right(ordered, getattr(clock, unit))


def halved_every(epochs: int, gamma: float = 0.5, first: int = 1) -> Schedule:
    """`gamma ** (e // epochs)` where e counts epochs from `first`."""
    return lambda clock: gamma ** float((clock.epoch + first) // epochs)


def switch_off(epoch: int, value: float = 1.0) -> Schedule:
    """`value` before an epoch (from 0), 0 from it on."""
    return lambda clock: value if clock.epoch < epoch else 0.0


def window(start: int, end: int, until: int) -> Schedule:
    """A whole number that grows from `start` at step 0 to `end` at step `until`, and stays.

    `min(start + int((end - start) * step / until), end)`: the upper bound of the epochs that
    difficulty-aligned trajectory matching begins at (DATM, released code).

    Args:
        start: at step 0.
        end: from step `until` on.
        until: > 0.
    """
    return lambda clock: min(start + int((end - start) * clock.step / until), end)


def warmed_up(schedule: Schedule, steps: int) -> Schedule:
    """A schedule that rises linearly from 0 over its first `steps` steps."""
    if steps <= 0:
        return schedule
    return lambda clock: schedule(clock) * min(1.0, (clock.step + 1) / steps)
