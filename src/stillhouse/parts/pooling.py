"""From one vector per token to one vector per text."""

from __future__ import annotations

from torch import Tensor


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens (MEAN of Sentence-BERT, Reimers and Gurevych 2019, section 3).

    Args:
        states: (B, L, D); what stands at padding has no effect, as long as it is finite.
        mask: (B, L) true or 1 at real tokens, at least one in each row.

    Returns:
        (B, D).
    """
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)
