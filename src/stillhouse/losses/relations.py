"""Losses on relations between samples; pure functions of tensors, student first.

Relations need no common width: each side's vectors are compared among themselves only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.losses.chunked import wide


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of pairwise distances (Park et al., CVPR 2019, equations 5 to 7).

    Euclidean distances of all pairs, relative to their mean within the batch, compared by
    Huber's loss of threshold 1.

    Args:
        student: (B, d), B >= 2.
        teacher: (B, D).

    Returns:
        A scalar, the mean over ordered pairs (a sample with itself counts as 0, as in the
        released code).

    Raises:
        ModelError: no two vectors, or other numbers of them.
    """
    _check(student, teacher, 2)
    return F.smooth_l1_loss(_distances(wide(student)), _distances(wide(teacher)))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational distillation of the angles of all triples (Park et al., equations 8 to 9).

    The cosine of the angle at each sample between the directions to every two others,
    compared by Huber's loss of threshold 1.

    Args:
        student: (B, d), B >= 3. Memory grows with B cubed.
        teacher: (B, D).

    Returns:
        A scalar, the mean over ordered triples (degenerate ones count as 0).

    Raises:
        ModelError: fewer than three vectors, or other numbers of them.
    """
    _check(student, teacher, 3)
    return F.smooth_l1_loss(_angles(wide(student)), _angles(wide(teacher)))


def gram(features: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Cosines between the vectors of each item.

    Args:
        features: (..., P, C), P vectors an item.
        eps: added to each vector's norm before it is divided by it.

    Returns:
        (..., P, P).
    """
    unit = features / (torch.linalg.vector_norm(features, dim=-1, keepdim=True) + eps)
    cosines: Tensor = unit @ unit.transpose(-1, -2)
    return cosines


def similarity_matrix(student: Tensor, teacher: Tensor, *, normalised: bool = False) -> Tensor:
    """Squared difference of the cosines of all pairs, the mean over ordered pairs.

    Blind to a rotation of either side: what is learned so has a teacher's geometry, not its
    coordinates, and cannot be compared with the teacher's own vectors.

    Args:
        student: (B, d).
        teacher: (B, D), no gradient.
        normalised: the rows have unit length already; they are scaled to it otherwise.

    Returns:
        A scalar; a vector with itself counts too, as 0.

    Raises:
        ModelError: other numbers of vectors.
    """
    _check(student, teacher, 1)
    own, other = wide(student), wide(teacher.detach())
    if not normalised:
        own, other = F.normalize(own, dim=-1), F.normalize(other, dim=-1)
    return (own @ own.T - other @ other.T).square().mean()


def _check(student: Tensor, teacher: Tensor, least: int) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ModelError(
            f"relations are taken of vectors (B, d) and (B, D), not of {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if len(student) < least:
        raise ModelError(f"relations of {least} samples are asked of a batch of {len(student)}")


def _distances(vectors: Tensor) -> Tensor:
    """(B, B) distances, relative to the mean of those above 0."""
    squared = (vectors[:, None] - vectors[None]).square().sum(-1)
    apart = squared > 0
    # The root has no gradient at 0, where a vector meets itself.
    distances = torch.where(apart, squared, 1.0).sqrt() * apart
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / mean.clamp(min=1e-12)


def _angles(vectors: Tensor) -> Tensor:
    """(B, B, B) cosines at the first sample between the directions to the two others."""
    directions = F.normalize(vectors[None] - vectors[:, None], dim=-1)
    return directions @ directions.transpose(1, 2)
