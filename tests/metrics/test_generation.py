from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.generation import forgotten, frechet_distance, recognised, taken_for


def test_the_distance_of_equal_sets_is_nothing():
    rows = torch.randn(40, 5, dtype=torch.float64)
    assert frechet_distance(rows, rows.flip(0)) == pytest.approx(0.0, abs=1e-8)


def test_a_shift_counts_as_its_square():
    rows = torch.randn(40, 5, dtype=torch.float64)
    moved = rows + torch.tensor([3.0, 0, 0, 4.0, 0], dtype=torch.float64)
    assert frechet_distance(rows, moved) == pytest.approx(25.0, abs=1e-6)


def test_a_scale_counts_by_its_deviations():
    rows = torch.randn(60, 3, dtype=torch.float64)
    rows = rows - rows.mean(0)
    spread = torch.cov(rows.T).trace()
    assert frechet_distance(rows, 3 * rows) == pytest.approx(4 * float(spread), rel=1e-6)


def test_it_is_that_of_a_general_root():
    one, other = torch.randn(50, 4, dtype=torch.float64), torch.rand(30, 4, dtype=torch.float64)
    first, second = torch.cov(one.T), torch.cov(other.T)
    values = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    expected = (one.mean(0) - other.mean(0)).square().sum()
    expected = expected + first.trace() + second.trace() - 2 * values
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-8)


def test_what_has_no_distribution_is_refused():
    with pytest.raises(DataError, match="two rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(DataError, match="equal columns"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))


def one_hot(classes, count=3):
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_what_is_left_of_a_class():
    asked = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = forgotten(one_hot([1, 1, 2, 0, 1, 0, 2, 2]), asked, 0)
    assert found["ua"] == 0.75
    assert found["accuracy"] == 0.75
    assert found["forgotten_probability"] == 0.25
    assert found["entropy"] == pytest.approx(0.0, abs=1e-6)
    assert found["leak"] == 0.5
    even = forgotten(torch.full((8, 3), 1 / 3), asked, 0)
    assert even["entropy"] == pytest.approx(torch.tensor(3.0).log().item())
    assert recognised(one_hot([0, 1]), torch.tensor([0, 2]))["accuracy"] == 0.5
    assert taken_for(torch.tensor([1, 0]), torch.tensor([0, 1]), 1, [0, 1]) == [1.0, 0.0]


def test_an_audit_needs_the_class_and_others():
    with pytest.raises(DataError):
        forgotten(one_hot([0, 1]), torch.tensor([0, 0]), 0)
    with pytest.raises(DataError):
        forgotten(one_hot([0, 1]), torch.tensor([1, 2]), 0)
