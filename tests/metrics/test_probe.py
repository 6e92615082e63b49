"""Probes: what they fit, how they choose, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import DataError, RecipeError
from stillhouse.metrics.probe import GRID, Separation, few_labels, probed


def blobs(rows: int, classes: int = 4, spread: float = 0.5, seed: int = 0):
    rng = torch.Generator().manual_seed(9)
    centres = torch.randn(classes, 8, generator=rng)
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + spread * noise, labels


@pytest.mark.parametrize("kind", ["svm", "linear-svm", "logistic"])
def test_separable_classes_are_found(kind):
    figures = probed(*blobs(80), *blobs(60, seed=1), kind=kind, grid=(0.1, 1.0, 10.0))
    assert figures["accuracy"] > 0.9
    assert figures["top3"] >= figures["accuracy"]
    assert "top5" not in figures  # of four classes it says nothing


@pytest.mark.parametrize("spread", [0.8, 1.5, 3.0])
def test_it_is_the_search_of_scikit_learn(spread):
    from sklearn.model_selection import GridSearchCV
    from sklearn.preprocessing import StandardScaler, normalize
    from sklearn.svm import SVC

    (x, y), (a, b) = blobs(80, spread=spread), blobs(60, spread=spread, seed=1)
    scaler = StandardScaler().fit(normalize(x.double().numpy()))
    given, asked = (scaler.transform(normalize(v.double().numpy())) for v in (x, a))
    search = GridSearchCV(SVC(gamma="scale"), {"C": list(GRID)}, cv=5).fit(given, y.numpy())
    figures = probed(x, y, a, b)
    assert figures["probe_c"] == search.best_params_["C"]
    assert figures["accuracy"] == pytest.approx(search.score(asked, b.numpy()))


def test_few_rows_are_not_searched():
    assert probed(*blobs(40), *blobs(20, seed=1))["probe_c"] == 1e5
    features, labels = blobs(60, classes=2)
    labels[:] = 0
    labels[:4] = 1
    assert probed(features, labels, *blobs(20, classes=2, seed=1))["probe_c"] == 1e5


def test_scaling_of_features_does_not_matter_when_rows_have_unit_length():
    (x, y), (a, b) = blobs(60), blobs(40, seed=1)
    lengths = torch.linspace(0.1, 9.0, 60)[:, None]
    one, other = probed(x, y, a, b), probed(x * lengths, y, a * 3, b)
    assert one == pytest.approx(other)


def test_at_most_so_many_rows_are_fitted_and_all_classes_are_among_them():
    few = probed(*blobs(400), *blobs(60, seed=1), most=80, grid=(1.0,))
    assert few["accuracy"] > 0.8
    again = probed(*blobs(400), *blobs(60, seed=1), most=80, grid=(1.0,))
    assert few == again


def test_two_classes_and_a_constant_feature():
    features, labels = blobs(60, classes=2)
    features[:, 0] = 0.0
    asked, truth = blobs(40, classes=2, seed=1)
    asked[:, 0] = 0.0
    figures = probed(features, labels, asked, truth)
    assert figures["accuracy"] > 0.9
    assert set(figures) == {"accuracy", "probe_c"}


def test_what_does_not_fit_is_told():
    (x, y), (a, b) = blobs(20), blobs(10, seed=1)
    with pytest.raises(RecipeError, match="linear-svm"):
        probed(x, y, a, b, kind="linear-svn")
    with pytest.raises(DataError, match="two classes"):
        probed(x, torch.zeros_like(y), a, b)
    with pytest.raises(DataError, match="not finite"):
        probed(x, y, a * float("nan"), b)
    with pytest.raises(DataError, match="width 8 and 5"):
        probed(x, y, a[:, :5], b)
    with pytest.raises(DataError, match="of test"):
        probed(x, y, a, b[:3])


def test_separation_is_the_share_of_variance_between_classes():
    features, labels = blobs(50, classes=3)
    metric = Separation(3)
    for start in (0, 20, 35):
        stop = {0: 20, 20: 35, 35: 50}[start]
        metric.update({"embedding": features[start:stop]}, {"target": labels[start:stop]})
    z = torch.nn.functional.normalize(features.double(), dim=1)
    mean = z.mean(0)
    between = sum(
        int((labels == c).sum()) * (z[labels == c].mean(0) - mean).square().sum() for c in range(3)
    )
    wanted = float(between / (z - mean).square().sum())
    assert metric.compute()["separation"] == pytest.approx(wanted)
    assert 0 < wanted < 1
    other = Separation(3)
    other.update({"embedding": features}, {"target": labels})
    other.take(other.totals() * 2)  # as of two processes with the same rows
    assert other.compute()["separation"] == pytest.approx(wanted)
    with pytest.raises(DataError):
        Separation(3).compute()
    assert np.isfinite(wanted)


def test_few_labels_are_drawn_of_every_class():
    given, asked = blobs(80), blobs(60, seed=1)
    found = few_labels(*given, *asked)
    assert found is not None
    assert 0.8 < found <= probed(*given, *asked)["accuracy"] + 0.05
    assert found == few_labels(*given, *asked)
    assert few_labels(*given, *asked, each=2) < found + 0.01
    assert few_labels(*given, *asked, each=20) is None
