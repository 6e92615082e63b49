"""DeepLabV3+ (Chen et al., ECCV 2018) in small, on a MobileNetV2 of any width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model

# Where MobileNetV2's `features` halve the image: at these the output stride becomes 2 ... 32.
_HALVES = (0, 2, 4, 7, 14)
_LOW = 4  # blocks up to the last at stride 4
_DEEP = 18  # all without the last 1x1 convolution, which only the classifier needs


class DeepLab(nn.Module):
    """MobileNetV2, pyramid pooling with dilated depthwise convolutions, a decoder at stride 4.

    Logits are at a quarter of the image, before they are enlarged: where dense distillation
    compares them.

    Args:
        classes: number of classes.
        width: of MobileNetV2; 1.0 for the published weights, 0.25 for a quarter-width student.
        weights: of the backbone: "IMAGENET1K_V1", a file, or none for a fresh start.
        output_stride: of the backbone, 8, 16 or 32: image size / size of its last map.
        rates: dilations of the pyramid's 3x3 convolutions.
        decoder_channels: of pyramid and decoder.
        low_channels: of what the decoder takes from stride 4.
        auxiliary: a second head on the backbone's last map, trained beside, as `aux`.
        blocks: of the backbone that are kept, from the image on, 5 to 18. A few (5 to 7 end at
            stride 8) make a small student that begins with the published weights, which there
            are for width 1.0 alone.

    Attributes:
        taps: "low" (stride 4), "backbone" (its last map), "pyramid", "decoder".
        input_mean: of the backbone's weights, where there are any.
        input_std: likewise.

    Raises:
        ModelError: another output stride or number of blocks, or weights that do not fit.
    """

    def __init__(
        self,
        classes: int = 11,
        width: float = 1.0,
        weights: str | None = None,
        output_stride: int = 16,
        rates: Sequence[int] = (2, 4),
        decoder_channels: int = 96,
        low_channels: int = 24,
        auxiliary: bool = False,
        blocks: int = _DEEP,
    ) -> None:
        super().__init__()
        if output_stride not in {8, 16, 32}:
            raise ModelError(f"the output stride must be 8, 16 or 32, not {output_stride}")
        if not _LOW < blocks <= _DEEP:
            raise ModelError(
                f"of the backbone {_LOW + 1} to {_DEEP} blocks can be kept, not {blocks}"
            )
        whole: Any = load_model(
            "torchvision:mobilenet_v2",
            options={"width_mult": width, "num_classes": 1000},
            weights=weights,
        )
        for name in ("input_mean", "input_std"):
            if hasattr(whole, name):
                setattr(self, name, getattr(whole, name))
        self.low = whole.features[:_LOW]
        self.deep = whole.features[_LOW:blocks]
        _dilate(self.deep, output_stride)
        fine, coarse = _channels(self.low), _channels(self.deep)
        self.pyramid = _Pyramid(coarse, decoder_channels, rates)
        self.reduced = _convolution(fine, low_channels, 1)
        self.decoder = _separable(decoder_channels + low_channels, decoder_channels)
        self.classifier = nn.Conv2d(decoder_channels, classes, 1)
        self.auxiliary = nn.Conv2d(coarse, classes, 1) if auxiliary else None
        self.taps = {
            "low": "low", "backbone": "deep", "pyramid": "pyramid", "decoder": "decoder",
        }  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        """Class scores (B, classes, H / 4, W / 4), rounded up; with `aux` in a dict where asked.

        Args:
            x: (B, 3, H, W), normalised images of any size.
        """
        low = self.low(x)
        deep = self.deep(low)
        coarse = self.pyramid(deep)
        coarse = F.interpolate(coarse, low.shape[-2:], mode="bilinear", align_corners=False)
        scores = self.classifier(self.decoder(torch.cat([coarse, self.reduced(low)], 1)))
        if self.auxiliary is None:
            return scores
        return {"logits": scores, "aux": self.auxiliary(deep)}


class _Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, dilated 3x3, and the mean of the whole image."""

    def __init__(self, before: int, after: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_convolution(before, after, 1)]
            + [_separable(before, after, dilation=rate) for rate in rates]
        )
        # No BatchNorm: of one image there is one value per channel.
        self.pooled = nn.Sequential(nn.Conv2d(before, after, 1), nn.ReLU())
        self.joined = _convolution(after * (len(rates) + 2), after, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [branch(x) for branch in self.branches]
        whole = self.pooled(x.mean((-2, -1), keepdim=True))
        joined: Tensor = self.joined(torch.cat([*found, whole.expand_as(found[0])], 1))
        return joined


def _convolution(before: int, after: int, kernel: int, **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, bias=False, **settings), nn.BatchNorm2d(after), nn.ReLU()
    )


def _separable(before: int, after: int, dilation: int = 1) -> nn.Sequential:
    depthwise = _convolution(before, before, 3, padding=dilation, dilation=dilation, groups=before)
    return nn.Sequential(depthwise, _convolution(before, after, 1))


def _dilate(deep: nn.Sequential, output_stride: int) -> None:
    """Turn strides beyond the output stride into dilation of what follows, weights unchanged."""
    stride, dilation = 4, 1
    for number, block in enumerate(deep, start=_LOW):
        halves = number in _HALVES
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                if halves and stride >= output_stride:
                    layer.stride = (1, 1)
                layer.dilation = (dilation, dilation)
                layer.padding = (dilation, dilation)
        if halves:
            dilation = dilation * 2 if stride >= output_stride else dilation
            stride = stride if stride >= output_stride else stride * 2


def _channels(blocks: nn.Sequential) -> int:
    """Channels of what the blocks give: those of the last convolution."""
    last = [m for m in blocks.modules() if isinstance(m, nn.Conv2d)][-1]
    return int(last.out_channels)
