from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.agreement import Agreement


def test_by_hand():
    student = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]).log()
    teacher = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.2, 0.8]]).log()
    metric = Agreement()
    metric.update({"logits": student, "teacher_logits": teacher}, {})
    found = metric.compute()
    assert found["agreement"] == pytest.approx(2 / 3)
    kl = (
        0.8 * math.log(0.8 / 0.5)
        + 0.2 * math.log(0.2 / 0.5)
        + 0.1 * math.log(0.1 / 0.9)
        + 0.9 * math.log(0.9 / 0.1)
    ) / 3
    assert found["teacher_kl"] == pytest.approx(kl, abs=1e-5)


def test_identical_models_agree_and_direction_matters():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 5, generator=rng)
    same = Agreement()
    same.compare(a, a + 3.0)  # a common offset of logits changes no probability
    assert same.compute()["agreement"] == 1.0
    assert same.compute()["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    one, other = Agreement(), Agreement()
    one.compare(a, b)
    other.compare(b, a)
    assert one.compute()["teacher_kl"] != pytest.approx(other.compute()["teacher_kl"], abs=1e-3)


def test_pieces_masks_and_the_batch_as_place_of_the_teacher():
    rng = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 12, 4, generator=rng)
    mask = torch.arange(12) < 9
    whole, a, b = Agreement(), Agreement(), Agreement()
    whole.compare(student[:9], teacher[:9])
    a.update({"logits": student[:5]}, {"teacher_logits": teacher[:5], "mask": mask[:5]})
    b.update({"logits": student[5:]}, {"teacher_logits": teacher[5:], "mask": mask[5:]})
    a.take(a.totals() + b.totals())
    for name, value in whole.compute().items():
        assert a.compute()[name] == pytest.approx(value, abs=1e-6)


def test_what_is_missing_or_does_not_fit_is_told():
    with pytest.raises(DataError, match="teacher_logits"):
        Agreement().update({"logits": torch.zeros(2, 3)}, {})
    with pytest.raises(DataError, match=r"\(2, 3\).*\(2, 4\)"):
        Agreement().compare(torch.zeros(2, 3), torch.zeros(2, 4))
    assert math.isnan(Agreement().compute()["agreement"])
