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


def cycles(count: int, floor: float) -> Schedule:
    """Straight lines from 1 to `floor`, `count` of them one after another, with hard restarts.

    The first step of a cycle has 1, its last exactly the floor; a cycle of one step has 1. The
    stage's steps are shared out evenly (LEAF: three cycles from 1e-4 to 1e-5).

    Args:
        count: number of cycles, at least 1.
        floor: factor at the end of each.
    """

    def value(clock: Clock) -> float:
        number = clock.step * count // max(1, clock.total)
        first = -(-number * clock.total // count)  # rounded up, as the division above rounds down
        length = -(-(number + 1) * clock.total // count) - first
        done = (clock.step - first) / max(1, length - 1)
        return floor * done + (1.0 - done)

    return value


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


def _warm_steps(warm: float, clock: Clock) -> float:
    """Steps of a warm-up that is given as steps (1 and more) or as a share of the stage."""
    return warm if warm >= 1 else warm * clock.total


def warmup_linear(warm: float = 0.1, total: int | None = None) -> Schedule:
    """From 0 straight up to 1, then straight down to 0 after the last step.

    The step number 0 has rate 0, and the end of the warm-up need not be a whole step, as in
    the scheduler of transformers that erjui/DHO, train_others.py, uses.

    Args:
        warm: steps of the warm-up (1 and more), or their share of the stage (below 1).
        total: steps after which 0 is reached; those of the stage when not given.
    """

    def value(clock: Clock) -> float:
        rise = _warm_steps(warm, clock)
        if clock.step < rise:
            return clock.step / rise
        end = clock.total if total is None else total
        return max(0.0, (end - clock.step) / max(1.0, end - rise))

    return value


def warmup_cosine(warm: float = 0.1, start: float = 0.01) -> Schedule:
    """From `start` straight up to 1, then half a cosine over the steps that remain.

    Args:
        warm: see `warmup_linear`.
        start: factor of the first step.
    """

    def value(clock: Clock) -> float:
        rise = _warm_steps(warm, clock)
        if clock.step < rise:
            return start + (1.0 - start) * clock.step / rise
        done = (clock.step - rise) / max(1.0, clock.total - rise)
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return value


def chained_warmup_cosine(warm: float = 0.1, start: float = 0.01) -> Schedule:
    """The rise and the cosine of `warmup_cosine` at the same time, multiplied.

    As released in erjui/DHO, train_imgnet_semi.py: both act from step 0 and the cosine's period
    is what remains after the warm-up, so the peak stays below 1 and the rate rises again in the
    last steps, as many as the warm-up has.

    Args:
        warm: see `warmup_linear`.
        start: factor of the first step.
    """

    def value(clock: Clock) -> float:
        rise = _warm_steps(warm, clock)
        up = start + (1.0 - start) * min(1.0, clock.step / rise) if rise > 0 else 1.0
        period = max(1.0, clock.total - rise)
        return up * 0.5 * (1.0 + math.cos(math.pi * clock.step / period))

    return value
