"""How the similarity of two texts' vectors follows what people say: STS-B and its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError


class PairSimilarity:
    """Correlation of cosine similarities with given scores, over pairs of rows.

    - `spearman`: of the ranks, ties by their mean rank (the figure of STS-B, as
      sentence-transformers and MTEB give it, in [-1, 1]).
    - `pearson`: of the values.

    Every row says which pair it belongs to, so that pairs may lie in different batches and
    on different processes.
    """

    higher_is_better = True

    def __init__(self) -> None:
        self._pairs = 0
        self._sums = torch.zeros(0)
        self._none = False

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in.

        Args:
            out: `embedding` (B, D).
            batch: `pair` (B, 3) int64: number of the pair, side 0 or 1, number of all pairs;
                `target` (B,): the pair's score. Rows whose pair is -1 are passed over, and so
                are all rows of a collection without pairs (see `metrics/ranking.py`).

        Raises:
            DataError: the split holds no pairs.
        """
        pair = batch.get("pair")
        if not isinstance(pair, Tensor) and "place" in batch:
            self._none = True
            return
        if not isinstance(pair, Tensor):
            raise DataError(
                "the split holds no pairs with scores, so vectors cannot be judged on it: the "
                "task 'embedding' needs the view 'pair' (see the data set stsb)"
            )
        vectors = F.normalize(out["embedding"].detach().float().cpu(), dim=-1)
        pair, target = pair.cpu(), batch["target"].float().cpu()
        if not bool((kept := pair[:, 0] >= 0).all()):
            self._none = True
            pair, target, vectors = pair[kept], target[kept], vectors[kept.to(vectors.device)]
            if not len(pair):
                return
        if not len(self._sums):
            self._pairs = int(pair[0, 2])
            self._sums = torch.zeros(self._pairs * 2, vectors.shape[1] + 2)
        rows = pair[:, 0] * 2 + pair[:, 1]
        self._sums[rows] = torch.cat([vectors, target[:, None], torch.ones(len(rows), 1)], 1)

    def totals(self) -> Tensor:
        """(rows, D + 2): each row's vector, score and 1; zeros where it was not seen."""
        return self._sums

    def take(self, totals: Tensor) -> None:
        """Replace the rows by those of all processes."""
        self._sums = totals.cpu()
        self._pairs = len(totals) // 2

    def compute(self) -> dict[str, float]:
        """The correlations; none of a split that holds a collection and no pairs.

        Raises:
            DataError: a row of a pair was not seen, or there are fewer than two pairs.
        """
        if self._none and not len(self._sums):
            return {}
        if self._pairs < 2 or not bool((self._sums[:, -1] == 1).all()):
            seen = int(self._sums[:, -1].sum()) if len(self._sums) else 0
            raise DataError(f"{seen} rows of {self._pairs} pairs were seen; all are needed")
        vectors, score = self._sums[:, :-2], self._sums[0::2, -2]
        cosine = (vectors[0::2] * vectors[1::2]).sum(-1)
        ours, theirs = cosine.double().numpy(), score.double().numpy()
        return {
            "spearman": correlation(rankdata(ours), rankdata(theirs)),
            "pearson": correlation(ours, theirs),
        }


def correlation(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Pearson's correlation of two rows of numbers; 0 when one of them is constant."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0
