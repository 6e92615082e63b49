from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.metrics.head_geometry import head_geometry


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_a_simplex_reaches_the_targets(classes):
    simplex = torch.eye(classes) - 1 / classes
    shifted = 3.0 * simplex + torch.linspace(-1, 1, classes)
    found = head_geometry(shifted)
    assert found["head_cosine"] == pytest.approx(-1 / (classes - 1), abs=1e-6)
    assert found["head_cosine_spread"] == pytest.approx(0, abs=1e-6)
    assert found["head_norm_spread"] == pytest.approx(0, abs=1e-6)


def test_against_a_slow_twin():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    rows = [row - weight.mean(0) for row in weight]
    cosines = [(a @ b / (a.norm() * b.norm())).item() for a in rows for b in rows if a is not b]
    norms = torch.stack([row.norm() for row in rows])
    found = head_geometry(weight)
    assert found["head_cosine"] == pytest.approx(sum(cosines) / 30)
    assert found["head_norm_spread"] == pytest.approx(
        (((norms - norms.mean()) ** 2).mean().sqrt() / norms.mean()).item()
    )
    assert found["head_cosine_spread"] > 0


def test_rows_that_are_alike_are_finite():
    assert all(abs(v) < 10 for v in head_geometry(torch.ones(3, 4)).values())


def test_one_class_is_refused():
    with pytest.raises(ModelError, match="two classes"):
        head_geometry(torch.ones(1, 4))
