"""Heads on the features of a student: further ones beside its own, and wider ones in its place."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.losses.chunked import wide
from stillhouse.net import Net
from stillhouse.parts.single_row import rows_through

KINDS = ("linear", "nonlinear")
BACKGROUNDS = ("free", "unit")


class ExtraHead(nn.Module):
    """A second classifier on the features that feed a student's last linear layer.

    "linear": Linear(width, classes). "nonlinear": Linear(width, hidden) - Dropout -
    BatchNorm1d - ReLU - Linear(hidden, classes), in this order (DHKD, Yang et al. 2025, and
    penghui-yang/DHKD models/classifier.py). It takes the same feature tensor as the main
    head, not detached, and leaves with the objective at export.

    Weights are drawn as `nn.Linear` draws them.

    Args:
        source: the main head, whose widths, device and dtype are taken over, or
            (in_features, out_features).
        kind: "linear" or "nonlinear".
        hidden: width of the hidden layer of the non-linear kind, >= 1.
        dropout: of the non-linear kind, in [0, 1).
        generator: CPU generator of the weights; the default generator when None.

    Raises:
        ModelError: `source` is neither a linear layer nor a pair of positive widths.
        RecipeError: an unknown kind or a setting out of range.
    """

    def __init__(
        self,
        source: nn.Linear | tuple[int, int],
        kind: Literal["linear", "nonlinear"] = "linear",
        *,
        hidden: int = 200,
        dropout: float = 0.1,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise RecipeError(f"unknown kind of head '{kind}'{nearest(kind, KINDS)}")
        if hidden < 1 or not 0.0 <= dropout < 1.0:
            raise RecipeError(
                f"a head needs hidden >= 1 and dropout in [0, 1), got {hidden} and {dropout}"
            )
        self.in_features, self.out_features = _widths(source)
        self.kind = kind
        self.net: nn.Module
        if kind == "linear":
            self.net = _linear(self.in_features, self.out_features, generator)
        else:
            self.net = nn.Sequential(
                _linear(self.in_features, hidden, generator),
                nn.Dropout(dropout),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                _linear(hidden, self.out_features, generator),
            )
        if isinstance(source, nn.Linear):
            self.to(device=source.weight.device, dtype=source.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the extra head.

        Args:
            features: (..., in_features), the input of the main head. BatchNorm takes its
                statistics over all leading dimensions; a single row's are the running ones.

        Returns:
            (..., out_features).

        Raises:
            ModelError: the width is not `in_features`.
        """
        if features.shape[-1] != self.in_features:
            raise ModelError(
                f"the extra head expects features of width {self.in_features}, got shape "
                f"{tuple(features.shape)}: tap the input of the last linear layer"
            )
        rows = features.reshape(-1, self.in_features)
        net = self.net
        logits: Tensor = rows_through(net, rows) if isinstance(net, nn.Sequential) else net(rows)
        return logits.reshape(*features.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Kind and widths, for printing."""
        return f"kind={self.kind}, {self.in_features} -> {self.out_features}"


class WideHead(nn.Module):
    """A classifier with several outputs per class, folded into one logit per class.

    Its linear layer gives C * S joint logits g, that of class c and subclass s at c * S + s.
    What leaves the head is their log-sum-exp over the subclasses, whose softmax is exactly the
    summed probability of each class (LELP, Loo et al. 2024, inference). So a network with this
    head in the place of its own is a classifier of C classes for whoever calls it; a loss on
    the joint logits taps the layer `wide`. No linear layer of C outputs says the same: the
    fold stays in the deployed network.

    Weights are drawn as `nn.Linear` draws them.

    Args:
        source: the head that is replaced, whose widths, device and dtype are taken over, or
            (in_features, classes).
        subclasses: S >= 1 outputs per class; with 1 it is a linear head.
        generator: CPU generator of the weights; the default generator when None.

    Raises:
        ModelError: `source` is neither a linear layer nor a pair of positive widths.
        RecipeError: fewer than one output per class.
    """

    def __init__(
        self,
        source: nn.Linear | tuple[int, int],
        subclasses: int,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if subclasses < 1:
            raise RecipeError(f"a wide head needs at least 1 output per class, not {subclasses}")
        width, self.classes = _widths(source)
        self.subclasses = subclasses
        self.wide = _linear(width, self.classes * subclasses, generator)
        if isinstance(source, nn.Linear):
            self.to(device=source.weight.device, dtype=source.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., classes) of features (..., in_features)."""
        return self.fold(self.wide(features), self.subclasses)

    @staticmethod
    def fold(joint: Tensor, subclasses: int) -> Tensor:
        """One logit per class: the log-sum-exp over its subclasses; float32 inside.

        Args:
            joint: (..., classes * subclasses), a class's subclasses side by side.
            subclasses: S.

        Returns:
            (..., classes); their softmax is the sum of the joint softmax over subclasses.

        Raises:
            ModelError: the last dimension is no multiple of S.
        """
        if joint.shape[-1] % subclasses:
            raise ModelError(
                f"joint logits of shape {tuple(joint.shape)} are no whole number of classes of "
                f"{subclasses} subclasses"
            )
        if subclasses == 1:
            return joint
        pairs = wide(joint).reshape(*joint.shape[:-1], -1, subclasses)
        folded: Tensor = pairs.logsumexp(-1)
        return folded.to(joint.dtype)

    def extra_repr(self) -> str:
        """Classes and subclasses, for printing."""
        return f"{self.classes} classes x {self.subclasses}"


def widen(module: nn.Module, head: str, subclasses: int) -> nn.Module:
    """Put a wide head in the place of a network's last linear layer, in place.

    Weights are drawn from the default generator. This is also how an artifact of a network
    with such a head is built again, see `stillhouse.artifact.altered`.

    Args:
        module: the network.
        head: path of its last linear layer.
        subclasses: outputs per class.

    Returns:
        The module.

    Raises:
        ModelError: no linear layer at that path.
    """
    try:
        old = module.get_submodule(head)
    except AttributeError:
        names = [name for name, found in module.named_modules() if isinstance(found, nn.Linear)]
        raise ModelError(
            f"{type(module).__name__} has no module '{head}'{nearest(head, names)}"
        ) from None
    if not isinstance(old, nn.Linear) or not head:
        raise ModelError(
            f"a wide head takes the place of a linear layer; '{head}' of "
            f"{type(module).__name__} is a {type(old).__name__}"
        )
    module.set_submodule(head, WideHead(old, subclasses))
    return module


def widen_net(net: Net, subclasses: int, tap: str) -> str:
    """`widen` a net and tap the joint logits; taps of the old head are taken to the new one.

    Args:
        net: changed in place.
        subclasses: outputs per class.
        tap: alias of the joint logits in the net's output.

    Returns:
        The path of the head, which now holds a `WideHead`.
    """
    head = net.head()
    net.place_head(WideHead(net.head_layer(), subclasses), linear="wide")
    net.add_tap(tap, f"{head}.wide")
    return head


def _widths(source: nn.Linear | tuple[int, int]) -> tuple[int, int]:
    if isinstance(source, nn.Linear):
        return source.in_features, source.out_features
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and all(isinstance(width, int) and width > 0 for width in source)
    ):
        return source
    raise ModelError(
        "an extra head is made from a linear layer or from (in_features, out_features), not "
        f"from {type(source).__name__} {source!r:.80}"
    )


def _linear(width: int, out: int, generator: Generator | None) -> nn.Linear:
    """A linear layer with torch's own initial distribution, drawn from `generator`."""
    # made without numbers: its own initialisation would draw from the global generator
    layer = nn.Linear(width, out, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1.0 / math.sqrt(width)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


class CosineHead(nn.Module):
    """A linear layer on features of unit length: scale * (W normalize(z) + b).

    The bias stands inside the factor (erjui/DHO, train_imgnet_semi.py: scale 100, the same
    cosine classifier as a CLIP teacher's). Scaling the features changes nothing.

    Args:
        source: a linear layer, whose shape, device and dtype are taken over, or
            (in_features, out_features).
        scale: > 0.
        generator: CPU generator of the weights; the default generator when None.

    Raises:
        ModelError: no such widths, or a scale that is not above 0.
    """

    def __init__(
        self,
        source: nn.Linear | tuple[int, int],
        scale: float = 100.0,
        *,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ModelError(f"the scale of a cosine head must be above 0, not {scale}")
        self.scale = scale
        self.net = _linear(*_widths(source), generator)
        if isinstance(source, nn.Linear):
            self.to(device=source.weight.device, dtype=source.weight.dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., out_features) of features (..., in_features)."""
        logits: Tensor = self.net(F.normalize(features, dim=-1))
        return self.scale * logits


class TextHead(nn.Module):
    """A classifier whose class vectors are text embeddings: scale * normalize(f) @ t_c.

    The matrix is a buffer: it is saved, not trained, and may be exchanged for that of other
    classes (`swap`). A learnt background class stands last.

    Args:
        matrix: (classes, width) class vectors; taken as they are.
        background: None, or a learnt vector beside them: "free" as it is (EZAD), "unit" brought
            to unit length at every call (OADP). Drawn by Xavier's rule.
        scale: factor of the cosines: 100 in CLIP, 1 / temperature elsewhere.
        learn_scale: the factor is exp of a parameter that begins at log(scale).
        normalise: bring features to unit length; False where they are already.
        generator: CPU generator of the background vector.

    Raises:
        ModelError: no matrix of classes, or a scale that is not above 0.
        RecipeError: an unknown kind of background.
    """

    matrix: Tensor

    def __init__(
        self,
        matrix: Tensor,
        background: Literal["free", "unit"] | None = None,
        scale: float = 100.0,
        *,
        learn_scale: bool = False,
        normalise: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ModelError(
                "a text head takes class vectors (classes, width), not "
                f"{tuple(matrix.shape)} of {matrix.dtype}"
            )
        if not scale > 0:
            raise ModelError(f"the scale of a text head must be above 0, not {scale}")
        if background not in (None, "free", "unit"):
            raise RecipeError(
                f"unknown background '{background}'{nearest(background, BACKGROUNDS)}"
            )
        self.register_buffer("matrix", matrix.detach().clone())
        self.kind, self.normalise, self.scale = background, normalise, scale
        self.background: nn.Parameter | None = None
        if background is not None:
            drawn = torch.empty(1, matrix.shape[1], dtype=torch.float32)
            nn.init.xavier_uniform_(drawn, generator=generator)
            self.background = nn.Parameter(drawn.to(matrix))
        self.log_scale: nn.Parameter | None = None
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)).to(matrix))

    @property
    def classes(self) -> int:
        """Number of classes without the background."""
        return self.matrix.shape[0]

    def swap(self, matrix: Tensor) -> None:
        """Take the vectors of other classes (classes, width) in place of the present ones.

        Raises:
            ModelError: another width.
        """
        if matrix.ndim != 2 or matrix.shape[1] != self.matrix.shape[1]:
            raise ModelError(
                f"class vectors of shape {tuple(matrix.shape)} cannot take the place of "
                f"{tuple(self.matrix.shape)}: the width must be the same"
            )
        self.matrix = matrix.detach().to(self.matrix).clone()

    def forward(self, features: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Logits, the background last.

        Args:
            features: (..., width).
            allowed: (classes,) bool; the others' logits are minus infinity, as those of novel
                classes in training.

        Returns:
            (..., classes), or (..., classes + 1) with a background.

        Raises:
            ModelError: features of another width.
        """
        if features.shape[-1] != self.matrix.shape[1]:
            raise ModelError(
                f"the text head compares vectors of width {self.matrix.shape[1]}, got features of "
                f"shape {tuple(features.shape)}"
            )
        unit = F.normalize(features, dim=-1) if self.normalise else features
        logits = unit @ self.matrix.to(unit.dtype).T
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
        if self.background is not None:
            vector: Tensor = self.background
            vector = F.normalize(vector, dim=-1) if self.kind == "unit" else vector
            logits = torch.cat([logits, unit @ vector.to(unit.dtype).T], dim=-1)
        factor = self.scale if self.log_scale is None else self.log_scale.exp()
        return factor * logits

    def extra_repr(self) -> str:
        """Shape and settings, for printing."""
        classes, width = self.matrix.shape
        return f"{width} -> {classes}, background={self.kind}, scale={self.scale:g}"
