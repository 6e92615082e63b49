from __future__ import annotations

import math

import pytest

from stillhouse.errors import StillhouseError
from stillhouse.metrics.statistics import (
    Interval,
    interval,
    paired,
    required_seeds,
    t_quantile,
    verdict,
)


def between(low, high):
    return Interval((low + high) / 2, low, high, 3)


def test_interval_by_hand():
    # mean 2, s = 1, t(2) = 4.302653: half = 4.302653 / sqrt(3)
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(2.484138, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((-0.484138, 4.484138), abs=1e-6)
    # five seeds: differences 1, 1, 1, 1, 6: mean 2, s = sqrt(5), t(4) = 2.776445, half 2.776445
    assert interval([1, 1, 1, 1, 6]).half == pytest.approx(2.776445, abs=1e-6)


@pytest.mark.parametrize(
    ("degrees", "value"), [(1, 12.7062), (2, 4.302653), (4, 2.776445), (30, 2.042272)]
)
def test_quantiles_of_the_t_table(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=1e-4)


def test_interval_equals_scipy():
    from scipy.stats import sem, t

    values = [0.91, 0.935, 0.912, 0.951, 0.9]
    low, high = t.interval(0.95, 4, loc=sum(values) / 5, scale=sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_value_none_equal_values_and_nan():
    assert interval([0.5]) == Interval(0.5, None, None, 1)
    assert not interval([0.5]).known
    assert interval([0.5]).half is None
    assert math.isnan(interval([]).mean)
    # 0.1 three times: rounding of the mean must leave no spread
    assert interval([0.1, 0.1, 0.1]) == Interval(0.1, 0.1, 0.1, 3)
    assert not interval([0.5, math.nan, 0.5]).known
    with pytest.raises(StillhouseError):
        t_quantile(0)


def test_differences_are_taken_over_common_seeds():
    assert paired({0: 3.0, 2: 5.0, 1: 4.0}, {1: 1.0, 0: 1.0, 7: 0.0}) == {0: 2.0, 1: 3.0}


@pytest.mark.parametrize(
    ("low", "high", "expect", "margin", "said"),
    [
        (0.1, 0.5, "higher", 0.0, "supported"),
        (0.0, 0.5, "higher", 0.0, "inconclusive"),  # touches: not wholly beyond
        (-0.5, 0.0, "higher", 0.0, "not supported"),  # wholly at or beyond it against
        (-0.5, -0.1, "higher", 0.0, "not supported"),
        (-0.1, 0.1, "higher", 0.0, "inconclusive"),
        (0.1, 0.5, "higher", 0.7, "not supported"),  # better, but surely by less than claimed
        (0.8, 1.0, "higher", 0.7, "supported"),
        (0.6, 1.0, "higher", 0.7, "inconclusive"),
        (-0.04, 0.1, "higher", -0.05, "supported"),  # "within 0.05"
        (-0.2, -0.06, "higher", -0.05, "not supported"),
        (-0.5, -0.1, "lower", 0.0, "supported"),
        (0.0, 0.5, "lower", 0.0, "not supported"),
        (-0.5, -0.1, "lower", 0.2, "inconclusive"),
        (-0.5, -0.3, "lower", 0.2, "supported"),
        (-0.01, 0.01, "equal", 0.02, "supported"),
        (0.02, 0.05, "equal", 0.02, "not supported"),
        (-0.09, -0.02, "equal", 0.02, "not supported"),
        (-0.01, 0.05, "equal", 0.02, "inconclusive"),
        (0.0, 0.0, "equal", 0.0, "supported"),  # bit for bit the same
        (0.1, 0.1, "equal", 0.0, "not supported"),
        (0.2, 0.2, "higher", 0.1, "supported"),  # no spread at all
    ],
)
def test_verdicts(low, high, expect, margin, said):
    assert verdict(between(low, high), expect, margin) == said


def test_without_an_interval_nothing_is_concluded():
    for found in (interval([5.0]), interval([]), interval([1.0, math.inf])):
        for expect in ("higher", "lower", "equal"):
            assert verdict(found, expect) == "inconclusive"


def test_nonsense_is_refused():
    with pytest.raises(StillhouseError, match="bigger"):
        verdict(between(0, 1), "bigger")
    with pytest.raises(StillhouseError, match="margin"):
        verdict(between(0, 1), "equal", -0.1)


def test_number_of_seeds_that_the_rule_asks_for():
    assert required_seeds({"a": [300.0, 310.0], "b": [121.0]}) == 3
    assert required_seeds({"a": [300.0, 310.0], "b": [119.0]}) == 5
    assert required_seeds({"a": [], "b": []}) == 3
    assert required_seeds({}) == 3
