"""A classifier that keeps a second head: one module that answers by the mix of both."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.net import Net
from stillhouse.parts.heads import CosineHead, ExtraHead
from stillhouse.parts.mixing import mix_probabilities

KINDS = ("linear", "cosine")


class TwoHeads(nn.Module):
    """A model, a second head on the features of its last linear layer, and how both are mixed.

    Gives {"logits": log of the mixed probabilities, "ce": logits of the model's own head, "kd":
    logits of the second}, each (B, classes). Softmax of "logits" is the mix itself.

    Args:
        module: a classifier.
        head: path of its last linear layer; found by `find_head` when empty.
        kind: of the second head: "linear", or "cosine" (see `CosineHead`).
        scale: of a cosine head.
        copy: the second head begins as the first, not drawn anew.
        generator: CPU generator of the second head's weights.

    Attributes:
        mix: (2,) alpha and beta; see `mix_probabilities`. Saved with the weights.
        reads: the view of a batch that the model is called on.

    Raises:
        ModelError: no linear layer at `head`.
        RecipeError: an unknown kind.
    """

    mix: Tensor

    def __init__(
        self,
        module: nn.Module,
        head: str = "",
        kind: Literal["linear", "cosine"] = "linear",
        scale: float = 100.0,
        *,
        copy: bool = False,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of second head '{kind}'{nearest(kind, KINDS)}")
        self.net = Net(module, head=head or None)
        first = self.net.head_layer()
        self.net.add_tap("head:input")
        self.kind, self.scale = kind, scale
        self.second: ExtraHead | CosineHead
        if kind == "linear":
            self.second = ExtraHead(first, generator=generator)
        else:
            self.second = CosineHead(first, scale, generator=generator)
        if copy:
            self._copy(first)
        self.register_buffer("mix", torch.tensor([0.5, 0.5], device=first.weight.device))
        self.reads = str(getattr(module, "reads", "x"))

    def _copy(self, first: nn.Linear) -> None:
        own = self.second.net
        assert isinstance(own, nn.Linear)
        with torch.no_grad():
            own.weight.copy_(first.weight)
            own.bias.copy_(torch.zeros_like(own.bias) if first.bias is None else first.bias)

    @property
    def config(self) -> Any:
        """The configuration of a Hugging Face model inside; None for others."""
        return getattr(self.net.module, "config", None)

    def around(self) -> dict[str, Any]:
        """How this is built again around the model: keyword arguments."""
        return {"head": self.net.head(), "kind": self.kind, "scale": self.scale}

    def backbone(self) -> list[nn.Parameter]:
        """The trainable parameters below both heads."""
        head = {id(p) for p in self.net.head_layer().parameters()}
        return [p for p in self.net.parameters() if p.requires_grad and id(p) not in head]

    def set_mix(self, alpha: float, beta: float) -> None:
        """Mix from now on with `alpha` in [0, 1] and `beta` > 0.

        Raises:
            ModelError: out of range.
        """
        if not 0 <= alpha <= 1 or not beta > 0:
            raise ModelError(f"alpha lies in [0, 1] and beta above 0, not {alpha} and {beta}")
        self.mix.copy_(torch.tensor([alpha, beta]))

    def forward(self, view: Any) -> dict[str, Tensor]:
        """Logits of both heads, and of their mix."""
        out = self.net(view)
        if out["logits"].shape[-1] != self.net.head_layer().out_features:
            raise ModelError(
                f"{type(self.net.module).__name__} gives {out['logits'].shape[-1]} logits, its "
                f"last linear layer '{self.net.head()}' {self.net.head_layer().out_features}: name "
                "the layer with student: {taps: {'head:input': 'module.path:input'}}"
            )
        first, second = out["logits"], self.second(out["taps"]["head:input"])
        mixed = mix_probabilities(first, second, alpha=self.mix[0], beta=self.mix[1])
        tiny = torch.finfo(mixed.dtype).tiny
        return {"logits": mixed.clamp_min(tiny).log(), "ce": first, "kd": second}
