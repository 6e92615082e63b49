"""Figures of semantic segmentation: IoU over classes, also near class borders and away from them.

Trimap evaluation as in Krähenbühl and Koltun (NeurIPS 2011) and DeepLab: only pixels within a
few pixels of a border between two classes are judged, at several widths. IoU is taken from
one confusion matrix over all images; a class that neither occurs nor is predicted among the
judged pixels does not count in the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import DataError
from stillhouse.losses.spatial import IGNORE, resized_to
from stillhouse.metrics.classification import Summed

WIDTHS = (1, 2, 3, 5)


def label_maps(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of every pixel: logits enlarged bilinearly, then the largest.

    One image at a time, for enlarged logits of many classes fill the memory.

    Args:
        logits: (B, C, h, w).
        size: (H, W).

    Returns:
        (B, H, W) int64.
    """
    rows = [resized_to(row[None].float(), size)[0].argmax(0) for row in logits]
    return torch.stack(rows)


def near_borders(labels: Tensor, width: int, *, ignore: int = IGNORE) -> Tensor:
    """Pixels with a pixel of another class within a square of `width` pixels around them.

    Ignored pixels are neither near a border nor do they make one.

    Args:
        labels: (B, H, W) whole numbers.
        width: pixels, >= 1.
        ignore: the label of pixels that count for nothing.

    Returns:
        (B, H, W) bool.
    """
    valid = labels != ignore
    # Ignored pixels are lowest for the maximum and highest for the minimum: seen by neither.
    numbers = labels.float()
    highest = _dilated(numbers.masked_fill(~valid, -1.0), width)
    lowest = -_dilated(-numbers.masked_fill(~valid, float(1 << 20)), width)
    return (highest > lowest) & valid


def _dilated(maps: Tensor, width: int) -> Tensor:
    side = 2 * width + 1
    rows = F.max_pool2d(maps.unsqueeze(1), (side, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(rows, (1, side), stride=1, padding=(0, width)).squeeze(1)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class; NaN where a class neither occurs nor is predicted.

    Args:
        confusion: (..., C, C), rows the true class, columns the predicted one.

    Returns:
        (..., C) float64.
    """
    counts = confusion.double()
    hit = counts.diagonal(dim1=-2, dim2=-1)
    union = counts.sum(-1) + counts.sum(-2) - hit
    return torch.where(union > 0, hit / union, torch.full_like(hit, float("nan")))


def mean_iou(confusion: Tensor) -> float:
    """The mean of `iou` over classes that count; 0 when there is none."""
    found = iou(confusion)
    return float(found.nanmean()) if bool((~found.isnan()).any()) else 0.0


class SegmentationIoU(Summed):
    """mIoU, trimap mIoU at several widths, mIoU of the bodies, pixel accuracy.

    Args:
        classes: number of classes.
        names: of the classes, for `record`.
        widths: of the trimaps, pixels; the widest also bounds the bodies.
        ignore: the label of pixels that count for nothing.

    Attributes:
        higher_is_better: always.
    """

    higher_is_better = True

    def __init__(
        self,
        classes: int,
        names: Sequence[str] = (),
        *,
        widths: Sequence[int] = WIDTHS,
        ignore: int = IGNORE,
    ) -> None:
        if not widths or min(widths) < 1:
            raise DataError(f"trimap widths are whole numbers of at least 1, not {tuple(widths)}")
        self.classes, self.ignore = classes, ignore
        self.names = list(names) or [str(c) for c in range(classes)]
        self.widths = tuple(sorted(set(widths)))
        # Everything, each trimap, the bodies; then pixels whose label is no class.
        self._regions = len(self.widths) + 2
        super().__init__(self._regions * classes * classes + 1)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in: `logits` (B, C, h, w) of any size, `target` (B, H, W)."""
        logits, labels = out["logits"].detach(), batch["target"]
        labels = labels.to(logits.device, non_blocking=True)
        self.compare(label_maps(logits, (labels.shape[1], labels.shape[2])), labels)

    def compare(self, predicted: Tensor, labels: Tensor) -> None:
        """Take label maps in.

        Args:
            predicted: (B, H, W) class numbers.
            labels: (B, H, W) class numbers or `ignore`.
        """
        labels = labels.long()
        valid = labels != self.ignore
        strange = valid & ((labels < 0) | (labels >= self.classes))
        known = valid & ~strange
        cells = labels * self.classes + predicted
        bands = [near_borders(labels, width, ignore=self.ignore) for width in self.widths]
        regions = [known, *(band & known for band in bands), known & ~bands[-1]]
        size = self.classes**2
        counts = [torch.bincount(cells[region], minlength=size) for region in regions]
        self.add(torch.cat([*counts, strange.sum().reshape(1)]))

    def confusions(self) -> dict[str, Tensor]:
        """Confusion matrices (C, C) by region: "all", "1px" ..., "body".

        Raises:
            DataError: labels that are no class were seen.
        """
        sums = self.totals().cpu()
        if float(sums[-1]):
            raise DataError(
                f"{float(sums[-1]):.0f} pixels carry a label that is no class of the model; labels "
                f"run from 0 to {self.classes - 1}, and {self.ignore} marks what does not count"
            )
        names = ["all", *(f"{width}px" for width in self.widths), "body"]
        matrices = sums[:-1].view(self._regions, self.classes, self.classes)
        return dict(zip(names, matrices, strict=True))

    def compute(self) -> dict[str, float]:
        """`miou`, `trimap_miou_Npx` per width, `body_miou`, `pixel_accuracy`, all in [0, 1]."""
        found = self.confusions()
        whole = found["all"]
        figures = {"miou": mean_iou(whole)}
        for width in self.widths:
            figures[f"trimap_miou_{width}px"] = mean_iou(found[f"{width}px"])
        figures["body_miou"] = mean_iou(found["body"])
        figures["pixel_accuracy"] = float(whole.diagonal().sum() / whole.sum().clamp_min(1))
        return figures

    def by_class(self) -> list[tuple[str, float, float]]:
        """Per class its name, IoU, and IoU within the narrowest trimap but one (or the only)."""
        found = self.confusions()
        near = f"{self.widths[min(1, len(self.widths) - 1)]}px"
        whole, band = iou(found["all"]).tolist(), iou(found[near]).tolist()
        return list(zip(self.names, whole, band, strict=True))
