"""How well a language model expects the tokens that come: loss, perplexity, accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from stillhouse.metrics.classification import sums
from stillhouse.parts.token_rows import response_items


class TokenLoss:
    """Mean cross-entropy of response tokens over a split, each token counting alike."""

    higher_is_better = False

    def __init__(self) -> None:
        self.kept = sums(3)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in: logits (B, L, V), `tokens` and `response_mask` (B, L)."""
        logits, tokens = response_items(out["logits"], batch)
        logits = logits.float()
        found = sums(3)
        found[0] = float(F.cross_entropy(logits, tokens, reduction="sum"))
        found[1] = int((logits.argmax(-1) == tokens).sum())
        found[2] = len(tokens)
        self.kept = self.kept + found

    def totals(self) -> Tensor:
        """Loss, right tokens, tokens."""
        return self.kept

    def take(self, totals: Tensor) -> None:
        """Replace them by those of all processes."""
        self.kept = totals.cpu()

    def compute(self) -> dict[str, float]:
        """`loss` in nats, `perplexity`, `token_accuracy`."""
        loss, right, count = self.kept.tolist()
        if not count:
            return {}
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {"loss": mean, "perplexity": perplexity, "token_accuracy": right / count}
