"""ConvNet-D, the reference network of data-set distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, nearest

# (channels, height, width) -> a layer that keeps the shape
_NORMS: Mapping[str, Callable[[int, int, int], nn.Module | None]] = {
    # Statistics per sample and channel with learned scale and shift, no running statistics:
    # torch's InstanceNorm2d would come without the scale and shift.
    "instance": lambda c, h, w: nn.GroupNorm(c, c, affine=True),
    "batch": lambda c, h, w: nn.BatchNorm2d(c, affine=True),
    "layer": lambda c, h, w: nn.LayerNorm((c, h, w), elementwise_affine=True),
    "group": lambda c, h, w: nn.GroupNorm(4, c, affine=True),
    "none": lambda c, h, w: None,
}
# Never in place: a tap holds the activation while the next layer runs.
_ACTS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(negative_slope=0.01),
    "sigmoid": nn.Sigmoid,
    "swish": nn.SiLU,
}
_POOLINGS: Mapping[str, Callable[[], nn.Module | None]] = {
    "avg": lambda: nn.AvgPool2d(kernel_size=2, stride=2),
    "max": lambda: nn.MaxPool2d(kernel_size=2, stride=2),
    "none": lambda: None,
}


class ConvNet(nn.Module):
    """Blocks of conv 3x3, norm, activation, pooling 2x2; then one linear layer.

    The network every method of data-set distillation is measured on (Zhao et al., Dataset
    Condensation, ICLR 2021). Parameters keep torch's default initialisation. State-dict keys
    are `features.{i}.*` and `classifier.*`. There is no dropout, and with every norm but
    "batch" the train and eval modes are the same function.

    One-channel images of 28x28 are padded by 3 in the first convolution, so that 28 becomes
    32 and the rest is as for 32 px. Other one-channel sizes are padded by 1 (our choice; the
    released network pads every one-channel input and so fits 28 px only).

    Args:
        channels: image channels.
        classes: number of classes K.
        size: image side in px, or (height, width).
        width: channels of every block W.
        depth: number of blocks D; 3 for 28-32 px, 4 for 64, 5 for 128.
        norm: "instance" (GroupNorm(W, W), affine), "batch", "layer", "group" (4 groups) or
            "none".
        act: "relu", "leaky_relu", "sigmoid" or "swish".
        pooling: "avg", "max" or "none".

    Attributes:
        taps: name to module path of what may be tapped: "act0" ... "act{D-1}", the output of
            each activation before pooling (B, W, H_l, W_l), and "embed", the flattened last
            feature (B, W*h*w).
        embed_width: width of "embed".

    Raises:
        ModelError: unknown norm, act or pooling; an image too small for the depth; a width
            that the norm cannot divide; a number below 1.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        size: int | tuple[int, int] = 32,
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        act: str = "relu",
        pooling: str = "avg",
    ) -> None:
        super().__init__()
        _check(norm, _NORMS, "norm")
        _check(act, _ACTS, "act")
        _check(pooling, _POOLINGS, "pooling")
        for name, value in (
            ("channels", channels),
            ("classes", classes),
            ("width", width),
            ("depth", depth),
        ):
            if value < 1:
                raise ModelError(f"ConvNet: {name} must be at least 1, got {value}")
        if norm == "group" and width % 4:
            raise ModelError(f"ConvNet: norm 'group' has 4 groups; width {width} is no multiple")
        height, breadth = (size, size) if isinstance(size, int) else size
        self.channels, self.classes, self.size = channels, classes, (height, breadth)

        layers: list[nn.Module] = []
        self.taps: dict[str, str] = {}
        incoming = channels
        for block in range(depth):
            padding = 3 if block == 0 and channels == 1 and (height, breadth) == (28, 28) else 1
            layers.append(nn.Conv2d(incoming, width, kernel_size=3, padding=padding))
            height, breadth = height + 2 * padding - 2, breadth + 2 * padding - 2
            normed = _NORMS[norm](width, height, breadth)
            if normed is not None:
                layers.append(normed)
            self.taps[f"act{block}"] = f"features.{len(layers)}"
            layers.append(_ACTS[act]())
            pool = _POOLINGS[pooling]()
            if pool is not None:
                layers.append(pool)
                height, breadth = height // 2, breadth // 2
            if min(height, breadth) < 1:
                raise ModelError(
                    f"ConvNet: images of {self.size[0]}x{self.size[1]} are too small for depth "
                    f"{depth}: nothing is left after block {block + 1}"
                )
            incoming = width
        self.features = nn.Sequential(*layers)
        self.embed = nn.Flatten()
        self.embed_width = width * height * breadth
        self.classifier = nn.Linear(self.embed_width, classes)
        self.taps["embed"] = "embed"

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of `images` (B, C, H, W)."""
        logits: Tensor = self.classifier(self.embedding(images))
        return logits

    def embedding(self, images: Tensor) -> Tensor:
        """The flattened last feature (B, embed_width)."""
        flat: Tensor = self.embed(self.features(images))
        return flat

    def tapped(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and every tap by name ("act0", ..., "embed"), without hooks.

        Args:
            images: (B, C, H, W).

        Returns:
            `(logits, taps)`; activations are taken before pooling.
        """
        names = {path: name for name, path in self.taps.items()}
        caught: dict[str, Tensor] = {}
        value = images
        for index, layer in enumerate(self.features):
            value = layer(value)
            name = names.get(f"features.{index}")
            if name is not None:
                caught[name] = value
        caught["embed"] = torch.flatten(value, 1)
        return self.classifier(caught["embed"]), caught


def _check(name: str, known: Mapping[str, object], what: str) -> None:
    if name not in known:
        raise ModelError(f"ConvNet: no {what} '{name}'{nearest(name, known)}")
