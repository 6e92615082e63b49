"""How well scores tell two kinds of items apart: AUC, F1, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stillhouse.losses.sequence import IGNORED


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties half.

    Args:
        scores: (N,).
        labels: (N,) true where positive.

    Returns:
        In [0, 1]; NaN when one kind is missing.
    """
    values, positive = np.asarray(scores, float), np.asarray(labels, bool)
    wins, losses = int(positive.sum()), int((~positive).sum())
    if not wins or not losses:
        return float("nan")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0  # mean rank of each value, from 1
    total = float(ranks[place][positive].sum())
    return (total - wins * (wins + 1) / 2) / (wins * losses)


def f1(chosen: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    """Precision, recall, F1 and accuracy of a choice; 0 where undefined."""
    picked, true = np.asarray(chosen, bool), np.asarray(labels, bool)
    both = float((picked & true).sum())
    precision = both / picked.sum() if picked.any() else 0.0
    recall = both / true.sum() if true.any() else 0.0
    found = 2 * precision * recall / (precision + recall) if both else 0.0
    right = float((picked == true).mean()) if len(true) else 0.0
    return {
        "f1": float(found),
        "precision": float(precision),
        "recall": float(recall),
        "accuracy": right,
    }


class TokenFigures:
    """AUC, F1 and accuracy of two-class token logits over a split, by a fine histogram.

    The AUC is exact up to ties within one of the `bins` cells of the probability.

    Args:
        bins: cells of the histogram.
    """

    higher_is_better = True

    def __init__(self, bins: int = 4096) -> None:
        self.bins = bins
        self.counts = torch.zeros(2, bins, dtype=torch.float64)

    def update(self, out: dict[str, Any], batch: Any) -> None:
        """Take one batch in: logits (B, L, 2) and `target` (B, L), -100 for none."""
        target = batch["target"]
        valid = target != IGNORED
        probability = out["logits"].float().softmax(-1)[..., 1][valid]
        cells = (probability * self.bins).long().clamp(0, self.bins - 1)
        for label in (0, 1):
            own = cells[target[valid] == label]
            self.counts[label] += torch.bincount(own, minlength=self.bins).cpu()

    def totals(self) -> Tensor:
        """The histogram."""
        return self.counts

    def take(self, totals: Tensor) -> None:
        """Replace it by that of all processes."""
        self.counts = totals.to(torch.float64).cpu()

    def compute(self) -> dict[str, float]:
        """Figures; a token is taken as positive above probability one half."""
        negative, positive = self.counts
        pairs = float(negative.sum() * positive.sum())
        below = negative.cumsum(0) - negative
        area = float((positive * (below + negative / 2)).sum()) / pairs if pairs else float("nan")
        half = self.bins // 2
        hits, false = float(positive[half:].sum()), float(negative[half:].sum())
        missed, total = float(positive[:half].sum()), float(self.counts.sum())
        found = 2 * hits / (2 * hits + false + missed) if hits else 0.0
        right = (hits + float(negative[:half].sum())) / total if total else 0.0
        return {"auc": area, "f1": found, "accuracy": right}
