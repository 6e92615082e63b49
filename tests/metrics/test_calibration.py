from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import DataError
from stillhouse.metrics.calibration import Calibration


def logits_of(*p: float) -> torch.Tensor:
    """Logits of two classes whose first has probability p."""
    return torch.stack([torch.tensor(p).log(), (1 - torch.tensor(p)).log()], 1)


def test_ece_nll_brier_by_hand():
    metric = Calibration(bins=10)
    logits = logits_of(0.95, 0.95, 0.65, 0.65)
    target = torch.tensor([0, 1, 0, 0])
    metric.update({"logits": logits}, {"target": target})
    # bin (0.9, 1]: accuracy 1/2 against 0.95; bin (0.6, 0.7]: 1 against 0.65
    found = metric.compute()
    assert found["ece"] == pytest.approx(0.5 * 0.45 + 0.5 * 0.35, abs=1e-6)
    expected = -(math.log(0.95) + math.log(0.05) + 2 * math.log(0.65)) / 4
    assert found["nll"] == pytest.approx(expected, abs=1e-5)
    brier = (2 * 0.05**2 + 2 * 0.95**2 + 2 * 2 * 0.35**2) / 4
    assert found["brier"] == pytest.approx(brier, abs=1e-5)
    bins = metric.bins()
    assert [(b["low"], b["high"], b["count"]) for b in bins] == [(0.6, 0.7, 2), (0.9, 1.0, 2)]
    assert [b["accuracy"] for b in bins] == [1.0, 0.5]
    assert not metric.higher_is_better
    assert set(metric.record()) == {"bins", "ece", "nll", "brier"}


def test_perfect_answers_have_no_error():
    metric = Calibration()
    logits = 100 * torch.eye(4)
    metric.update({"logits": logits}, {"target": torch.arange(4)})
    assert metric.compute() == {"ece": 0.0, "nll": 0.0, "brier": 0.0}


def test_nll_is_cross_entropy_and_temperature_divides():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=rng)
    target = torch.randint(0, 6, (50,), generator=rng)
    for temperature in (1.0, 2.5):
        metric = Calibration(temperature=temperature)
        metric.update({"logits": logits}, {"target": target})
        expected = float(F.cross_entropy(logits / temperature, target))
        assert metric.compute()["nll"] == pytest.approx(expected, abs=1e-5)


def test_pieces_add_up_to_the_whole():
    rng = torch.Generator().manual_seed(4)
    logits = torch.randn(64, 3, generator=rng)
    target = torch.randint(0, 3, (64,), generator=rng)
    whole, a, b = Calibration(), Calibration(), Calibration()
    whole.update({"logits": logits}, {"target": target})
    a.update({"logits": logits[:20]}, {"target": target[:20]})
    b.update({"logits": logits[20:]}, {"target": target[20:]})
    a.take(a.totals() + b.totals())
    for name, value in whole.compute().items():
        assert a.compute()[name] == pytest.approx(value, abs=1e-6)


def test_nothing_seen_is_nan_and_bad_labels_are_told():
    assert math.isnan(Calibration().compute()["ece"])
    metric = Calibration()
    metric.update({"logits": torch.zeros(2, 3)}, {"target": torch.tensor([0, 3])})
    with pytest.raises(DataError, match="label"):
        metric.compute()
    with pytest.raises(DataError, match="bin"):
        Calibration(bins=0)
