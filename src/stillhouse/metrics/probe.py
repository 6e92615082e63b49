"""What features hold, by classifiers fitted on them: support vectors, or a linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError, RecipeError, nearest

Kind = Literal["svm", "linear-svm", "logistic"]
KINDS = ("svm", "linear-svm", "logistic")
# The grid of released COMODO, which is that of TS2Vec's and Mantis' protocol.
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
_FEW_ROWS, _FEW_OF_A_CLASS, _FEW_C = 50, 5, 1e5


def probed(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    kind: Kind = "svm",
    grid: Sequence[float] = GRID,
    folds: int = 5,
    most: int = 10_000,
    unit: bool = True,
    standardised: bool = True,
    top: Sequence[int] = (1, 3, 5),
    seed: int = 0,
) -> dict[str, float]:
    """Fit a classifier on features with labels, and judge it on others.

    - "svm": RBF kernel (gamma 1 / (width * variance)), C by `folds`-fold cross-validation over
      `grid`, on at most `most` training rows, stratified; C = 1e5 without a search where there
      are fewer than 50 rows or a class has fewer than 5 (COMODO's released `fit_svm`).
    - "linear-svm": a linear one with C = 1 (the protocol of point-cloud pre-training).
    - "logistic": logistic regression with C = 1.

    Args:
        train: (n, D).
        train_labels: (n,) int64.
        test: (m, D).
        test_labels: (m,) int64.
        kind: see above.
        grid: candidates of C.
        folds: of the search; never more than the smallest class has rows.
        most: training rows at most.
        unit: scale every row to unit length first.
        standardised: then every feature to mean 0 and variance 1 over the training rows.
        top: which top-k accuracies; those of fewer candidates than there are classes.
        seed: of the choice among too many rows.

    Returns:
        "accuracy", "top3" ... in [0, 1], and "probe_c", the C that was used.

    Raises:
        DataError: fewer than two classes, features that are not finite, shapes that do not fit.
        RecipeError: an unknown kind.
    """
    if kind not in KINDS:
        raise RecipeError(f"unknown kind of probe '{kind}'{nearest(kind, KINDS)}")
    _check(train, train_labels, test, test_labels)
    rows = _at_most(train_labels, most, seed)
    given, labels = _scaled(train, unit)[rows], train_labels.cpu().numpy()[rows]
    asked = _scaled(test, unit)
    if standardised:
        mean, spread = given.mean(0), given.std(0)
        spread = np.where(spread > 0, spread, 1.0)
        given, asked = (given - mean) / spread, (asked - mean) / spread
    model, c = _fitted(kind, given, labels, grid, folds)
    scores = np.asarray(model.decision_function(asked))
    if scores.ndim == 1:  # two classes have one score
        scores = np.stack([-scores, scores], 1)
    truth = test_labels.cpu().numpy()
    # The class with the highest score need not be the predicted one (votes of pairs decide).
    figures = {"accuracy": float((model.predict(asked) == truth).mean())}
    ranked = np.asarray(model.classes_)[np.argsort(-scores, axis=1, kind="stable")]
    for k in top:
        if 1 < k < len(model.classes_):
            figures[f"top{k}"] = float((ranked[:, :k] == truth[:, None]).any(1).mean())
    return {**figures, "probe_c": c}


def few_labels(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    each: int = 10,
    draws: int = 5,
    **settings: Any,
) -> float | None:
    """The accuracy of a probe that knows few labels, the mean over several draws of them.

    Args:
        train: (n, D), as for `probed`.
        train_labels: (n,) int64.
        test: (m, D).
        test_labels: (m,) int64.
        each: labelled rows of every class.
        draws: how often they are drawn; the same rows for the same labels.
        settings: further ones of `probed`.

    Returns:
        In [0, 1]; None where a class has no more rows than that.
    """
    values, sizes = torch.unique(train_labels, return_counts=True)
    if len(values) < 2 or int(sizes.min()) <= each:
        return None
    found = []
    for draw in range(draws):
        mixed = torch.randperm(len(train_labels), generator=Generator().manual_seed(draw))
        rows = torch.cat([mixed[train_labels[mixed] == value][:each] for value in values])
        figures = probed(
            train[rows],
            train_labels[rows],
            test,
            test_labels,
            **{"grid": (_FEW_C,), "top": (), **settings},
        )
        found.append(figures["accuracy"])
    return sum(found) / draws


def _fitted(
    kind: str, given: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], grid: Any, folds: int
) -> tuple[Any, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC, LinearSVC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if kind == "linear-svm":
            return LinearSVC(C=1.0, random_state=0).fit(given, labels), 1.0
        if kind == "logistic":
            return LogisticRegression(C=1.0, max_iter=1000).fit(given, labels), 1.0
        fewest = int(np.unique(labels, return_counts=True)[1].min())
        if len(labels) < _FEW_ROWS or fewest < _FEW_OF_A_CLASS or len(grid) == 1:
            c = _FEW_C if len(grid) > 1 else float(grid[0])
            return SVC(C=c, gamma="scale").fit(given, labels), c
        c = _searched(given, labels, grid, min(folds, fewest))
        return SVC(C=c, gamma="scale").fit(given, labels), c


def _searched(
    given: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], grid: Sequence[float], folds: int
) -> float:
    """The C with the best mean accuracy over stratified folds; the first of equal ones.

    What scikit-learn's grid search chooses, but each fold's kernel is computed once for all C.
    """
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    scores = np.zeros((folds, len(grid)))
    for fold, (fitted, asked) in enumerate(StratifiedKFold(folds).split(given, labels)):
        rows = given[fitted]
        gamma = 1.0 / (rows.shape[1] * rows.var()) if rows.var() > 0 else 1.0
        kernel, others = rbf_kernel(rows, gamma=gamma), rbf_kernel(given[asked], rows, gamma=gamma)
        for place, c in enumerate(grid):
            model = SVC(C=c, kernel="precomputed").fit(kernel, labels[fitted])
            scores[fold, place] = (model.predict(others) == labels[asked]).mean()
    return float(grid[int(scores.mean(0).round(12).argmax())])


def _scaled(features: Tensor, unit: bool) -> np.ndarray[Any, Any]:
    rows = features.detach().double().cpu()
    scaled: np.ndarray[Any, Any] = (F.normalize(rows, dim=1) if unit else rows).numpy()
    return scaled


def _at_most(labels: Tensor, most: int, seed: int) -> np.ndarray[Any, Any]:
    """Positions of at most `most` rows, stratified."""
    rows = np.arange(len(labels))
    if len(rows) <= most:
        return rows
    from sklearn.model_selection import train_test_split

    kept, _ = train_test_split(
        rows, train_size=most, random_state=seed, stratify=labels.cpu().numpy()
    )
    return np.sort(kept)


def _check(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> None:
    for what, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if rows.ndim != 2 or labels.shape != rows.shape[:1] or len(rows) == 0:
            raise DataError(
                f"a probe needs features (n, D) and labels (n,) of {what}, got "
                f"{tuple(rows.shape)} and {tuple(labels.shape)}"
            )
        if not bool(torch.isfinite(rows).all()):
            raise DataError(f"the features of {what} are not finite: the encoder gives NaN")
    if train.shape[1] != test.shape[1]:
        raise DataError(f"features of width {train.shape[1]} and {test.shape[1]} cannot be probed")
    if len(torch.unique(train_labels)) < 2:
        raise DataError("a probe needs at least two classes among its training rows")


class Separation:
    """How far classes lie apart among unit vectors: the share of variance between them.

    With class means of unit vectors, `separation` = sum_c n_c |m_c - m|^2 / sum_i |z_i - m|^2,
    in [0, 1] (the correlation ratio). A cheap figure for validation; the probe judges.

    Args:
        classes: number of classes.
    """

    higher_is_better = True

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._sums = torch.zeros(0)

    def update(self, out: Any, batch: Any) -> None:
        """Take one batch in: `embedding` (B, D) and `target` (B,)."""
        vectors = F.normalize(out["embedding"].detach().double().cpu(), dim=-1)
        if not len(self._sums):
            self._sums = torch.zeros(self.classes, vectors.shape[1] + 1, dtype=torch.float64)
        rows = torch.cat([vectors, torch.ones(len(vectors), 1, dtype=torch.float64)], 1)
        self._sums.index_add_(0, batch["target"].cpu(), rows)

    def totals(self) -> Tensor:
        """(classes, D + 1): sums of vectors by class, and their number."""
        return self._sums

    def take(self, totals: Tensor) -> None:
        """Replace the sums by those of all processes."""
        self._sums = totals.cpu().double()

    def compute(self) -> dict[str, float]:
        """The share.

        Raises:
            DataError: no row was seen.
        """
        if not len(self._sums):
            raise DataError("no row was seen; classes cannot be told apart")
        vectors, counts = self._sums[:, :-1], self._sums[:, -1:]
        whole, mean = counts.sum(), vectors.sum(0) / counts.sum()
        within_all = whole - whole * mean.square().sum()  # vectors have length 1
        means = vectors / counts.clamp(min=1)
        between = (counts[:, 0] * (means - mean).square().sum(1)).sum()
        return {"separation": float(between / within_all.clamp(min=1e-12))}
