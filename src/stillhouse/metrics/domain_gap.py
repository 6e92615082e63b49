"""How far apart the domains of several holders lie, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from stillhouse.errors import DataError
from stillhouse.losses.distributions import mmd_rbf


@torch.no_grad()
def domain_gap(
    features: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    *,
    bandwidth: float | None = None,
) -> float:
    """Mean over classes and pairs of holders of the squared MMD between a class's features.

    The unbiased form of `mmd_rbf`: of a few random rows it tells, on average, what all rows
    tell, where the biased form would call small samples of one domain far apart. So it may be
    negative. Compare under one bandwidth.

    Args:
        features: (N_k, D) of each holder.
        labels: (N_k,) of each.
        classes: number of classes.
        bandwidth: of the kernels' middle; none: each pair's own, which hides scale.

    Raises:
        DataError: no class that two holders have.
    """
    found = []
    for label in range(classes):
        own = [f[y == label] for f, y in zip(features, labels, strict=True)]
        own = [rows for rows in own if len(rows)]
        found += [mmd_rbf(a, b, bandwidth=bandwidth, biased=False) for a, b in combinations(own, 2)]
    if not found:
        raise DataError("a domain gap needs a class that two holders have")
    return float(torch.stack(found).mean())


def mean_squared_distance(features: Sequence[Tensor]) -> float:
    """Of different rows of all holders together: a bandwidth for `domain_gap`."""
    rows = torch.cat(list(features)).double()
    spread = (rows - rows.mean(0)).square().sum() / (len(rows) - 1)
    return float(2.0 * spread)
