from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from stillhouse.metrics.tagging import TokenFigures, auc, f1


def test_auc_equals_the_reference_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 6, 50) / 5
        labels = rng.random(50) < 0.4
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    assert auc([0.1, 0.9], [False, True]) == 1.0
    assert math.isnan(auc([0.1, 0.2], [True, True]))


def test_f1_equals_the_reference():
    rng = np.random.default_rng(1)
    chosen, labels = rng.random(80) < 0.5, rng.random(80) < 0.3
    found = f1(chosen, labels)
    assert found["f1"] == pytest.approx(f1_score(labels, chosen))
    assert found["accuracy"] == pytest.approx((chosen == labels).mean())
    assert f1([False], [True])["f1"] == 0.0


def test_token_figures_over_batches_and_processes():
    torch.manual_seed(0)
    logits = torch.randn(40, 12, 2)
    target = torch.randint(0, 2, (40, 12))
    target[:, 9:] = -100
    whole, parts = TokenFigures(), [TokenFigures(), TokenFigures()]
    whole.update({"logits": logits}, {"target": target})
    for part, rows in zip(parts, (slice(0, 15), slice(15, 40))):
        part.update({"logits": logits[rows]}, {"target": target[rows]})
    parts[0].take(parts[0].totals() + parts[1].totals())
    assert whole.compute() == parts[0].compute()
    probability = logits.softmax(-1)[..., 1][target >= 0].numpy()
    true = target[target >= 0].numpy()
    figures = whole.compute()
    assert figures["auc"] == pytest.approx(roc_auc_score(true, probability), abs=1e-3)
    assert figures["f1"] == pytest.approx(f1_score(true, probability >= 0.5), abs=2e-3)
    assert figures["accuracy"] == pytest.approx(((probability >= 0.5) == true).mean(), abs=2e-3)
