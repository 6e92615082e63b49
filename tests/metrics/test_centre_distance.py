from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.metrics.centre_distance import (
    BOUNDS,
    CentreDistance,
    average_precision,
    running_error,
)


def frame(boxes, labels, seen=None):
    """A batch of one frame: centres (n, 2)."""
    places = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2)
    count = len(places)
    return {
        "boxes": torch.cat([places, torch.ones(count, 5)], 1)[None],
        "labels": torch.tensor([labels], dtype=torch.int64).reshape(1, -1),
        "valid": torch.ones(1, count, dtype=torch.bool),
        "seen": torch.full((1, count), 20) if seen is None else torch.tensor([seen]),
    }


def found(boxes, scores, labels):
    places = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 2)
    return [
        {
            "boxes": torch.cat([places, torch.ones(len(places), 5)], 1),
            "scores": torch.tensor(scores),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
    ]


def figures(pairs, categories=("car", "truck"), groups=None):
    metric = CentreDistance(categories, lambda out: out["found"], groups)
    for out, batch in pairs:
        metric.update({"found": out}, batch)
    return metric.compute()


def test_exact_boxes_are_perfect():
    batch = frame([[0, 0], [5, 5]], [0, 1])
    values = figures([(found([[0, 0], [5, 5]], [0.9, 0.8], [0, 1]), batch)])
    assert values["map"] == pytest.approx(1.0)
    assert values["translation_error"] == pytest.approx(0.0)


def test_distance_counts_by_its_bounds():
    batch = frame([[0, 0]], [0])
    values = figures([(found([[0.7, 0]], [0.9], [0]), batch)], ("car",))
    assert values["map"] == pytest.approx(2 / 3)  # beyond 0.5 m, within 1 and 2
    assert values["translation_error"] == pytest.approx(0.7, abs=1e-6)
    assert BOUNDS == (0.5, 1.0, 2.0)


def test_another_class_or_nothing_finds_nothing():
    batch = frame([[0, 0]], [0])
    assert figures([(found([[0, 0]], [0.9], [1]), batch)])["map"] == 0
    values = figures([(found([], [], []), batch)])
    assert values["map"] == 0
    assert values["translation_error"] == 1.0


def test_a_box_is_found_once():
    batch = frame([[0, 0], [30, 0]], [0, 0])
    once = figures([(found([[0, 0], [0.1, 0]], [0.9, 0.8], [0, 0]), batch)], ("car",))
    alone = figures([(found([[0, 0]], [0.9], [0]), batch)], ("car",))
    assert once["ap_car"] == pytest.approx(alone["ap_car"])  # the second is a miss after recall 1/2
    first = figures([(found([[0, 0], [30, 0]], [0.9, 0.8], [0, 0]), batch)], ("car",))
    assert first["ap_car"] == pytest.approx(1.0)


def test_a_wrong_box_of_higher_score_costs_more():
    batch = frame([[0, 0]], [0])
    before = figures([(found([[9, 9], [0, 0]], [0.9, 0.5], [0, 0]), batch)], ("car",))
    after = figures([(found([[9, 9], [0, 0]], [0.2, 0.5], [0, 0]), batch)], ("car",))
    assert before["map"] < after["map"] == pytest.approx(1.0)


def test_groups_leave_the_other_boxes_out():
    batch = frame([[0, 0], [5, 0]], [0, 0], [3, 40])
    groups = {"few": lambda seen: seen <= 15, "many": lambda seen: seen > 15}
    out = found([[5, 0]], [0.9], [0])
    values = figures([(out, batch)], ("car",), groups)
    assert values["map_many"] == pytest.approx(1.0)
    assert values["map_few"] == 0
    # The box that was found is not wrong for the group of the others.
    both = found([[5, 0], [0, 0]], [0.9, 0.5], [0, 0])
    assert figures([(both, batch)], ("car",), groups)["map_few"] == pytest.approx(1.0)


def reference(scores, right, total):
    """The benchmark's own procedure in plain numpy."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    hits = np.cumsum(np.asarray(right)[order])
    precision = hits / np.arange(1, len(order) + 1)
    recall = hits / total
    read = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return float(np.mean(np.clip(read[11:] - 0.1, 0, None))) / 0.9


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_the_benchmark(seed):
    rng = np.random.default_rng(seed)
    scores = (rng.permutation(1000)[:60] + 0.5) / 1000  # one a bin, so that there are no ties
    right = rng.random(60) < scores
    hits, misses = torch.zeros(1000).double(), torch.zeros(1000).double()
    for score, good in zip(scores, right, strict=True):
        (hits if good else misses)[int(score * 1000)] += 1
    total = int(right.sum()) + 7
    assert average_precision(hits, misses, total) == pytest.approx(
        reference(scores, right, total), abs=2e-3
    )


def test_the_error_is_read_between_recall_a_tenth_and_the_last():
    hits, distance = torch.zeros(10).double(), torch.zeros(10).double()
    hits[9], distance[9] = 2, 0.2  # two right ones with 0.1 m each
    hits[5], distance[5] = 2, 1.8  # two with 0.9 m
    error = running_error(hits, distance, 8)
    assert 0.1 < error < 0.5
    assert running_error(hits, distance, 100) == 1.0  # recall stays below a tenth


def test_sums_of_processes_add_up():
    batches = [
        (found([[0, 0]], [0.9], [0]), frame([[0, 0], [3, 3]], [0, 1])),
        (found([[3, 3.4]], [0.6], [1]), frame([[3, 3]], [1])),
    ]
    whole = figures(batches)
    parts = []
    for pair in batches:
        metric = CentreDistance(("car", "truck"), lambda out: out["found"])
        metric.update({"found": pair[0]}, pair[1])
        parts.append(metric)
    parts[0].take(parts[0].totals() + parts[1].totals())
    assert parts[0].compute() == whole
