"""The gap between the domains of several holders."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.losses.distributions import mmd_rbf
from stillhouse.metrics.domain_gap import domain_gap, mean_squared_distance


def rows(count: int, shift: float, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + shift


def test_a_shift_widens_the_gap():
    labels = torch.arange(40) % 2
    near = domain_gap([rows(40, 0, 1), rows(40, 0, 2)], [labels, labels], 2, bandwidth=8.0)
    far = domain_gap([rows(40, 0, 1), rows(40, 2, 2)], [labels, labels], 2, bandwidth=8.0)
    assert far > 0.5
    assert abs(near) < far / 5


def test_small_samples_of_one_domain_are_not_far_apart():
    labels = torch.zeros(5, dtype=torch.int64)
    found = [
        domain_gap([rows(5, 0, 2 * k), rows(5, 0, 2 * k + 1)], [labels, labels], 1, bandwidth=8.0)
        for k in range(200)
    ]
    biased = [mmd_rbf(rows(5, 0, 2 * k), rows(5, 0, 2 * k + 1), bandwidth=8.0) for k in range(200)]
    assert abs(sum(found) / 200) < 0.1
    assert float(torch.stack(biased).mean()) > 0.5


def test_it_is_the_mean_over_classes_and_pairs():
    sets, labels = [rows(6, k, k) for k in range(3)], [torch.tensor([0, 0, 0, 1, 1, 1])] * 3
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [
        mmd_rbf(sets[a][s], sets[b][s], bandwidth=5.0, biased=False)
        for s in (slice(0, 3), slice(3, 6))
        for a, b in pairs
    ]
    found = domain_gap(sets, labels, 2, bandwidth=5.0)
    assert found == pytest.approx(float(torch.stack(expected).mean()))


def test_a_class_that_one_holder_has_does_not_count():
    sets = [rows(4, 0, 0), rows(2, 1, 1)]
    labels = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0])]
    alone = domain_gap([sets[0][:2], sets[1]], [labels[0][:2], labels[1]], 2, bandwidth=5.0)
    assert domain_gap(sets, labels, 2, bandwidth=5.0) == pytest.approx(alone)
    with pytest.raises(DataError, match="two holders"):
        domain_gap([sets[0]], [labels[0]], 2)


def test_bandwidth_is_the_mean_squared_distance_of_pairs():
    found = [rows(5, 0, 0), rows(7, 3, 1)]
    whole = torch.cat(found)
    squared = (whole[:, None] - whole[None]).square().sum(2)
    count = len(whole)
    expected = float(squared.sum() / (count * count - count))
    assert mean_squared_distance(found) == pytest.approx(expected, rel=1e-5)
