from __future__ import annotations

import math
import re

import pytest

from stillhouse.metrics.statistics import interval
from stillhouse.report.charts import (
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    confusion,
    line_chart,
    nice_step,
    reliability,
    strip,
    thinned,
    tick_label,
)


def places(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, p.split())) for p in re.findall(r"[ML]?([-\d.e]+ [-\d.e]+)", path)]


def test_long_curves_are_thinned_and_lose_no_peak():
    points = [(float(i), math.sin(i / 500)) for i in range(10_000)]
    points[7_777] = (7_777.0, 50.0)
    points[3_333] = (3_333.0, -50.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert (7_777.0, 50.0) in kept
    assert (3_333.0, -50.0) in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_thinning_keeps_gaps_and_its_bound_among_many():
    points = [(float(i), math.nan if i % 3 else 1.0) for i in range(9_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert any(math.isnan(y) for _, y in kept)
    assert thinned(points[:10]) == points[:10]


def test_a_curve_lies_inside_its_area_and_breaks_at_gaps():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 4.0), (4.0, 3.0), (5.0, math.inf),
              (6.0, 2.0)]  # fmt: skip
    chart = line_chart("loss", {"task": points})
    (line,) = chart.lines
    assert line.path.count("M") == 2
    assert len(line.dots) == 1  # the point between two gaps
    assert line.last == 2.0
    for x, y in [*places(line.path), *line.dots]:
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT


def test_larger_values_are_higher_up():
    chart = line_chart("x", {"a": [(0.0, 1.0), (1.0, 5.0)]})
    (_, first), (_, second) = places(chart.lines[0].path)
    assert second < first


def test_flat_single_and_missing_lines():
    assert line_chart("x", {}) is None
    assert line_chart("x", {"a": [], "b": [(1.0, math.nan)]}) is None
    flat = line_chart("x", {"a": [(0.0, 0.0), (1.0, 0.0)]})
    assert len(flat.y_ticks) >= 2
    single = line_chart("x", {"a": [(5.0, 0.3)]})
    assert single.lines[0].path == ""
    assert len(single.lines[0].dots) == 1


def test_wide_ranges_are_logarithmic_where_all_is_positive():
    wide = [(0.0, 1000.0), (1.0, 0.001)]
    assert line_chart("x", {"a": wide}).log
    assert not line_chart("x", {"a": wide}, log=False).log
    assert not line_chart("x", {"a": [(0.0, 1000.0), (1.0, -1.0)]}).log
    labels = [t.label for t in line_chart("x", {"a": wide}).y_ticks]
    assert labels[0] == "0.001"
    assert labels[-1] in {"100", "1000"}


@pytest.mark.parametrize(
    ("rough", "nice"), [(0.8, 1.0), (1.1, 2.0), (2.1, 5.0), (6.0, 10.0), (0.013, 0.02), (100, 100)]
)
def test_nice_steps(rough, nice):
    assert nice_step(rough) == pytest.approx(nice)


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [
        (0.9300000001, 0.01, "0.93"),
        (1e-12, 0.1, "0"),
        (20_000.0, 5_000.0, "20k"),
        (2.5e6, 5e5, "2.5M"),
        (3.0, 1.0, "3"),
        (-0.5, 0.5, "-0.5"),
    ],
)
def test_tick_labels(value, step, label):
    assert tick_label(value, step) == label


def test_strip_has_an_interval_only_with_seeds():
    drawn = strip(
        "accuracy",
        [
            ("teacher", "teacher", [0.98], interval([0.98])),
            ("distilled", "distilled", [0.94, 0.95, 0.96], interval([0.94, 0.95, 0.96])),
            ("nothing", "other", [], interval([])),
        ],
    )
    teacher, ours = drawn.rows
    assert teacher.low is None
    assert ours.low < min(ours.dots) < ours.mean < max(ours.dots) < ours.high
    assert teacher.mean > ours.mean
    assert strip("x", []) is None


def test_reliability_leaves_nonsense_out():
    good = {"low": 0.8, "high": 0.9, "count": 3.0, "confidence": 0.85, "accuracy": 1.0}
    bad = [
        {**good, "accuracy": 1.2},
        {**good, "high": 0.8},
        {"low": 0.1},
        {**good, "low": math.nan},
    ]
    (bar,) = reliability([good, *bad])
    assert (bar.x, bar.accuracy, bar.confidence, bar.count) == (80.0, 100.0, 85.0, 3)
    assert reliability([]) == []


def test_confusion_names_what_is_confused_most():
    drawn = confusion(["a", "b", "c"], [[5, 1, 0], [4, 6, 0], [0, 0, 0]])
    assert drawn.confused == [("b", "a", 4, 0.4), ("a", "b", 1, pytest.approx(1 / 6))]
    assert drawn.rows == 16
    assert drawn.counts
    assert confusion(["a"], [[1]]) is None
    assert confusion(["a", "b"], [[1, 2], [3]]) is None
    assert confusion(["a", "b"], [[0, 0], [0, 0]]) is None
    assert confusion(["only one"], [[1, 0], [0, 1]]).labels == ["0", "1"]
