"""How the rows of a linear classifier stand to each other: neural collapse in a head.

At the end of training a good head's centred rows form a simplex: equal norms, and every pair
at the cosine -1 / (K - 1) (Papyan et al. 2020). A head pulled by losses that disagree does not
reach it (DHKD, Yang et al. 2025, whose analysis of one shared head this follows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import ModelError


def head_geometry(weight: Tensor) -> dict[str, float]:
    """Figures of a head's weight.

    Args:
        weight: (K, d) of the last linear layer, K >= 2 classes.

    Returns:
        head_cosine: mean cosine over pairs of rows, after their mean row is taken off;
            -1 / (K - 1) for a simplex.
        head_cosine_spread: standard deviation of these cosines; 0 for a simplex.
        head_norm_spread: standard deviation of the centred rows' norms over their mean; 0 for
            a simplex.

    Raises:
        ModelError: fewer than two rows.
    """
    if weight.ndim != 2 or len(weight) < 2:
        raise ModelError(f"a head of at least two classes is needed, not {tuple(weight.shape)}")
    rows = weight.detach().double()
    rows = rows - rows.mean(0)
    norms = rows.norm(dim=1)
    unit = rows / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    cosines = unit @ unit.T
    pairs = cosines[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]
    spread = norms.std(correction=0) / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
    return {
        "head_cosine": float(pairs.mean()),
        "head_cosine_spread": float(pairs.std(correction=0)),
        "head_norm_spread": float(spread),
    }
