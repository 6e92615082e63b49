"""The statistics of a bench: paired differences over seeds, their interval, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stillhouse.errors import StillhouseError

Verdict = Literal["supported", "not supported", "inconclusive"]
Expect = Literal["higher", "lower", "equal"]

FAST_SECONDS = 120.0
LEAST_SEEDS = 3
LEAST_SEEDS_WHEN_FAST = 5


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% t interval.

    Attributes:
        mean: of the values; NaN when there are none.
        low: lower end; None with fewer than two values.
        high: upper end; None likewise.
        count: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width, what stands after the plus-minus sign."""
        return None if self.high is None else self.high - self.mean

    @property
    def known(self) -> bool:
        """Whether there is an interval at all, and finite."""
        return (
            self.low is not None
            and self.high is not None
            and math.isfinite(self.low)
            and math.isfinite(self.high)
        )


def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The two-sided quantile of Student's t: `level` of the mass lies within it.

    Raises:
        StillhouseError: fewer than one degree of freedom.
    """
    if degrees < 1:
        raise StillhouseError(f"Student's t needs a degree of freedom, not {degrees}")
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, degrees))


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t interval of independent values: mean +- t(n-1) * s / sqrt(n).

    s is the sample standard deviation (n - 1 below the line). One value has a mean and no
    interval.
    """
    count = len(values)
    if count == 0:
        return Interval(math.nan, None, None, 0)
    mean = math.fsum(values) / count
    if count == 1 or not math.isfinite(mean):
        return Interval(mean, None, None, count)
    if len(set(values)) == 1:
        # Rounding of the mean must not make a spread where there is none.
        return Interval(values[0], values[0], values[0], count)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = t_quantile(count - 1, level) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def paired(ours: Mapping[int, float], than: Mapping[int, float]) -> dict[int, float]:
    """Differences ours - than by seed, over the seeds that both sides finished."""
    return {seed: ours[seed] - than[seed] for seed in sorted(ours.keys() & than.keys())}


def required_seeds(seconds: Mapping[str, Sequence[float]]) -> int:
    """How many seeds the rule asks for: 3, and 5 where one side takes under two minutes.

    Args:
        seconds: by side, what its runs took.
    """
    means = [math.fsum(taken) / len(taken) for taken in seconds.values() if len(taken)]
    return LEAST_SEEDS_WHEN_FAST if means and min(means) < FAST_SECONDS else LEAST_SEEDS


def verdict(found: Interval, expect: Expect, margin: float = 0.0) -> Verdict:
    """Whether an interval of differences supports a claim.

    With "higher", differences above the margin are in the claim's favour, and those at or
    below it against ("lower": the same with the sign turned). The interval wholly in favour
    is "supported", wholly against "not supported", else, or without an interval,
    "inconclusive". A negative margin says how much worse still counts ("within 0.05 dB").
    With "equal", differences of at most the margin in size are in favour, and those at or
    beyond it against.

    Args:
        found: of ours - than.
        expect: the claim's direction.
        margin: in the metric's unit.

    Raises:
        StillhouseError: an unknown direction, or "equal" with a negative margin.
    """
    if expect not in {"higher", "lower", "equal"}:
        raise StillhouseError(f"a claim expects 'higher', 'lower' or 'equal', not '{expect}'")
    if expect == "equal" and margin < 0:
        raise StillhouseError(f"a claim of equality needs a margin >= 0, not {margin}")
    if not found.known or found.low is None or found.high is None:
        return "inconclusive"
    low, high = found.low, found.high
    if expect == "equal":
        if -margin <= low and high <= margin:
            return "supported"
        return "not supported" if low >= margin or high <= -margin else "inconclusive"
    if expect == "lower":
        low, high = -high, -low
    if low > margin:
        return "supported"
    return "not supported" if high <= margin else "inconclusive"
