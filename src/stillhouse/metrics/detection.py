"""Figures of a detector: average precision by class, object size and rule, and what it misses.

A detection is right when it overlaps a true box of its class that no better detection has
taken. By object size, boxes of other sizes are neither asked for nor counted (COCO's rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from stillhouse.parts.boxes import areas, covered, iou

Rule = Literal["area", "voc11", "coco101"]
_BINS = 2048  # cells of a score where several processes add up what each has seen
SIZES = ("all", "small", "medium", "large")


def average_precision(scores: Tensor, hits: Tensor, positives: int, rule: Rule = "area") -> float:
    """Average precision of detections of one class.

    Args:
        scores: (N,) of detections, in any order.
        hits: (N,) true where a detection is right.
        positives: true boxes there are.
        rule: "area" under the envelope of precision over recall (VOC from 2010 on); "voc11",
            the mean of the envelope at recalls 0, 0.1 .. 1 (VOC 2007); "coco101", at 101 recalls.

    Returns:
        In [0, 1]; NaN where there is no true box.
    """
    order = scores.double().argsort(descending=True, stable=True)
    right = hits[order].double()
    return _area(right.cumsum(0), (1.0 - right).cumsum(0), positives, rule)


def _area(right: Tensor, wrong: Tensor, positives: float, rule: Rule) -> float:
    """Average precision from right and wrong detections so far, down the scores."""
    if positives == 0:
        return float("nan")
    if len(right) == 0:
        return 0.0
    recall = right / positives
    precision = right / (right + wrong).clamp(min=1e-12)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    if rule == "area":
        steps = torch.diff(recall, prepend=recall.new_zeros(1))
        return float((steps * envelope).sum())
    count = 11 if rule == "voc11" else 101
    asked = torch.linspace(0, 1, count, dtype=torch.float64)
    place = torch.searchsorted(recall, asked - 1e-12)
    padded = torch.cat([envelope, envelope.new_zeros(1)])
    return float(padded[place].mean())


def matched(
    boxes: Tensor,
    scores: Tensor,
    true: Tensor,
    *,
    least: float = 0.5,
    ignored: Tensor | None = None,
    crowd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give each detection of a class in an image the true box it finds, best score first.

    Args:
        boxes: (N, 4) detections.
        scores: (N,).
        true: (M, 4).
        least: overlap from which a box is found.
        ignored: (M,) true boxes that need not be found; whoever finds one is not counted.
        crowd: (M,) of them, those that stand for many: any number of detections may lie in one,
            and it is the share inside it that counts.

    Returns:
        `(found, skipped)`: (N,) the number of the true box, -1 for none; (N,) detections that
        found an ignored one.
    """
    found = torch.full((len(boxes),), -1, dtype=torch.int64)
    skipped = torch.zeros(len(boxes), dtype=torch.bool)
    if len(boxes) == 0 or len(true) == 0:
        return found, skipped
    ignored = torch.zeros(len(true), dtype=torch.bool) if ignored is None else ignored
    crowd = torch.zeros(len(true), dtype=torch.bool) if crowd is None else crowd
    overlap = torch.where(crowd[None, :], covered(boxes, true), iou(boxes, true))
    taken = torch.zeros(len(true), dtype=torch.bool)
    for row in scores.argsort(descending=True, stable=True).tolist():
        free = overlap[row].masked_fill(taken & ~crowd, -1.0)
        # A box that counts is preferred to one that does not, however large their overlaps.
        best = -1
        for kind in (~ignored, ignored):
            own = free.masked_fill(~kind, -1.0)
            place = int(own.argmax())
            if float(own[place]) >= least:
                best = place
                break
        if best >= 0:
            found[row] = best
            taken[best] = True
            skipped[row] = bool(ignored[best])
    return found, skipped


class Detections:
    """Average precision and misses of a detector over a split.

    Over one process the figures are exact; over several, scores are kept in 2,048 cells.

    Args:
        categories: number of classes.
        overlap: intersection over union from which a box is found.
        sizes: where small ends and large begins, in pixels (roots of box areas); COCO's 32 and
            96 by default.
        novel: numbers of the classes that had no boxes in training, judged apart.
        confident: score from which a detection counts for recall and misses.
    """

    higher_is_better = True

    def __init__(
        self,
        categories: int,
        *,
        overlap: float = 0.5,
        sizes: Sequence[float] = (32.0, 96.0),
        novel: Sequence[int] = (),
        confident: float = 0.5,
    ) -> None:
        self.categories, self.overlap, self.confident = categories, overlap, confident
        self.limits = (float(sizes[0]) ** 2, float(sizes[1]) ** 2)
        self.novel = sorted(set(novel))
        shape = (len(SIZES), categories)
        self.positives = torch.zeros(shape, dtype=torch.float64)
        self.missed = torch.zeros(shape, dtype=torch.float64)
        self.false = torch.zeros(categories, dtype=torch.float64)
        self.images = 0.0
        self._seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self._cells: Tensor | None = None

    # ---- gathering -------------------------------------------------------------------------

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in.

        Args:
            out: `boxes`, `scores` and `labels`, one tensor per image.
            batch: "boxes" and "target", and where there are any "ignored" (difficult boxes) and
                "crowd"; one tensor per image.
        """
        count = len(batch["target"])
        marks = [batch.get(name) or [None] * count for name in ("ignored", "crowd")]
        for boxes, scores, labels, true, kinds, ignored, crowd in zip(
            out["boxes"], out["scores"], out["labels"], batch["boxes"], batch["target"], *marks,
            strict=True,
        ):  # fmt: skip
            values = [v.detach().cpu() if v is not None else None
                      for v in (boxes, scores, labels, true, kinds, ignored, crowd)]  # fmt: skip
            self.add(*values)  # type: ignore[arg-type]

    def add(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        true: Tensor,
        kinds: Tensor,
        ignored: Tensor | None = None,
        crowd: Tensor | None = None,
    ) -> None:
        """Take one image in: detections (N, 4), (N,), (N,) and true boxes (M, 4), (M,)."""
        self.images += 1
        none = torch.zeros(len(kinds), dtype=torch.bool)
        spared = none if ignored is None else ignored.bool()
        crowd = none if crowd is None else crowd.bool()
        spared = spared | crowd
        for kind in torch.unique(torch.cat([labels, kinds])).tolist():
            own, real = labels == kind, kinds == kind
            self._add_class(
                int(kind), boxes[own].float(), scores[own].float(), true[real].float(),
                spared[real], crowd[real],
            )  # fmt: skip

    def _add_class(
        self, kind: int, boxes: Tensor, scores: Tensor, true: Tensor, spared: Tensor, crowd: Tensor
    ) -> None:
        for size, name in enumerate(SIZES):
            outside = spared | ~self._within(true, name)
            found, skipped = matched(
                boxes, scores, true, least=self.overlap, ignored=outside, crowd=crowd
            )
            # What finds nothing is a mistake of this size only where it has this size itself.
            counted = ~skipped & ((found >= 0) | self._within(boxes, name))
            self._seen.setdefault((size, kind), []).append((scores[counted], (found >= 0)[counted]))
            self.positives[size, kind] += float((~outside).sum())
            sure = (scores >= self.confident) & (found >= 0) & ~skipped
            self.missed[size, kind] += float((~outside).sum()) - float(sure.sum())
            if name == "all":
                self.false[kind] += float(((scores >= self.confident) & (found < 0)).sum())

    def _within(self, boxes: Tensor, name: str) -> Tensor:
        size = areas(boxes)
        low, high = {
            "all": (-1.0, float("inf")),
            "small": (-1.0, self.limits[0]),
            "medium": self.limits,
            "large": (self.limits[1], float("inf")),
        }[name]
        return (size >= low) & (size < high)

    # ---- several processes -----------------------------------------------------------------

    def totals(self) -> Tensor:
        """Everything gathered, as one tensor that may be added over processes."""
        flat = [t.reshape(-1) for t in (self._in_cells(), self.positives, self.missed, self.false)]
        return torch.cat([*flat, torch.tensor([self.images], dtype=torch.float64)])

    def take(self, totals: Tensor) -> None:
        """Replace what was gathered by that of all processes."""
        whole = totals.detach().to("cpu", torch.float64)
        cells = len(SIZES) * self.categories * 2 * _BINS
        rest = len(SIZES) * self.categories
        self._cells = whole[:cells].reshape(len(SIZES), self.categories, 2, _BINS)
        self.positives = whole[cells : cells + rest].reshape(len(SIZES), -1)
        self.missed = whole[cells + rest : cells + 2 * rest].reshape(len(SIZES), -1)
        self.false = whole[cells + 2 * rest : -1]
        self.images = float(whole[-1])

    def _in_cells(self) -> Tensor:
        """Right and wrong detections by size, class and score, best score first."""
        if self._cells is not None:
            return self._cells
        cells = torch.zeros(len(SIZES), self.categories, 2, _BINS, dtype=torch.float64)
        for (size, kind), pieces in self._seen.items():
            for scores, hits in pieces:
                place = ((1.0 - scores.double().clamp(0, 1)) * (_BINS - 1)).round().long()
                for row, chosen in enumerate((hits, ~hits)):
                    cells[size, kind, row] += torch.bincount(place[chosen], minlength=_BINS)
        return cells

    # ---- figures ---------------------------------------------------------------------------

    def by_class(self, size: str = "all", rule: Rule = "area") -> list[float]:
        """Average precision of each class; NaN where there is no true box."""
        place = SIZES.index(size)
        return [self._precision(place, kind, rule) for kind in range(self.categories)]

    def _precision(self, size: int, kind: int, rule: Rule) -> float:
        positives = float(self.positives[size, kind])
        if self._cells is not None:
            right, wrong = self._cells[size, kind].cumsum(1)
            return _area(right, wrong, positives, rule)
        pieces = self._seen.get((size, kind), [])
        scores = torch.cat([s for s, _ in pieces]) if pieces else torch.zeros(0)
        hits = torch.cat([h for _, h in pieces]) if pieces else torch.zeros(0, dtype=torch.bool)
        return average_precision(scores, hits, int(positives), rule)

    def compute(self) -> dict[str, float]:
        """The figures.

        Returns:
            `ap50` (or `ap75` ...: the mean over classes of the area), `ap50_voc11`, `ap50_small`
            and so on, `ap50_base` and `ap50_novel` where there are novel classes; of detections
            that score at least `confident`: `recall`, `recall_small`, `missed` and
            `missed_small` (true boxes not found), `false_alarms`. NaN where nothing is there to
            be found.
        """
        name = f"ap{round(100 * self.overlap)}"
        whole = self.by_class()
        figures = {name: _mean(whole), f"{name}_voc11": _mean(self.by_class(rule="voc11"))}
        for size in SIZES[1:]:
            figures[f"{name}_{size}"] = _mean(self.by_class(size))
        if self.novel:
            base = [k for k in range(self.categories) if k not in self.novel]
            figures[f"{name}_base"] = _mean([whole[k] for k in base])
            figures[f"{name}_novel"] = _mean([whole[k] for k in self.novel])
        for place, suffix in ((0, ""), (1, "_small")):
            positives, missed = float(self.positives[place].sum()), float(self.missed[place].sum())
            figures[f"recall{suffix}"] = 1.0 - missed / positives if positives else float("nan")
            figures[f"missed{suffix}"] = missed
        figures["false_alarms"] = float(self.false.sum())
        return figures


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are there."""
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")
