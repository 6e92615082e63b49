"""A small text classifier: hashed word embeddings, convolutions, max over time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError

PADDING = 0
# odd 31-bit multipliers and offsets: two rows of a table never collide for both hashes
_MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39, 0x165667B1, 0x5BD1E995)
_OFFSETS = (0x3C6EF372, 0x1F83D9AB, 0x510E527F, 0x6A09E667)
_MODULUS = (1 << 31) - 1


class HashEmbedding(nn.Module):
    """Embedding of any int64 token id through several hashes into one small table.

    A token's vector is the sum over hash functions of an importance weight times a row of the
    table; both are found by hashing the id, so there is no vocabulary (hash embeddings,
    Svenstrup et al. 2017, section 3; here the importance weights are hashed as well, into
    `buckets` rows, which that section also allows). Tokens of id 0 are padding: their vector
    is 0.

    Args:
        width: of the vectors.
        buckets: rows of the table.
        hashes: 1 to 4 hash functions.

    Raises:
        ModelError: a number out of range.
    """

    multipliers: Tensor
    offsets: Tensor

    def __init__(self, width: int = 64, buckets: int = 4096, hashes: int = 2) -> None:
        super().__init__()
        if min(width, buckets) < 1 or not 1 <= hashes <= len(_MULTIPLIERS):
            raise ModelError(
                f"a hash embedding needs width >= 1, buckets >= 1 and 1 to {len(_MULTIPLIERS)} "
                f"hashes, got {width}, {buckets}, {hashes}"
            )
        self.buckets = buckets
        self.table = nn.Embedding(buckets, width)
        self.importance = nn.Embedding(buckets, hashes)
        nn.init.normal_(self.table.weight, std=width**-0.5)
        nn.init.ones_(self.importance.weight)
        # functions of the class, not state: kept out of the state dict
        self.register_buffer("multipliers", torch.tensor(_MULTIPLIERS[:hashes]), persistent=False)
        self.register_buffer("offsets", torch.tensor(_OFFSETS[:hashes]), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors of tokens.

        Args:
            tokens: (..., ) int64 ids, any value; 0 is padding.

        Returns:
            (..., width).
        """
        rows = self.rows(tokens)
        vectors = self.table(rows)
        weights = self.importance(rows[..., 0])
        mixed: Tensor = (vectors * weights.unsqueeze(-1)).sum(-2)
        return mixed.masked_fill((tokens == PADDING).unsqueeze(-1), 0.0)

    def rows(self, tokens: Tensor) -> Tensor:
        """Rows of the table, (..., hashes), of each token: ((a id + b) mod p) mod buckets."""
        # folded to 31 bits first, so that the product of two stays within int64
        folded = torch.remainder(tokens, _MODULUS).unsqueeze(-1)
        mixed = torch.remainder(folded * self.multipliers + self.offsets, _MODULUS)
        return torch.remainder(mixed, self.buckets)


class TextCNN(nn.Module):
    """Hash embedding, parallel convolutions, maximum over time, one linear layer.

    The sentence classifier of Kim 2014 (section 2) over hashed words. Padding never reaches
    the result: a text gives the same logits however far its batch is padded.

    Args:
        classes: number of classes.
        width: of the word vectors.
        filters: channels of each convolution.
        kernels: window lengths in tokens, all odd, so that windows are centred.
        buckets: rows of the embedding table.
        hashes: hash functions of the embedding.
        dropout: before the linear layer, in [0, 1).

    Attributes:
        taps: name to module path: "embed", the word vectors (B, L, width).

    Raises:
        ModelError: a setting out of range.
    """

    taps = {"embed": "embedding"}  # noqa: RUF012

    def __init__(
        self,
        classes: int,
        width: int = 64,
        filters: int = 96,
        kernels: Sequence[int] = (1, 3, 5),
        buckets: int = 4096,
        hashes: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ModelError(f"the kernels of a text CNN are odd and >= 1, got {tuple(kernels)}")
        if min(classes, filters) < 1 or not 0.0 <= dropout < 1.0:
            raise ModelError(
                "a text CNN needs classes >= 1, filters >= 1 and dropout in [0, 1), got "
                f"{classes}, {filters}, {dropout}"
            )
        self.embedding = HashEmbedding(width, buckets, hashes)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, filters, k, padding=k // 2) for k in kernels
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(filters * len(kernels), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores.

        Args:
            tokens: (B, L) int64 token ids, padded with 0.

        Returns:
            Logits (B, classes).
        """
        words = self.embedding(tokens).transpose(1, 2)
        absent = (tokens == PADDING).unsqueeze(1)
        # after ReLU 0 is the least value, so padded positions never win the maximum
        pooled = [
            F.relu(convolution(words)).masked_fill(absent, 0.0).amax(-1)
            for convolution in self.convolutions
        ]
        logits: Tensor = self.classifier(self.dropout(torch.cat(pooled, 1)))
        return logits


# As recipes call it.
text_cnn = TextCNN
