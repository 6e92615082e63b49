"""Whether a classifier's probabilities mean what they say: ECE, NLL, Brier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from stillhouse.errors import DataError
from stillhouse.metrics.classification import Summed, labelled, refuse_strange


class Calibration(Summed):
    """Expected calibration error, negative log-likelihood and Brier score.

    - `ece`: sum over bins of (rows in bin / rows) * |accuracy - mean confidence|, bins of
      equal width over (0, 1], each open below and closed above (Guo et al., "On Calibration
      of Modern Neural Networks", ICML 2017, eq. 3; 15 bins as there).
    - `nll`: mean of -log p(true class), natural logarithm.
    - `brier`: mean of sum_k (p_k - [k is true])^2, in [0, 2] (Brier 1950, the form for
      several classes).

    Args:
        bins: number of bins M.
        temperature: the logits are divided by it.
    """

    higher_is_better = False

    def __init__(self, bins: int = 15, *, temperature: float = 1.0) -> None:
        if bins < 1:
            raise DataError(f"calibration needs at least one bin, not {bins}")
        self.count = bins
        self.temperature = temperature
        super().__init__(3 * bins + 4)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in; logits (..., classes), see `classification.labelled`."""
        logits, target = labelled(out, batch)
        logp = F.log_softmax(logits / self.temperature, -1)
        p = logp.exp()
        confidence, answer = p.max(-1)
        right = (answer == target).float()
        cell = (confidence * self.count).ceil().long().clamp(1, self.count) - 1
        weights = torch.stack([torch.ones_like(right), confidence, right]).to(self._sums.dtype)
        binned = torch.zeros(3, self.count, dtype=weights.dtype, device=weights.device)
        binned.index_add_(1, cell, weights)
        classes = p.shape[-1]
        strange = ((target < 0) | (target >= classes)).float().sum()
        own = target.clamp(0, classes - 1)[:, None]
        nll = -logp.gather(1, own).sum()
        truth = torch.zeros_like(p).scatter_(1, own, 1.0)
        brier = (p - truth).square().sum()
        rest = torch.stack([nll, brier, torch.ones_like(right).sum(), strange])
        self.add(torch.cat([binned.reshape(-1), rest.to(binned)]))

    def compute(self) -> dict[str, float]:
        """`ece`, `nll`, `brier`; NaN when nothing was labelled.

        Raises:
            DataError: labels out of range were met.
        """
        *_, nll, brier, rows, strange = self.numbers()
        refuse_strange(strange)
        if not rows:
            return dict.fromkeys(("ece", "nll", "brier"), float("nan"))
        gaps = (b["count"] * abs(b["accuracy"] - b["confidence"]) for b in self.bins())
        return {"ece": sum(gaps) / rows, "nll": nll / rows, "brier": brier / rows}

    def bins(self) -> list[dict[str, float]]:
        """The bins that hold rows: low, high, count, mean confidence, accuracy."""
        values = self.numbers()
        m = self.count
        found = []
        for k in range(m):
            count, confidence, right = values[k], values[m + k], values[2 * m + k]
            if count:
                found.append(
                    {
                        "low": k / m,
                        "high": (k + 1) / m,
                        "count": int(count),
                        "confidence": confidence / count,
                        "accuracy": right / count,
                    }
                )
        return found

    def record(self) -> dict[str, Any]:
        """As a run's report takes it: {"bins", "ece", "nll", "brier"}."""
        return {"bins": self.bins(), **self.compute()}
