"""Classification of every token of a text: two classes, kept or dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.batch import Splits
from stillhouse.errors import ModelError
from stillhouse.losses.sequence import token_cross_entropy
from stillhouse.metrics.tagging import TokenFigures
from stillhouse.net import Net, Output
from stillhouse.task import Metric, Task


class TagNet(Net):
    """A token classifier that is called on one tensor of padded rows.

    Hugging Face models are called with `input_ids` and the attention mask that their padding
    id implies; other modules with the rows as they are.
    """

    def _call(self, view: Any) -> Any:
        config = getattr(self.module, "config", None)
        pad = getattr(config, "pad_token_id", None)
        if config is None or not isinstance(view, Tensor):
            return super()._call(view)
        if pad is None:
            raise ModelError(
                f"{type(self.module).__name__} has no padding id (config.pad_token_id), so padded "
                "rows cannot be told from text"
            )
        return self.module(input_ids=view, attention_mask=(view != pad).long())


class TokenClassification(Task):
    """One label per token.

    Rows of the data are texts (a view "text"); methods make training rows of them: "x"
    (B, L) or (B, L, c) int64 and `target` (B, L) int64 with -100 where there is no label.

    Attributes:
        row: (1, L) or (1, L, c), left by the method that made rows, to measure size and speed.
    """

    name: ClassVar[str] = "token-classification"
    main_metric: ClassVar[str] = "auc"

    def __init__(self, splits: Splits) -> None:
        super().__init__(splits)
        self.row: Tensor | None = None

    def example_view(self, view: str = "x") -> Any:
        """A row as the student reads it, once a method has made rows; else None."""
        return self.row

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a token classifier."""
        return TagNet(module, answer="logits", taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy, the mean over labelled tokens."""
        return {"task": token_cross_entropy(out["logits"], batch["target"])}

    def metrics(self) -> Mapping[str, Metric]:
        """AUC, F1 and accuracy over labelled tokens."""
        return {"tokens": TokenFigures()}

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse a model that does not give two logits per token."""
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net)

    def _check_net(self, role: str, net: Net) -> None:
        name = type(net.module).__name__
        reader = getattr(net.module, "reader", None)
        view = reader.join([reader.read("A text.").codes]) if reader else torch.tensor([[5, 6, 7]])
        try:
            logits = net.tried(view).get("logits")
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(f"the {role} {name} cannot read rows of tokens: {error}") from error
        wanted = (*view.shape[:2], 2)
        if logits is None or tuple(logits.shape) != wanted:
            found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise ModelError(
                f"the {role} {name} gives {found} for rows of shape {tuple(view.shape)}; a token "
                f"classifier with two classes gives {wanted} (Hugging Face: options: "
                "{task: token-classification, num_labels: 2})"
            )
