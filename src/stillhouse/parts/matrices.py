"""Whitening, projection, components, clustering: closed forms on matrices of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stillhouse.errors import DataError, ModelError

_EPSILON = torch.finfo(torch.float64).eps
_CHUNK = 4096  # rows per block of a covariance or distance, to bound memory


@dataclass(frozen=True)
class ZCA:
    """ZCA whitening: `z = (x - mean) @ matrix` on flattened samples.

    With the covariance `U diag(s) U^T` of the training samples (divided by N - 1) the matrix
    is `U diag(1 / sqrt(s + eps)) U^T`; eps stands inside the root, as in the released code of
    trajectory matching (Cazenavette et al., CVPR 2022). Fit on training images in [0, 1],
    without mean/std normalisation before, and apply to every split.

    Attributes:
        mean: (d,).
        matrix: (d, d), symmetric.
        inverse_matrix: (d, d), `U diag(sqrt(s + eps)) U^T`.
    """

    mean: Tensor
    matrix: Tensor
    inverse_matrix: Tensor

    @classmethod
    def fit(cls, samples: Tensor, *, eps: float = 0.1) -> ZCA:
        """Fits on `samples` (N, ...), flattened to (N, d); computed in float64.

        Raises:
            DataError: fewer than two samples, or values that are not finite.
        """
        flat = samples.flatten(1)
        if len(flat) < 2:
            raise DataError(f"ZCA needs at least 2 samples, got {len(flat)}")
        # Block by block: float64 copies of a whole training set would not fit.
        mean = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        for block in torch.split(flat, _CHUNK):
            mean += block.double().sum(0)
        mean /= len(flat)
        if not torch.isfinite(mean).all():
            raise DataError("ZCA: the samples hold values that are not finite")
        scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=flat.device)
        for block in torch.split(flat, _CHUNK):
            centred = block.double() - mean
            scatter.addmm_(centred.T, centred)
        values, vectors = torch.linalg.eigh(scatter / (len(flat) - 1))
        # The smallest eigenvalues of a singular covariance may come out just below zero.
        root = (values.clamp_min(0.0) + eps).sqrt()
        dtype = samples.dtype if samples.is_floating_point() else torch.float32
        return cls(
            mean.to(dtype),
            ((vectors / root) @ vectors.T).to(dtype),
            ((vectors * root) @ vectors.T).to(dtype),
        )

    def transform(self, samples: Tensor) -> Tensor:
        """Whitened samples, in the shape that came in; differentiable.

        Raises:
            DataError: samples of another size than the fitted ones.
        """
        flat = self._flat(samples)
        white = (flat - self.mean.to(flat)) @ self.matrix.to(flat)
        return white.reshape(samples.shape)

    def inverse(self, samples: Tensor) -> Tensor:
        """Samples whose whitening gives `samples`; undoes `transform`."""
        flat = self._flat(samples)
        back = flat @ self.inverse_matrix.to(flat) + self.mean.to(flat)
        return back.reshape(samples.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The state, to be stored; `from_tensors` takes it back."""
        return {"mean": self.mean, "matrix": self.matrix, "inverse_matrix": self.inverse_matrix}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ZCA:
        """A ZCA from what `tensors` gave."""
        return cls(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])

    def _flat(self, samples: Tensor) -> Tensor:
        flat = samples.flatten(1)
        if flat.shape[1] != len(self.mean):
            raise DataError(
                f"ZCA was fitted on samples of {len(self.mean)} values; these have "
                f"{flat.shape[1]} (shape {tuple(samples.shape)})"
            )
        return flat


@dataclass(frozen=True)
class Nullspace:
    """The space that a linear layer does not see, given by an orthonormal basis of what it sees.

    Attributes:
        basis: (d, r) float64, orthonormal columns that span the rows of the layer; r may be 0.
    """

    basis: Tensor

    @property
    def rank(self) -> int:
        """Dimensions that are removed, r."""
        return self.basis.shape[1]

    def apply(self, samples: Tensor) -> Tensor:
        """Samples (..., d) without their part in the layer's row space; in their own dtype.

        Raises:
            ModelError: samples of another width.
        """
        if samples.shape[-1] != len(self.basis):
            raise ModelError(
                f"the layer reads {len(self.basis)} numbers per sample, these have "
                f"{samples.shape[-1]} (shape {tuple(samples.shape)})"
            )
        basis = self.basis.to(samples)
        return samples - (samples @ basis) @ basis.T

    def projector(self) -> Tensor:
        """(d, d) float64, the matrix of `apply`."""
        eye = torch.eye(len(self.basis), dtype=self.basis.dtype, device=self.basis.device)
        return eye - self.basis @ self.basis.T


def nullspace(weight: Tensor, *, centred: bool = True) -> Nullspace:
    """The null space of a linear layer, as a softmax or as plain outputs see it.

    Args:
        weight: (K, d), the layer's rows.
        centred: subtract the mean row first: a softmax depends on differences of rows alone,
            so the rank is at most K - 1. Without it all rows count, and it is at most K.

    Raises:
        ModelError: not a matrix, or values that are not finite.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ModelError(
            f"a null space is taken of a finite matrix (K, d), not of shape {tuple(weight.shape)}"
        )
    rows = weight.detach().double()
    if centred:
        rows = rows - rows.mean(0)
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    # Measured against the rows as they came: centring equal rows leaves rounding, no direction.
    scale = torch.linalg.matrix_norm(weight.detach().double(), 2)
    kept = values > scale * max(rows.shape) * torch.finfo(weight.dtype).eps
    return Nullspace(right[kept].T.contiguous())


@dataclass(frozen=True)
class ClassPCA:
    """Principal components of each class on its own, float64.

    Attributes:
        mean: (C, d); 0 for a class without samples.
        directions: (C, d, S), orthonormal columns by falling variance, the entry of largest
            size positive; columns beyond `used` are 0.
        values: (C, S) their variances (covariance divided by n); 0 beyond `used`.
        used: (C,) int64, directions that carry variance, at most min(S, n_c - 1).
        count: (C,) int64, samples n_c of each class.
        total: (C,) variance of the class over all d dimensions.
    """

    mean: Tensor
    directions: Tensor
    values: Tensor
    used: Tensor
    count: Tensor
    total: Tensor


def class_pca(samples: Tensor, groups: Tensor, classes: int, directions: int) -> ClassPCA:
    """The leading principal components of each class, computed in float64.

    Where a class has fewer samples than dimensions, its samples are decomposed and no d x d
    matrix is made.

    Args:
        samples: (N, d).
        groups: (N,) int64, the class of each sample, in [0, classes).
        classes: C.
        directions: S, components wanted per class.

    Raises:
        DataError: shapes that do not belong together, a class out of range, values that are
            not finite.
    """
    _check_groups(samples, groups, classes)
    width, device = samples.shape[1], samples.device
    mean = torch.zeros(classes, width, dtype=torch.float64, device=device)
    found = torch.zeros(classes, width, directions, dtype=torch.float64, device=device)
    values = torch.zeros(classes, directions, dtype=torch.float64, device=device)
    total = torch.zeros(classes, dtype=torch.float64, device=device)
    used = torch.zeros(classes, dtype=torch.int64, device=device)
    count = torch.bincount(groups, minlength=classes)
    for c in range(classes):
        own = (groups == c).nonzero().squeeze(1)
        if len(own) == 0:
            continue
        mean[c], variances, vectors = _components(samples, own)
        total[c] = variances.sum()
        # Rounding of the samples, and of the decomposition, leaves variances of this size.
        larger = max(len(own), width)
        rounding = max((larger * torch.finfo(samples.dtype).eps) ** 2, larger * _EPSILON)
        least = variances[0] * rounding
        most = min(directions, len(own) - 1, int((variances > least).sum()))
        used[c] = most
        values[c, :most] = variances[:most]
        found[c, :, :most] = signed(vectors[:, :most])
    return ClassPCA(mean, found, values, used, count, total)


def _check_groups(samples: Tensor, groups: Tensor, classes: int) -> None:
    if samples.ndim != 2 or groups.shape != samples.shape[:1]:
        raise DataError(
            f"samples (N, d) with one class each are needed, not {tuple(samples.shape)} and "
            f"{tuple(groups.shape)}"
        )
    least, largest = (int(groups.min()), int(groups.max())) if len(groups) else (0, 0)
    if least < 0 or largest >= classes:
        raise DataError(
            f"the classes of the samples lie in {least}..{largest}; there are {classes}, "
            "numbered from 0"
        )
    if not torch.isfinite(samples).all():
        row = int((~torch.isfinite(samples)).any(1).nonzero()[0])
        raise DataError(f"sample {row} holds values that are not finite")


def _components(samples: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), variances by falling size, and their directions as columns."""
    mean = torch.zeros(samples.shape[1], dtype=torch.float64, device=samples.device)
    for block in torch.split(own, _CHUNK):
        mean += samples.index_select(0, block).double().sum(0)
    mean /= len(own)
    if len(own) <= samples.shape[1]:
        centred = samples.index_select(0, own).double() - mean
        _, sizes, right = torch.linalg.svd(centred, full_matrices=False)
        return mean, sizes.square() / len(own), right.T
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=samples.device)
    for block in torch.split(own, _CHUNK):
        centred = samples.index_select(0, block).double() - mean
        scatter.addmm_(centred.T, centred)
    variances, vectors = torch.linalg.eigh(scatter / len(own))
    return mean, variances.flip(0).clamp_min(0.0), vectors.flip(1)


def signed(vectors: Tensor) -> Tensor:
    """Columns (d, k) turned so that the entry of largest size in each is positive."""
    if vectors.shape[1] == 0:
        return vectors
    largest = vectors.abs().argmax(0, keepdim=True)
    turned: Tensor = vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return turned


def random_rotation(size: int, *, generator: Generator) -> Tensor:
    """A random orthonormal matrix (size, size) float64, uniform over the orthogonal group.

    The QR decomposition of a Gaussian matrix, with the signs fixed so that R's diagonal is
    positive (Mezzadri 2007).

    Args:
        size: >= 1.
        generator: CPU generator; it moves on.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


@dataclass(frozen=True)
class Clusters:
    """What `kmeans` found.

    Attributes:
        centres: (k, d).
        labels: (N,) int64, the cluster of each sample.
        inertia: sum of squared distances to the own centre.
    """

    centres: Tensor
    labels: Tensor
    inertia: float

    def nearest_samples(self, samples: Tensor) -> Tensor:
        """(k,) int64 numbers of the sample nearest to each centre, all different.

        Each is searched among the cluster's own samples, so no two centres share one.
        """
        distance = _squared_distance(samples.flatten(1), self.centres)
        foreign = self.labels[:, None] != torch.arange(len(self.centres), device=samples.device)
        return distance.masked_fill(foreign, float("inf")).argmin(0)


def kmeans(
    samples: Tensor, k: int, *, generator: Generator, rounds: int = 100, restarts: int = 3
) -> Clusters:
    """Lloyd's k-means with k-means++ seeding; a pure function of samples and generator.

    A cluster that loses all its samples takes the sample farthest from its own centre.

    Args:
        samples: (N, ...), flattened.
        k: number of clusters, at most N.
        generator: CPU generator of the seeding; it moves on.
        rounds: most iterations per restart.
        restarts: number of seedings; the result of least inertia is kept.

    Raises:
        DataError: k is not in 1..N.
    """
    flat = samples.detach().flatten(1)
    if not flat.is_floating_point():
        flat = flat.float()
    if not 1 <= k <= len(flat):
        raise DataError(f"k-means: k must be in 1..{len(flat)} (the samples), got {k}")
    best: Clusters | None = None
    for _ in range(max(1, restarts)):
        found = _lloyd(flat, _plus_plus(flat, k, generator), rounds)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def k_centre(samples: Tensor, k: int, *, generator: Generator) -> Tensor:
    """Greedy k-centre selection: each new sample is the farthest from those chosen.

    Args:
        samples: (N, ...), flattened.
        k: how many to choose, at most N.
        generator: CPU generator that draws the first sample; it moves on.

    Returns:
        (k,) int64 sample numbers, all different, in the order of choice.

    Raises:
        DataError: k is not in 1..N.
    """
    flat = samples.detach().flatten(1)
    if not 1 <= k <= len(flat):
        raise DataError(f"k-centre: k must be in 1..{len(flat)} (the samples), got {k}")
    chosen = [int(torch.randint(len(flat), (1,), generator=generator))]
    distance = _squared_distance(flat, flat[chosen]).squeeze(1)
    while len(chosen) < k:
        distance[chosen[-1]] = -1.0  # never again, even where samples coincide
        chosen.append(int(distance.argmax()))
        newest = _squared_distance(flat, flat[chosen[-1:]]).squeeze(1)
        distance = torch.minimum(distance, newest)
    return torch.tensor(chosen, device=samples.device)


def _plus_plus(samples: Tensor, k: int, generator: Generator) -> Tensor:
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    chosen = [min(int(draws[0] * len(samples)), len(samples) - 1)]
    distance = _squared_distance(samples, samples[chosen]).squeeze(1)
    for draw in draws[1:]:
        mass = distance.double().cumsum(0)
        if float(mass[-1]) > 0.0:
            spot = torch.searchsorted(mass, mass[-1:] * draw, right=True)
            index = min(int(spot), len(samples) - 1)
        else:  # fewer different samples than centres: take any that is free
            index = next(i for i in range(len(samples)) if i not in chosen)
        chosen.append(index)
        newest = _squared_distance(samples, samples[index : index + 1]).squeeze(1)
        distance = torch.minimum(distance, newest)
    return samples[chosen].clone()


def _lloyd(samples: Tensor, centres: Tensor, rounds: int) -> Clusters:
    labels = torch.full((len(samples),), -1, dtype=torch.int64, device=samples.device)
    for _ in range(rounds):
        distance = _squared_distance(samples, centres)
        moved = _without_empty(distance, distance.argmin(1))
        if torch.equal(moved, labels):
            break
        labels = moved
        centres = _means(samples, labels, len(centres))
    own = (samples - centres[labels]).double().square().sum()
    return Clusters(centres, labels, float(own))


def _without_empty(distance: Tensor, labels: Tensor) -> Tensor:
    counts = torch.bincount(labels, minlength=distance.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():
        own = distance.gather(1, labels[:, None]).squeeze(1).clone()
        own[counts[labels] < 2] = -1.0  # taking the last sample would empty another cluster
        index = int(own.argmax())
        counts[labels[index]] -= 1
        labels[index] = empty
        counts[empty] += 1
    return labels


def _means(samples: Tensor, labels: Tensor, k: int) -> Tensor:
    # A one-hot product rather than index_add: the latter is not deterministic on GPUs.
    member = torch.nn.functional.one_hot(labels, k).to(samples)
    return (member.T @ samples) / member.sum(0)[:, None]


def _squared_distance(samples: Tensor, centres: Tensor) -> Tensor:
    """(N, k); exact differences for few centres, since they are compared with each other."""
    blocks = [
        torch.cdist(b, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
        for b in torch.split(samples, _CHUNK)
    ]
    return torch.cat(blocks)
