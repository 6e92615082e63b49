"""Figures of a classifier: accuracy, the confusion matrix and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError

IGNORE = -100


def labelled(
    out: Mapping[str, Any], batch: Mapping[str, Any], *, logits: str = "logits"
) -> tuple[Tensor, Tensor]:
    """Logits and class numbers of the rows that carry a label.

    Args:
        out: a model's output; `out[logits]` is (..., classes), classes last.
        batch: `target` is (...) int64, or (..., classes) soft labels, of which the largest
            counts; -100 marks what has no label. An optional `mask` (...) bool leaves out
            where it is False.
        logits: the name of the logits in `out`.

    Returns:
        (N, classes) float logits and (N,) int64 targets on the logits' device.

    Raises:
        DataError: the shapes do not belong to each other; both are named.
    """
    scores: Tensor = out[logits]
    target: Tensor = batch["target"]
    if target.is_floating_point() and target.shape == scores.shape:
        target = target.argmax(-1)
    if target.shape != scores.shape[:-1]:
        raise DataError(
            f"logits of shape {tuple(scores.shape)} and targets of shape {tuple(target.shape)} "
            "do not fit: classes come last, and the targets have the shape of the rest"
        )
    scores = scores.detach().reshape(-1, scores.shape[-1])
    target = target.reshape(-1).to(scores.device)
    kept = target != IGNORE
    mask = batch.get("mask")
    if isinstance(mask, Tensor) and mask.numel() == target.numel():
        kept = kept & mask.reshape(-1).to(scores.device).bool()
    return scores[kept].float(), target[kept]


def sums(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Zeros to add up in: float64 (exact counts up to 2**53) where the device has it."""
    kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(count, dtype=kind, device=device)


def refuse_strange(rows: float) -> None:
    """Tell of labels out of range, which are counted on the device and seen at the end.

    Raises:
        DataError: `rows` is not 0.
    """
    if rows:
        raise DataError(
            f"{rows:.0f} rows carry a label that is no class of the model; labels run from 0 to "
            f"classes - 1, and {IGNORE} marks what has none"
        )


class Summed:
    """A metric whose state is one vector of sums, kept on the device of what it sees.

    Nothing is synchronised before `compute`. Sums of several processes are added between
    `totals` and `take`.

    Args:
        count: length of the vector of sums.
    """

    higher_is_better: bool = True

    def __init__(self, count: int) -> None:
        self._sums = sums(count)
        self._seen = False

    def totals(self) -> Tensor:
        """The sums so far; on the CPU while no batch has been seen."""
        return self._sums.clone()

    def take(self, totals: Tensor) -> None:
        """Replace the sums by those of all processes.

        Raises:
            DataError: a vector of another length.
        """
        if totals.numel() != self._sums.numel():
            raise DataError(
                f"{type(self).__name__} keeps {self._sums.numel()} sums, not {totals.numel()}"
            )
        self._sums = totals.reshape(-1)

    def add(self, values: Tensor) -> None:
        """Add a batch's sums."""
        if not self._seen and self._sums.device != values.device:
            self._sums = sums(self._sums.numel(), values.device)
        self._seen = True
        self._sums = self._sums + values.to(self._sums)

    def numbers(self) -> list[float]:
        """The sums as Python numbers: the one synchronisation."""
        values: list[float] = self._sums.tolist()
        return values


class Accuracy(Summed):
    """Share of rows whose label is among the k largest logits.

    Equal logits are ranked against the row: a model that answers the same for all classes
    is never right. So is a row with a NaN.

    Args:
        top: the k to report; `accuracy` is k = 1, `top5` is k = 5. A k that is not smaller
            than the number of classes is 1 by definition and left out.
    """

    def __init__(self, top: Sequence[int] = (1, 5)) -> None:
        if not top or min(top) < 1:
            raise DataError(f"top-k accuracy needs k >= 1, not {list(top)}")
        self.top = tuple(top)
        super().__init__(len(self.top) + 3)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in; see `labelled`."""
        logits, target = labelled(out, batch)
        classes = logits.shape[-1]
        inside = (target >= 0) & (target < classes)
        own = logits.gather(1, target.clamp(0, classes - 1)[:, None])
        # NaN compares False with everything: such a row must not count as right.
        rank = (~(logits < own)).sum(1) - 1
        right = [((rank < k) & inside).sum() for k in self.top]
        rows = torch.tensor(target.numel(), device=logits.device)
        self.add(torch.stack([*right, rows, rows * classes, (~inside).sum()]))

    def compute(self) -> dict[str, float]:
        """`accuracy` and `top<k>`; NaN when nothing was labelled.

        Raises:
            DataError: labels out of range were met.
        """
        *right, rows, weighted, strange = self.numbers()
        refuse_strange(strange)
        classes = weighted / rows if rows else float("inf")
        return {
            "accuracy" if k == 1 else f"top{k}": hits / rows if rows else float("nan")
            for k, hits in zip(self.top, right, strict=True)
            if k == 1 or k < classes
        }


class Confusion(Summed):
    """How often a row of one class was taken for another, and the macro F1 of it.

    Args:
        classes: number of classes C.
        labels: their names, for the report.

    Raises:
        DataError: fewer than two classes, or another number of names.
    """

    def __init__(self, classes: int, labels: Sequence[str] | None = None) -> None:
        if classes < 2:
            raise DataError(f"a confusion matrix needs two classes or more, not {classes}")
        if labels is not None and len(labels) != classes:
            raise DataError(f"{len(labels)} names for {classes} classes")
        self.classes = classes
        self.labels = [str(i) for i in range(classes)] if labels is None else list(labels)
        super().__init__(classes * classes + 1)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in; see `labelled`.

        Raises:
            DataError: the logits have another number of classes.
        """
        logits, target = labelled(out, batch)
        if logits.shape[-1] != self.classes:
            raise DataError(
                f"logits for {logits.shape[-1]} classes, where {self.classes} are known"
            )
        # A label out of range goes to the last cell and is told in `compute`, without a
        # synchronisation per batch.
        inside = (target >= 0) & (target < self.classes)
        cell = torch.where(
            inside, target * self.classes + logits.argmax(-1), self.classes * self.classes
        )
        ones = torch.ones_like(cell, dtype=self._sums.dtype)
        counts = sums(self.classes * self.classes + 1, logits.device)
        self.add(counts.index_add_(0, cell, ones.to(counts)))

    def matrix(self) -> list[list[int]]:
        """Counts: rows are true classes, columns what was answered.

        Raises:
            DataError: labels out of range were met.
        """
        values = [round(v) for v in self.numbers()]
        refuse_strange(values[-1])
        c = self.classes
        return [values[row * c : (row + 1) * c] for row in range(c)]

    def compute(self) -> dict[str, float]:
        """`macro_f1`: the mean over classes of 2TP / (2TP + FP + FN).

        A class that neither occurs nor is answered has no F1 and is left out of the mean.
        NaN when nothing was labelled.

        Raises:
            DataError: labels out of range were met.
        """
        matrix = self.matrix()
        scores = []
        for k in range(self.classes):
            occurs = sum(matrix[k])
            answered = sum(row[k] for row in matrix)
            if occurs + answered:
                scores.append(2 * matrix[k][k] / (occurs + answered))
        return {"macro_f1": sum(scores) / len(scores) if scores else float("nan")}

    def record(self) -> dict[str, Any]:
        """The matrix as a run's report takes it: {"labels", "matrix"}."""
        return {"labels": list(self.labels), "matrix": self.matrix()}
