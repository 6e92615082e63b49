"""A small encoder of time series: one 1-D CNN for all channels, each encoded apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.parts.series import resampled


class SeriesCNN(nn.Module):
    """Channels go one by one through the same CNN; their features stand side by side.

    The way in which Mantis and MOMENT read recordings of several sensors (COMODO, released
    code): every channel is resampled to one length and encoded separately, and the features are
    concatenated, or averaged, over channels. The CNN is convolutions with BatchNorm and ReLU,
    each but the last followed by a pooling of two, and the mean over time.

    Args:
        channels: C, needed for the width of the features and of the head.
        widths: channels of each convolution.
        kernel: length of each, odd.
        length: points that every series is resampled to; 0: as long as it comes.
        reduction: "concat" or "mean" over the C features.
        labels: outputs of a linear head, "logits"; 0: no head.
        reads: the batch's view that the model reads.

    Attributes:
        width: D of the features.
        taps: name to module path: "conv1" ..., each convolution's output after its ReLU.

    Raises:
        ModelError: a setting out of range.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (32, 64, 64),
        kernel: int = 7,
        length: int = 0,
        reduction: Literal["concat", "mean"] = "concat",
        labels: int = 0,
        reads: str = "x",
    ) -> None:
        super().__init__()
        if channels < 1 or not widths or min(widths) < 1 or kernel < 1 or kernel % 2 == 0:
            raise ModelError(
                "a series CNN needs channels >= 1, widths >= 1 and an odd kernel, got "
                f"{channels}, {tuple(widths)}, {kernel}"
            )
        if reduction not in ("concat", "mean") or min(length, labels) < 0:
            raise ModelError(
                "a series CNN needs reduction 'concat' or 'mean', length and labels >= 0, got "
                f"'{reduction}', {length}, {labels}"
            )
        self.channels, self.length, self.reduction = channels, length, reduction
        self.reads = reads
        before = [1, *widths[:-1]]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(a, b, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm1d(b),
                nn.ReLU(),
            )
            for a, b in zip(before, widths, strict=True)
        )
        self.width = widths[-1] * (channels if reduction == "concat" else 1)
        self.head = nn.Linear(self.width, labels) if labels else None
        self.taps = {f"conv{i + 1}": f"layers.{i}" for i in range(len(widths))}

    def forward(self, series: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Features, and logits where there is a head.

        Args:
            series: (B, C, T).
            mask: (B, T), 1 on real samples of padded recordings; without resampling only.

        Returns:
            {"embedding": (B, D)} and perhaps "logits" (B, labels).

        Raises:
            ModelError: another number of channels.
        """
        if series.ndim != 3 or series.shape[1] != self.channels:
            raise ModelError(
                f"the series CNN reads (B, {self.channels}, T), not {tuple(series.shape)}"
            )
        if self.length:
            series = self._of_length(series, mask)
            mask = None
        features = self._encoded(series, mask).view(len(series), self.channels, -1)
        vectors = features.flatten(1) if self.reduction == "concat" else features.mean(1)
        out = {"embedding": vectors}
        if self.head is not None:
            out["logits"] = self.head(vectors)
        return out

    def _of_length(self, series: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return resampled(series, self.length)
        # Only what was recorded is stretched, not the padding before it.
        lengths = mask.sum(1).tolist()
        return torch.stack(
            [
                resampled(own[:, -int(n) :], self.length)
                for own, n in zip(series, lengths, strict=True)
            ]
        )

    def _encoded(self, series: Tensor, mask: Tensor | None) -> Tensor:
        """(B * C, width) means over time of the last convolution."""
        x = series.flatten(0, 1)[:, None]
        real = None
        if mask is not None:
            real = mask.to(x.dtype).repeat_interleave(self.channels, 0)[:, None]
        for number, layer in enumerate(self.layers):
            x = layer(x if real is None else x * real)
            if number + 1 < len(self.layers) and x.shape[-1] > 1:
                x = F.max_pool1d(x, 2)
                real = None if real is None else F.max_pool1d(real, 2)
        if real is None:
            return x.mean(-1)
        return (x * real).sum(-1) / real.sum(-1).clamp(min=1.0)


# As recipes call it.
series_cnn = SeriesCNN
