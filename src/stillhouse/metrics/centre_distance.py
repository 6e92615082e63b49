"""Detection figures by the distance of centres on the ground, as the nuScenes benchmark has them.

A prediction is right when a box of its class, not yet taken by a better one of the frame, has
its centre within a bound. Precision is read at 101 recalls; recalls and precisions up to 0.1 do
not count (Caesar et al., nuScenes, CVPR 2020, section 3.1). The translation error is the mean
distance of right predictions (bound 2 m), running over falling scores, averaged over recalls
from 0.1 to the highest reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.metrics.classification import Summed

BOUNDS = (0.5, 1.0, 2.0)
ERROR_BOUND = 2.0
_BINS = 1000  # of scores: figures are exact but for ties within a bin
_LEAST = 0.1
_RECALLS = 101

Detections = list[dict[str, Tensor]]


class CentreDistance(Summed):
    """Mean average precision and translation error over a split.

    Sums are histograms over scores, so that those of several processes may be added.

    Args:
        categories: names of the classes.
        detect: outputs of a model to its boxes, scores and labels a frame.
        groups: name to a test of the boxes that it is about, by the points in them; figures of
            a group have its name as a suffix. Boxes beside the group are neither right nor
            wrong to find.
    """

    def __init__(
        self,
        categories: Sequence[str],
        detect: Callable[[Mapping[str, Any]], Detections],
        groups: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.categories, self.detect = list(categories), detect
        self.groups = {"": _every, **(groups or {})}
        # groups x classes x bounds x {right, wrong, distance of the right} x bins, then boxes
        self.shape = (len(self.groups), len(categories), len(BOUNDS), 3, _BINS)
        self.boxes = len(self.groups) * len(categories)
        super().__init__(math.prod(self.shape) + self.boxes)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in: `boxes`, `labels`, `valid`, `seen` (B, M) beside the outputs."""
        made = torch.zeros(self.shape, dtype=torch.float64)
        count = torch.zeros(len(self.groups), len(self.categories), dtype=torch.float64)
        for row, found in enumerate(self.detect(out)):
            valid = batch["valid"][row].cpu()
            boxes, labels, seen = (batch[n][row].cpu()[valid] for n in ("boxes", "labels", "seen"))
            for kind in range(len(self.categories)):
                own, theirs = labels == kind, found["labels"].cpu() == kind
                place = found["boxes"].cpu()[theirs, :2]
                away = torch.cdist(place.double(), boxes[own, :2].double())
                score = found["scores"].cpu()[theirs]
                for number, test in enumerate(self.groups.values()):
                    meant = test(seen[own])
                    count[number, kind] += meant.sum()
                    for bound, limit in enumerate(BOUNDS):
                        _match(away, score, meant, limit, made[number, kind, bound])
        self.add(torch.cat([made.flatten(), count.flatten()]))

    def compute(self) -> dict[str, float]:
        """`map` over classes and bounds, `translation_error` in metres, and `ap_CLASS`.

        A class without boxes does not count; the error of a class whose recall stays below 0.1
        is 1 m, as in the benchmark.
        """
        sums = torch.tensor(self.numbers(), dtype=torch.float64)
        tables = sums[: -self.boxes].reshape(self.shape)
        counts = sums[-self.boxes :].reshape(len(self.groups), -1)
        figures: dict[str, float] = {}
        for number, group in enumerate(self.groups):
            suffix = f"_{group}" if group else ""
            precise, errors = [], []
            for kind, name in enumerate(self.categories):
                total = float(counts[number, kind])
                if total == 0:
                    continue
                values = [average_precision(t[0], t[1], total) for t in tables[number, kind]]
                precise.append(sum(values) / len(values))
                table = tables[number, kind, BOUNDS.index(ERROR_BOUND)]
                errors.append(running_error(table[0], table[2], total))
                if not group:
                    figures[f"ap_{name}"] = precise[-1]
            figures[f"map{suffix}"] = _mean(precise)
            figures[f"translation_error{suffix}"] = _mean(errors)
        return {"map": figures.pop("map"), **figures}


def _every(seen: Tensor) -> Tensor:
    return torch.ones_like(seen, dtype=torch.bool)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _match(away: Tensor, score: Tensor, meant: Tensor, limit: float, table: Tensor) -> None:
    """Take one frame's predictions of a class into a table (3, bins)."""
    free = [True] * len(meant)
    rows = away.tolist()
    for place in score.argsort(descending=True, stable=True).tolist():
        cell = min(_BINS - 1, max(0, int(float(score[place]) * _BINS)))
        open_ones = [k for k in range(len(free)) if free[k]]
        best = min(open_ones, key=rows[place].__getitem__, default=None)
        if best is None or rows[place][best] >= limit:
            table[1, cell] += 1
            continue
        free[best] = False
        if bool(meant[best]):
            table[0, cell] += 1
            table[2, cell] += rows[place][best]


def _curve(right: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Running numbers of right predictions by falling score, and recalls, of bins that hold any."""
    hits = right.flip(0).cumsum(0)
    return hits, hits / total


def average_precision(right: Tensor, wrong: Tensor, total: float) -> float:
    """The area under precision over recall above 0.1 in both, in [0, 1].

    Args:
        right: (bins,) right predictions by rising score.
        wrong: (bins,) wrong ones.
        total: boxes there are.
    """
    hits, recall = _curve(right, total)
    said = hits + wrong.flip(0).cumsum(0)
    held = said > 0
    if not bool(held.any()) or float(hits[-1]) == 0:
        return 0.0
    precision = hits[held] / said[held]
    read = _interpolated(recall[held], precision, beyond=0.0)
    kept = read[round((_RECALLS - 1) * _LEAST) + 1 :] - _LEAST
    return float(kept.clamp_min(0).mean()) / (1 - _LEAST)


def running_error(right: Tensor, distance: Tensor, total: float) -> float:
    """The mean distance of right predictions, over recalls from 0.1 to the highest reached."""
    hits, recall = _curve(right, total)
    held = hits > 0
    first = round((_RECALLS - 1) * _LEAST) + 1
    last = int(float(recall[-1]) * (_RECALLS - 1) + 1e-9)
    if not bool(held.any()) or last < first:
        return 1.0
    mean = distance.flip(0).cumsum(0)[held] / hits[held]
    read = _interpolated(recall[held], mean, beyond=float(mean[-1]))
    return float(read[first : last + 1].mean())


def _interpolated(recall: Tensor, value: Tensor, *, beyond: float) -> Tensor:
    """Values at 101 recalls, linear between those given, `beyond` after the last."""
    wanted = torch.linspace(0, 1, _RECALLS, dtype=torch.float64)
    place = torch.searchsorted(recall.contiguous(), wanted).clamp(max=len(recall) - 1)
    before = (place - 1).clamp_min(0)
    width = recall[place] - recall[before]
    share = torch.where(width > 0, (wanted - recall[before]) / width.clamp_min(1e-12), 1.0)
    read = value[before] + share.clamp(0, 1) * (value[place] - value[before])
    read[wanted > recall[-1] + 1e-12] = beyond
    return read
