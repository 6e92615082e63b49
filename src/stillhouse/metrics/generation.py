"""Figures of generated images, by what an independent classifier makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse.errors import DataError


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    r"""The Fréchet distance of two sets of features, each taken as a normal distribution.

    .. math::
        \| \mu_1 - \mu_2 \|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2
        - 2 (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})

    The product is that of Heusel et al. 2017; in this symmetric form its root needs eigenvalues
    of symmetric matrices only. Small sets have a bias upwards: compare equal sizes.

    Args:
        ours: (n, D), n >= 2.
        theirs: (m, D), m >= 2.

    Raises:
        DataError: fewer than two rows, or another number of features.
    """
    if ours.ndim != 2 or theirs.ndim != 2 or ours.shape[1] != theirs.shape[1]:
        raise DataError(
            f"features of shape {tuple(ours.shape)} and {tuple(theirs.shape)}: two tables with "
            "equal columns are needed"
        )
    if min(len(ours), len(theirs)) < 2:
        raise DataError("a distribution needs two rows of features at least")
    one, other = ours.double(), theirs.double()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(one.T), torch.cov(other.T)
    first, second = (c.reshape(ours.shape[1], ours.shape[1]) for c in (first, second))
    root = _root(first)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2.0 * cross))


def _root(matrix: Tensor) -> Tensor:
    """The symmetric root of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def recognised(probabilities: Tensor, asked: Tensor) -> dict[str, float]:
    """How many images a classifier takes for the class that was asked for.

    Args:
        probabilities: (n, K) of each image.
        asked: (n,) classes.

    Returns:
        "accuracy", and "confidence": the mean of the highest probability.
    """
    right = (probabilities.argmax(1) == asked).float().mean()
    return {"accuracy": float(right), "confidence": float(probabilities.max(1).values.mean())}


def forgotten(probabilities: Tensor, asked: Tensor, forget: int) -> dict[str, float]:
    """What is left of a class in images that were asked for by every class.

    Args:
        probabilities: (n, K) of each image, by a classifier that knows every class.
        asked: (n,) the class that each image was asked for.
        forget: the class that should be gone.

    Returns:
        "ua" (unlearning accuracy: share of its images that are not taken for it), "accuracy" (of
        the other classes), "forgotten_probability" (of the class, on its images), "entropy" (in
        nats, of the classifier on its images), "confidence" (highest probability there: noise
        has little) and "leak" (largest share of another class's images that are taken for it).

    Raises:
        DataError: no image was asked for by that class, or none by another.
    """
    own = asked == forget
    if not bool(own.any()) or bool(own.all()):
        raise DataError(f"images of class {forget} and of others are needed")
    found = probabilities.argmax(1)
    gone = probabilities[own].double()
    entropy = -(gone * gone.clamp(min=1e-12).log()).sum(1)
    return {
        "ua": float((found[own] != forget).float().mean()),
        "accuracy": float((found[~own] == asked[~own]).float().mean()),
        "forgotten_probability": float(gone[:, forget].mean()),
        "entropy": float(entropy.mean()),
        "confidence": float(gone.max(1).values.mean()),
        "leak": max(taken_for(found, asked, forget, others_than(asked, forget))),
    }


def others_than(asked: Tensor, forget: int) -> list[int]:
    """The classes that occur beside one, in order."""
    return [c for c in sorted(set(asked.tolist())) if c != forget]


def taken_for(found: Tensor, asked: Tensor, wanted: int, conditions: Sequence[int]) -> list[float]:
    """For each condition, the share of its images that is taken for one class."""
    return [float((found[asked == c] == wanted).float().mean()) for c in conditions]
