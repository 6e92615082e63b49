"""Latent semantic analysis: weighted words of a text, mapped into the space of a corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.data.hash_tokens import HashTokens
from stillhouse.errors import ModelError

_LONGEST = 1024


class LatentSemantics(nn.Module):
    """TF-IDF of hashed words, their leading singular directions, unit length.

    Deerwester et al. 1990, with the weights (1 + log tf) idf of sublinear TF-IDF, rows of unit
    length before the decomposition. Coordinates come in the order of the variance they carry.
    It is fitted in closed form (`fit`), and knows nothing before.

    Args:
        width: coordinates of a vector.
        buckets: numbers that words are hashed to.

    Attributes:
        reads: the view of a batch this model is called on: the raw texts.

    Raises:
        ModelError: a width that is not below the buckets.
    """

    reads = "text"
    idf: Tensor
    directions: Tensor

    def __init__(self, width: int = 256, buckets: int = 16384) -> None:
        super().__init__()
        if not 1 <= width < buckets:
            raise ModelError(f"the width must be in [1, {buckets}), not {width}")
        self.width, self.buckets = width, buckets
        self._tokens = HashTokens(buckets, _LONGEST)
        self.register_buffer("idf", torch.ones(buckets))
        self.register_buffer("directions", torch.zeros(buckets, width))

    def fit(self, texts: Sequence[str]) -> None:
        """Weights and directions of a corpus.

        Args:
            texts: more of them than the width.

        Raises:
            ModelError: too few.
        """
        if len(texts) <= self.width:
            raise ModelError(
                f"{len(texts)} texts give no {self.width} directions: more texts, or a smaller "
                "width"
            )
        counts = self._counts(texts)
        frequency = np.asarray((counts > 0).sum(0)).ravel()
        # Smoothed, as if one more text held every word.
        idf = np.log((1 + len(texts)) / (1 + frequency)) + 1
        self.idf.copy_(torch.from_numpy(idf))
        weighted = self._weighted(counts)
        start = np.random.default_rng(0).normal(size=min(weighted.shape))
        _, sizes, rows = svds(weighted, k=self.width, v0=start)
        order = np.argsort(-sizes)
        rows = rows[order]
        # A direction and its opposite fit equally well: the largest part is made positive.
        largest = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
        signs = np.where(largest < 0, -1.0, 1.0)
        self.directions.copy_(torch.from_numpy(np.ascontiguousarray((rows * signs[:, None]).T)))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, width) vectors of B texts, of unit length; 0 where no word is known."""
        weighted = self._weighted(self._counts(texts)).tocoo()
        places = torch.from_numpy(np.stack([weighted.row, weighted.col]).astype(np.int64))
        sparse = torch.sparse_coo_tensor(
            places.to(self.idf.device),
            torch.from_numpy(weighted.data).to(self.idf),
            (len(texts), self.buckets),
            check_invariants=False,
        )
        return F.normalize(torch.sparse.mm(sparse, self.directions), dim=-1)

    def _counts(self, texts: Sequence[str]) -> csr_matrix:
        ids = self._tokens(list(texts)).numpy()
        rows = np.repeat(np.arange(len(texts)), ids.shape[1])
        columns = ids.ravel()
        real = columns > 1  # neither padding nor the sign of an empty text
        data = np.ones(int(real.sum()))
        shape = (len(texts), self.buckets)
        counts = csr_matrix((data, (rows[real], columns[real])), shape=shape)
        counts.sum_duplicates()
        return counts

    def _weighted(self, counts: csr_matrix) -> csr_matrix:
        found = counts.copy()
        found.data = 1 + np.log(found.data)
        found = found.multiply(self.idf.cpu().double().numpy()[None, :]).tocsr()
        length = np.sqrt(np.asarray(found.multiply(found).sum(1)).ravel())
        scale = 1 / np.where(length > 0, length, 1.0)
        scaled: csr_matrix = found.multiply(scale[:, None]).tocsr()
        return scaled


def lsa(width: int = 256, buckets: int = 16384) -> LatentSemantics:
    """See `LatentSemantics`."""
    return LatentSemantics(width, buckets)
