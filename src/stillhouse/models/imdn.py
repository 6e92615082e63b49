"""IMDN: information multi-distillation networks for image super-resolution.

Hui et al., "Lightweight Image Super-Resolution with Information Multi-distillation Network",
ACM Multimedia 2019, arXiv 1909.11856. Structure, parameter counts and state-dict names are
those of the released networks, so that published checkpoints load.

A block keeps ("distils") the FIRST quarter of each convolution's activated channels and sends
the rest on; the kept quarters are joined, re-weighted by an attention on mean + standard
deviation, and fused by a 1x1 convolution with the block's residual.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import CheckpointError, ModelError, nearest

Attention = Literal["contrast", "mean", "none"]
Weights = str | Path | Mapping[str, Tensor]

SLOPE = 0.05
REDUCTION = 16
_ATTENTIONS = ("contrast", "mean", "none")


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution whose zero padding keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)


def leaky() -> nn.LeakyReLU:
    """LeakyReLU of slope 0.05; never in place, so that taps may hold what comes before."""
    return nn.LeakyReLU(SLOPE)


def deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the pixels of each channel.

    The released formula is sqrt(mean((x - m)^2)) without epsilon, whose gradient is infinite
    on a constant channel (a blank patch). Here the root is taken only where the variance is
    positive: equal values, and gradient 0 on constant channels (our choice).

    Args:
        x: (B, C, H, W). Half-precision input is summed in float32.

    Returns:
        Mean and deviation, (B, C, 1, 1) each.
    """
    wide = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    mean = wide.mean(dim=(2, 3), keepdim=True)
    variance = (wide - mean).square().mean(dim=(2, 3), keepdim=True)
    positive = variance > 0
    root = torch.where(positive, variance, 1.0).sqrt()
    return mean.to(x.dtype), torch.where(positive, root, 0.0).to(x.dtype)


class ChannelAttention(nn.Module):
    """Contrast-aware channel attention (CCA), or its ablation on the mean alone.

    x * sigmoid(conv1x1(relu(conv1x1(s)))) with s = deviation + mean ("contrast", the method)
    or s = mean ("mean", the paper's comparison). Keys: `conv_du.0.*`, `conv_du.2.*`.

    Args:
        channels: C.
        kind: "contrast" or "mean".
        reduction: the hidden width is C // reduction, at least 1 (for C below 16: our choice).
    """

    def __init__(
        self, channels: int, kind: Attention = "contrast", reduction: int = REDUCTION
    ) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.kind = kind
        self.conv_du = nn.Sequential(
            conv(channels, hidden, 1), nn.ReLU(), conv(hidden, channels, 1), nn.Sigmoid()
        )

    def squeeze(self, x: Tensor) -> Tensor:
        """The statistic (B, C, 1, 1) that the weights are computed from."""
        if self.kind == "mean":
            return x.mean(dim=(2, 3), keepdim=True)
        mean, spread = deviation(x)
        return spread + mean

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) with each channel weighted."""
        weight: Tensor = self.conv_du(self.squeeze(x))
        return x * weight


class DistillationBlock(nn.Module):
    """IMDB: three convolutions that each keep a quarter, a fourth that gives the last one.

    Keys: `c1` ... `c5`, `cca.conv_du.{0,2}`. No activation follows `c4` or `c5`.

    Args:
        channels: width nf; four kept parts must fill it again.
        rate: share of the channels that is kept.
        attention: "contrast" (the method), "mean" or "none".

    Raises:
        ModelError: four kept parts do not make `channels`, and there is an attention to load
            (without attention the fusion takes any width, as in the real-time network).
    """

    def __init__(
        self, channels: int = 64, rate: float = 0.25, attention: Attention = "contrast"
    ) -> None:
        super().__init__()
        kept = int(channels * rate)
        rest = channels - kept
        if kept < 1 or rest < 1 or (4 * kept != channels and attention != "none"):
            raise ModelError(
                f"an IMDN block of {channels} channels at rate {rate} keeps {kept} channels a "
                f"step; 4 x {kept} must be {channels}"
            )
        self.kept, self.rest = kept, rest
        self.c1 = conv(channels, channels, 3)
        self.c2 = conv(rest, channels, 3)
        self.c3 = conv(rest, channels, 3)
        self.c4 = conv(rest, kept, 3)
        self.act = leaky()
        self.c5 = conv(4 * kept, channels, 1)
        if attention != "none":
            self.cca = ChannelAttention(channels, attention)

    def distil(self, x: Tensor) -> Tensor:
        """The four kept parts joined, (B, 4 * kept, H, W)."""
        kept = []
        for layer in (self.c1, self.c2, self.c3):
            part, x = self.act(layer(x)).split([self.kept, self.rest], dim=1)
            kept.append(part)
        return torch.cat([*kept, self.c4(x)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, nf, H, W) to the same shape."""
        joined = self.distil(x)
        if hasattr(self, "cca"):
            joined = self.cca(joined)
        fused: Tensor = self.c5(joined)
        return fused + x


class PlainBlock(nn.Module):
    """The block without splitting: three full convolutions and the residual.

    The paper's "plain" row has 510K parameters at 4 blocks, x4, which is three 3x3
    convolutions of 64 channels a block; their order and activations are reconstructed.

    Args:
        channels: width.
        attention: as in `DistillationBlock`, before the residual is added.
    """

    def __init__(self, channels: int = 64, attention: Attention = "none") -> None:
        super().__init__()
        self.c1 = conv(channels, channels, 3)
        self.c2 = conv(channels, channels, 3)
        self.c3 = conv(channels, channels, 3)
        self.act = leaky()
        if attention != "none":
            self.cca = ChannelAttention(channels, attention)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to the same shape."""
        y: Tensor = self.c3(self.act(self.c2(self.act(self.c1(x)))))
        if hasattr(self, "cca"):
            y = self.cca(y)
        return x + y


class _Restorer(nn.Module):
    """What all networks here share: what they do to sizes, and the check of the input.

    Attributes:
        scale: output size / input size.
        multiple: input sides must be divisible by this.
    """

    scale: int = 1
    multiple: int = 1
    colours: int = 3

    def check_input(self, image: Tensor) -> None:
        """Refuse what is no batch of images of the right channels and sides.

        Raises:
            ModelError: with both shapes.
        """
        name = type(self).__name__
        if image.ndim != 4 or image.shape[1] != self.colours:
            raise ModelError(
                f"{name} takes images (B, {self.colours}, H, W) in [0, 1], got {tuple(image.shape)}"
            )
        if self.multiple > 1 and (image.shape[2] % self.multiple or image.shape[3] % self.multiple):
            raise ModelError(
                f"{name} needs sides divisible by {self.multiple}, got "
                f"{image.shape[2]}x{image.shape[3]}; use adaptive cropping or padding"
            )


class _Collecting(_Restorer):
    """The body that IMDN and IMDN_AS share: blocks, collection, residual, pixel shuffle.

    Attributes:
        taps: "block1" ... to the module path of each block.
    """

    def __init__(
        self,
        head: nn.Module,
        channels: int,
        blocks: int,
        shuffle: int,
        rate: float,
        attention: Attention,
        split: bool,
        collect: bool,
        colours: int,
    ) -> None:
        super().__init__()
        if attention not in _ATTENTIONS:
            raise ModelError(f"IMDN: no attention '{attention}'{nearest(attention, _ATTENTIONS)}")
        for name, value in (("channels", channels), ("blocks", blocks), ("scale", shuffle)):
            if value < 1:
                raise ModelError(f"IMDN: {name} must be at least 1, got {value}")
        self.channels, self.blocks, self.colours = channels, blocks, colours
        self.attention, self.split, self.collect, self.rate = attention, split, collect, rate
        self.fea_conv = head
        for number in range(1, blocks + 1):
            block: nn.Module = (
                DistillationBlock(channels, rate, attention)
                if split
                else PlainBlock(channels, attention)
            )
            self.add_module(f"IMDB{number}", block)
        if collect:
            self.c = nn.Sequential(conv(channels * blocks, channels, 1), leaky())
        self.LR_conv = conv(channels, channels, 3)
        self.upsampler = nn.Sequential(
            conv(channels, colours * shuffle * shuffle, 3), nn.PixelShuffle(shuffle)
        )
        self.taps = {f"block{n}": f"IMDB{n}" for n in range(1, blocks + 1)}

    def settings(self) -> dict[str, Any]:
        """What it takes to build the network again, by the names of `imdn` and `imdn_as`."""
        return {
            "channels": self.channels,
            "blocks": self.blocks,
            "rate": self.rate,
            "attention": self.attention,
            "split": self.split,
            "collect": self.collect,
        }

    def features(self, image: Tensor) -> Tensor:
        """What the tail enlarges: (B, nf, h, w)."""
        first: Tensor = self.fea_conv(image)
        x, outputs = first, []
        for number in range(1, self.blocks + 1):
            x = self.get_submodule(f"IMDB{number}")(x)
            outputs.append(x)
        gathered = self.c(torch.cat(outputs, dim=1)) if self.collect else x
        fused: Tensor = self.LR_conv(gathered)
        return fused + first

    def forward(self, image: Tensor) -> Tensor:
        """The restored image of `image` (B, 3, H, W) in [0, 1]; not clamped."""
        self.check_input(image)
        restored: Tensor = self.upsampler(self.features(image))
        return restored


class IMDN(_Collecting):
    """The network of the paper: (B, 3, H, W) to (B, 3, sH, sW), any H and W.

    Args:
        channels: width nf.
        blocks: number of blocks.
        scale: s, the factor of enlargement.
        rate: share of channels a block keeps at each step.
        attention: "contrast" (the method), or the ablations "mean" and "none".
        split: False gives the plain block (see `no_split_width` for an equal size).
        collect: False leaves out the collection of all blocks' outputs (IIC).
        colours: image channels.

    Raises:
        ModelError: settings that make no network.
    """

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 6,
        scale: int = 4,
        *,
        rate: float = 0.25,
        attention: Attention = "contrast",
        split: bool = True,
        collect: bool = True,
        colours: int = 3,
    ) -> None:
        head = conv(colours, max(1, channels), 3)
        super().__init__(head, channels, blocks, scale, rate, attention, split, collect, colours)
        self.scale = scale

    def settings(self) -> dict[str, Any]:
        """What it takes to build the network again, by the names of `imdn`."""
        return {"scale": self.scale, **super().settings()}


class IMDN_AS(_Collecting):  # noqa: N801 - the published name
    """The any-scale network: two strided convolutions at the head, pixel shuffle x4 at the tail.

    The output has the size of the input, which is the low-resolution image already enlarged
    bicubically to the wanted size. Sides must be multiples of 4 (adaptive cropping serves the
    others). Arguments as of `IMDN`.
    """

    multiple = 4

    def __init__(
        self,
        channels: int = 64,
        blocks: int = 6,
        *,
        rate: float = 0.25,
        attention: Attention = "contrast",
        split: bool = True,
        collect: bool = True,
        colours: int = 3,
    ) -> None:
        width = max(1, channels)
        head = nn.Sequential(conv(colours, width, 3, stride=2), leaky(), conv(width, width, 3, 2))
        super().__init__(head, channels, blocks, 4, rate, attention, split, collect, colours)


class _Shortcut(nn.Module):
    """x + sub(x); the key `sub` is the published one."""

    def __init__(self, sub: nn.Module) -> None:
        super().__init__()
        self.sub = sub

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.sub(x)
        return x + y


class IMDN_RTC(_Restorer):  # noqa: N801 - the published name
    """The small real-time network: no attention, no collection, 1x1 convolution, one residual.

    Args:
        channels: width.
        blocks: number of blocks.
        scale: factor of enlargement.
        colours: image channels.
    """

    def __init__(
        self, channels: int = 12, blocks: int = 5, scale: int = 2, *, colours: int = 3
    ) -> None:
        super().__init__()
        self.channels, self.blocks, self.scale, self.colours = channels, blocks, scale, colours
        body = [DistillationBlock(channels, attention="none") for _ in range(blocks)]
        self.model = nn.Sequential(
            conv(colours, channels, 3),
            _Shortcut(nn.Sequential(*body, conv(channels, channels, 1))),
            conv(channels, colours * scale * scale, 3),
            nn.PixelShuffle(scale),
        )

    def forward(self, image: Tensor) -> Tensor:
        """The restored image (B, 3, sH, sW)."""
        self.check_input(image)
        restored: Tensor = self.model(image)
        return restored


class LargeBlock(nn.Module):
    """The six-way block of the real-time network IMDN_RTE: no biases, ReLU, no attention.

    Each of six convolutions keeps d = nf / 4 channels; the rest narrows from 3d over 2d to d.

    Args:
        channels: width nf, a multiple of 4.
    """

    def __init__(self, channels: int = 20) -> None:
        super().__init__()
        if channels < 4 or channels % 4:
            raise ModelError(f"an IMDN_RTE block needs a multiple of 4 channels, not {channels}")
        kept = self.kept = channels // 4
        self.c1 = conv(channels, channels, 3, bias=False)
        self.c2 = conv(3 * kept, channels, 3, bias=False)
        self.c3 = conv(3 * kept, channels, 3, bias=False)
        self.c4 = conv(3 * kept, 3 * kept, 3, bias=False)
        self.c5 = conv(2 * kept, 2 * kept, 3, bias=False)
        self.c6 = conv(kept, kept, 3, bias=False)
        self.act = nn.ReLU()
        self.c7 = conv(6 * kept, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, nf, H, W) to the same shape."""
        rest, kept = x, []
        for layer in (self.c1, self.c2, self.c3, self.c4, self.c5):
            y = self.act(layer(rest))
            kept.append(y[:, : self.kept])
            rest = y[:, self.kept :]
        fused: Tensor = self.c7(torch.cat([*kept, self.act(self.c6(rest))], dim=1))
        return fused + x


class IMDN_RTE(_Restorer):  # noqa: N801 - the published name
    """The real-time network on half-size features: head of stride 2, pixel shuffle s^2.

    At scale 2 the shuffle by 4 after the stride of 2 doubles the size. Sides must be even.

    Args:
        scale: s; the factor of enlargement is s^2 / 2.
        channels: width, a multiple of 4.
        blocks: number of blocks.
        colours: image channels.
    """

    multiple = 2

    def __init__(
        self, scale: int = 2, channels: int = 20, blocks: int = 6, *, colours: int = 3
    ) -> None:
        super().__init__()
        if scale % 2:
            raise ModelError(f"IMDN_RTE needs an even scale, not {scale}")
        self.channels, self.blocks, self.colours = channels, blocks, colours
        self.scale, self.shuffle = scale * scale // 2, scale * scale
        self.fea_conv = nn.Sequential(
            conv(colours, channels, 3), nn.ReLU(), conv(channels, channels, 3, 2, bias=False)
        )
        for number in range(1, blocks + 1):
            self.add_module(f"block{number}", LargeBlock(channels))
        self.LR_conv = conv(channels, channels, 1, bias=False)
        self.upsampler = nn.Sequential(
            conv(channels, colours * self.shuffle**2, 3), nn.PixelShuffle(self.shuffle)
        )

    def forward(self, image: Tensor) -> Tensor:
        """The restored image of `image` (B, 3, H, W), H and W even."""
        self.check_input(image)
        first = self.fea_conv(image)
        x = first
        for number in range(1, self.blocks + 1):
            x = self.get_submodule(f"block{number}")(x)
        restored: Tensor = self.upsampler(self.LR_conv(x) + first)
        return restored


# --- by id ---------------------------------------------------------------------------------


def imdn(
    scale: int = 2,
    channels: int = 64,
    blocks: int = 6,
    *,
    rate: float = 0.25,
    attention: Attention = "contrast",
    split: bool = True,
    collect: bool = True,
) -> IMDN:
    """IMDN as published at 64 channels and 6 blocks; see `IMDN`."""
    return IMDN(
        channels, blocks, scale, rate=rate, attention=attention, split=split, collect=collect
    )


def imdn_as(
    channels: int = 64,
    blocks: int = 6,
    *,
    rate: float = 0.25,
    attention: Attention = "contrast",
    split: bool = True,
    collect: bool = True,
) -> IMDN_AS:
    """The any-scale network, which keeps the size of its enlarged input; see `IMDN_AS`."""
    return IMDN_AS(channels, blocks, rate=rate, attention=attention, split=split, collect=collect)


def imdn_rtc(scale: int = 2, channels: int = 12, blocks: int = 5) -> IMDN_RTC:
    """The small real-time network; see `IMDN_RTC`."""
    return IMDN_RTC(channels, blocks, scale)


def imdn_rte(scale: int = 2, channels: int = 20, blocks: int = 6) -> IMDN_RTE:
    """The real-time network on half-size features; see `IMDN_RTE`."""
    return IMDN_RTE(scale, channels, blocks)


def parameter_count(net: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(p.numel() for p in net.parameters())


def no_split_width(
    channels: int = 64,
    blocks: int = 6,
    scale: int = 4,
    *,
    rate: float = 0.25,
    attention: Attention = "contrast",
    collect: bool = True,
) -> int:
    """The least width >= `channels` at which the plain network is as large as the split one."""
    least = parameter_count(
        IMDN(channels, blocks, scale, rate=rate, attention=attention, collect=collect)
    )
    width = channels
    while (
        parameter_count(
            IMDN(width, blocks, scale, attention=attention, split=False, collect=collect)
        )
        < least
    ):
        width += 1
    return width


# --- published checkpoints ---------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What the shapes of a state dict say about its network.

    Attributes:
        kind: "IMDN", "IMDN_AS", "IMDN_RTC" or "IMDN_RTE".
        channels: width.
        blocks: number of blocks.
        scale: side of the tail's pixel shuffle (for IMDN_RTE its square root).
        attention: "contrast" where there is an attention (its weights do not tell it from
            "mean"), else "none".
        collect: whether the blocks' outputs are collected.
    """

    kind: str
    channels: int
    blocks: int
    scale: int
    attention: Attention = "contrast"
    collect: bool = True

    def build(self) -> IMDN | IMDN_AS | IMDN_RTC | IMDN_RTE:
        """The network, with fresh weights."""
        if self.kind == "IMDN_RTC":
            return IMDN_RTC(self.channels, self.blocks, self.scale)
        if self.kind == "IMDN_RTE":
            return IMDN_RTE(self.scale, self.channels, self.blocks)
        if self.kind == "IMDN_AS":
            return IMDN_AS(
                self.channels, self.blocks, attention=self.attention, collect=self.collect
            )
        return IMDN(
            self.channels,
            self.blocks,
            self.scale,
            attention=self.attention,
            collect=self.collect,
        )


def read_weights(source: Weights) -> dict[str, Tensor]:
    """A state dict with the published key names, from a file or a mapping.

    Args:
        source: a `.safetensors` file, a `.pth`/`.pt` file (read with `weights_only=True`), or
            a state dict. A state dict under "state_dict", "params_ema" or "params" is found;
            a leading `module.` is taken off every key.

    Raises:
        CheckpointError: no such file, not readable, or no tensors in it.
    """
    where = "the state dict"
    if isinstance(source, Mapping):
        found: object = source
    else:
        path = Path(source)
        where = str(path)
        found = _read_file(path)
    for key in ("state_dict", "params_ema", "params"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{where} holds no state dict")
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where}: '{name}' is a {type(value).__name__}, not a tensor; a state dict of "
                "tensors is needed"
            )
        state[str(name).removeprefix("module.")] = value
    return state


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {error}") from error


def describe_published(state: Mapping[str, Tensor]) -> Published:
    """Which network a state dict belongs to, read off its names and shapes.

    Raises:
        CheckpointError: no network of the family has such names, or the tail's shape is none
            of a pixel shuffle.
    """
    if any(name.startswith("model.") for name in state):
        head, tail = _need(state, "model.0.weight"), _need(state, "model.2.weight")
        blocks = _count(state, r"model\.1\.sub\.(\d+)\.c1\.weight") + 1
        return Published("IMDN_RTC", head.shape[0], blocks, _shuffle_of(tail), "none", False)
    tail = _need(state, "upsampler.0.weight")
    shuffle = _shuffle_of(tail)
    if any(name.startswith("block1.") for name in state):
        head = _need(state, "fea_conv.0.weight")
        root = math.isqrt(shuffle)
        if root * root != shuffle:
            raise CheckpointError(f"the tail's shuffle by {shuffle} is no square as in IMDN_RTE")
        return Published(
            "IMDN_RTE", head.shape[0], _count(state, r"block(\d+)\.c1\.weight"), root, "none", False
        )
    blocks = _count(state, r"IMDB(\d+)\.c1\.weight")
    attention: Attention = "contrast" if "IMDB1.cca.conv_du.0.weight" in state else "none"
    collect = "c.0.weight" in state
    if "fea_conv.0.weight" in state:
        head = state["fea_conv.0.weight"]
        return Published("IMDN_AS", head.shape[0], blocks, shuffle, attention, collect)
    head = _need(state, "fea_conv.weight")
    return Published("IMDN", head.shape[0], blocks, shuffle, attention, collect)


def load_published(
    source: Weights, net: nn.Module | None = None, *, start: bool = False
) -> nn.Module:
    """Load a published checkpoint, or start a network of another scale from it.

    Args:
        source: see `read_weights`.
        net: the network to fill; when not given, the one that the shapes describe is built.
        start: leave out the tail (`upsampler`), whatever its shape: how a x3 or x4 network
            starts from the x2 one. The tail keeps the fresh weights it has.

    Returns:
        The network with the weights, in the mode it was in.

    Raises:
        CheckpointError: names missing, unknown or of another shape, all told by name.
    """
    state = read_weights(source)
    if net is None:
        net = describe_published(state).build()
    own = net.state_dict()
    if start:
        state = {n: v for n, v in state.items() if not n.startswith("upsampler.")}
        own = {n: v for n, v in own.items() if not n.startswith("upsampler.")}
    problems = _mismatches(state, own)
    if problems:
        raise CheckpointError(
            f"the weights do not fit {type(net).__name__}: " + "; ".join(problems)
        )
    net.load_state_dict(state, strict=not start)
    return net


def _mismatches(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    problems = []
    tail = "upsampler.0.weight"
    if tail in state and tail in own and state[tail].shape != own[tail].shape:
        problems.append(
            f"they enlarge by {_shuffle_of(state[tail])}, the network by {_shuffle_of(own[tail])} "
            "(to start from another scale, load all but the tail with start=True)"
        )
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} unknown ({_some(unknown)})")
    differing = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if differing:
        problems.append(f"{len(differing)} of another shape ({_some(differing)})")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _need(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"these weights are of no IMDN network: '{name}' is missing{nearest(name, state)}"
        )
    return state[name]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(m.group(1)) for m in (re.fullmatch(pattern, name) for name in state) if m]
    if not found:
        raise CheckpointError("these weights are of no IMDN network: they hold no block")
    return max(found)


def _shuffle_of(tail: Tensor) -> int:
    """The side of the pixel shuffle after a tail of (3 s^2, nf, 3, 3)."""
    side = math.isqrt(tail.shape[0] // 3)
    if side < 1 or 3 * side * side != tail.shape[0]:
        raise CheckpointError(
            f"a tail of {tail.shape[0]} channels is that of no scale; 3 s^2 was expected"
        )
    return side
