"""Losses over sequences of tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError

IGNORED = -100


def token_cross_entropy(logits: Tensor, labels: Tensor, *, ignored_as: int | None = None) -> Tensor:
    """Mean cross-entropy over labelled tokens.

    Args:
        logits: (B, L, K).
        labels: (B, L) int64 in [0, K), -100 where there is none (specials, padding).
        ignored_as: count unlabelled tokens as this class instead of leaving them out, so the
            mean is over all B x L (what LLMLingua-2's released training does, with class 0).

    Returns:
        A scalar; NaN when no token is labelled. float32 for narrower logits.

    Raises:
        ModelError: shapes that do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ModelError(
            f"token logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; "
            "labels must have one entry per token"
        )
    wide = logits if logits.dtype.itemsize > 4 else logits.float()
    if ignored_as is not None:
        labels = labels.masked_fill(labels == IGNORED, ignored_as)
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
