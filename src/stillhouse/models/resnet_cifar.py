"""ResNet for images of about 32x32: ResNet-8, 20, 32, 44 and 56."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    Where the shape changes, the shortcut takes every second pixel and pads the new channels
    with zeros, half on each side (He et al. 2016, section 4.2, option A).

    Args:
        channels: of the input.
        planes: channels of the output, >= `channels`.
        stride: 1 or 2.
    """

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.padding = planes - channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """The input in the shape of the output."""
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            before = self.padding // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.padding - before))
        return x


class ResNetCifar(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 6n + 2 layers, widths 16, 32, 64.

    State-dict keys are `conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear`, those of
    the widely used published checkpoints (akamaster/pytorch_resnet_cifar10). Convolutions
    and the linear layer begin from He initialisation.

    Args:
        depth: 6n + 2: 8, 20, 32, 44, 56, ...
        classes: number of classes.
        channels: image channels.
        width: channels of the first stage.

    Attributes:
        taps: name to module path of what may be tapped: "stage1" (B, w, H, W), "stage2"
            (B, 2w, H/2, W/2), "stage3" (B, 4w, H/4, W/4).

    Raises:
        ModelError: a depth that is not 6n + 2, or a number below 1.
    """

    taps = {"stage1": "layer1", "stage2": "layer2", "stage3": "layer3"}  # noqa: RUF012

    def __init__(
        self, depth: int = 20, classes: int = 10, channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ModelError(f"a CIFAR ResNet has 6n + 2 layers (8, 20, 32, 44, 56), not {depth}")
        if min(classes, channels, width) < 1:
            raise ModelError(
                f"classes, channels and width must be at least 1, got {classes}, {channels}, "
                f"{width}"
            )
        self.depth = depth
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores.

        Args:
            x: (B, channels, H, W), normalised images.

        Returns:
            Logits (B, classes).
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _stage(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def resnet8(classes: int = 10, channels: int = 3, width: int = 16) -> ResNetCifar:
    """ResNet-8, 0.08 M parameters."""
    return ResNetCifar(8, classes, channels, width)


def resnet20(classes: int = 10, channels: int = 3, width: int = 16) -> ResNetCifar:
    """ResNet-20, 0.27 M parameters."""
    return ResNetCifar(20, classes, channels, width)


def resnet32(classes: int = 10, channels: int = 3, width: int = 16) -> ResNetCifar:
    """ResNet-32, 0.46 M parameters."""
    return ResNetCifar(32, classes, channels, width)


def resnet44(classes: int = 10, channels: int = 3, width: int = 16) -> ResNetCifar:
    """ResNet-44, 0.66 M parameters."""
    return ResNetCifar(44, classes, channels, width)


def resnet56(classes: int = 10, channels: int = 3, width: int = 16) -> ResNetCifar:
    """ResNet-56, 0.85 M parameters."""
    return ResNetCifar(56, classes, channels, width)
