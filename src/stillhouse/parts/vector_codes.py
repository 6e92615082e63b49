"""Shorter forms of embedding vectors: fewer coordinates, a byte each, a bit each.

Whatever is done to documents must be done to queries: both sides take the same transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError

_LEVELS = 255
_UNIT = 1e-3


def truncate(vectors: Tensor, width: int) -> Tensor:
    """The first coordinates, scaled to unit length (Matryoshka truncation).

    Args:
        vectors: (..., D).
        width: number of coordinates m that are kept, in [1, D]; D keeps unit vectors as they are.

    Returns:
        (..., m).

    Raises:
        ModelError: a width that the vectors do not have.
    """
    return F.normalize(_first(vectors, width), dim=-1)


def prefix(vectors: Tensor, width: int) -> Tensor:
    """The first coordinates; those of unit vectors are scaled to unit length again.

    The length of vectors that are compared by inner product carries meaning and is left alone.

    Args:
        vectors: (B, D).
        width: see `truncate`.
    """
    kept = _first(vectors, width)
    unit = (vectors.norm(dim=-1, keepdim=True) - 1.0).abs() < _UNIT
    return torch.where(unit, F.normalize(kept, dim=-1), kept)


def _first(vectors: Tensor, width: int) -> Tensor:
    if not 1 <= width <= vectors.shape[-1]:
        raise ModelError(
            f"{width} coordinates cannot be kept of vectors that have {vectors.shape[-1]}"
        )
    return vectors[..., :width]


@dataclass(frozen=True)
class ByteRange:
    """A byte per coordinate: codes 0 to 255 between each coordinate's least and largest value.

    Codes are rounded to the nearest, and clipped outside the range. (The quantiser of
    sentence-transformers cuts off instead, which doubles the worst error, and wraps outside.)

    Attributes:
        low: (D,) least values.
        step: (D,) distance of two codes; 0 for a coordinate that never changes.
    """

    low: Tensor
    step: Tensor

    @classmethod
    def of(cls, documents: Tensor) -> ByteRange:
        """The range of a sample of documents (N, D)."""
        low, high = documents.amin(0), documents.amax(0)
        return cls(low, (high - low) / _LEVELS)

    def codes(self, vectors: Tensor) -> Tensor:
        """(N, D) uint8."""
        step = torch.where(self.step > 0, self.step, 1.0)
        return ((vectors - self.low) / step).round().clamp(0, _LEVELS).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (N, D) stand for; at most half a step off within the range."""
        return self.low + codes.to(self.step.dtype) * self.step


def signs(vectors: Tensor) -> Tensor:
    """A bit per coordinate: true where it is above 0."""
    return vectors > 0


def hamming(queries: Tensor, documents: Tensor) -> Tensor:
    """How many bits differ.

    Args:
        queries: (Q, D) bool.
        documents: (N, D) bool.

    Returns:
        (Q, N) int64.
    """
    a, b = queries.double(), documents.double()
    return (a.sum(1)[:, None] + b.sum(1)[None] - 2 * (a @ b.T)).round().long()


def rescored(queries: Tensor, documents: Tensor) -> Tensor:
    """Whole queries against the signs of documents, +1 and -1.

    Args:
        queries: (Q, D).
        documents: (N, D) bool.

    Returns:
        (Q, N).
    """
    return queries @ (documents.to(queries.dtype) * 2 - 1).T
