"""How well a model answers on classes that it was never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stillhouse.errors import DataError
from stillhouse.metrics.classification import Summed, labelled


class Unseen(Summed):
    """Accuracy on the rows of some classes, and on the rest.

    Args:
        classes: numbers of the classes that were never shown.

    Raises:
        DataError: none is named.
    """

    def __init__(self, classes: Sequence[int]) -> None:
        if not classes:
            raise DataError("no class is named as unseen")
        self.classes = tuple(classes)
        super().__init__(4)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in; see `classification.labelled`."""
        logits, target = labelled(out, batch)
        unseen = torch.isin(target, torch.tensor(self.classes, device=target.device))
        right = logits.argmax(-1) == target
        self.add(
            torch.stack([(right & unseen).sum(), unseen.sum(), (right & ~unseen).sum(),
                         (~unseen).sum()])
        )  # fmt: skip

    def compute(self) -> dict[str, float]:
        """`unseen_accuracy` and `seen_accuracy`; NaN where there are no such rows."""
        right, rows, right_else, rows_else = self.numbers()
        return {
            "unseen_accuracy": right / rows if rows else float("nan"),
            "seen_accuracy": right_else / rows_else if rows_else else float("nan"),
        }
