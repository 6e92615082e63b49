"""What is looked at before any training: that data is there, labelled, in range and finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Source, Splits, Subset, TensorSource, read_rows
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError
from stillhouse.metrics.classification import IGNORE

_WHOLE = 100_000_000  # numbers that are looked at one by one; beyond it, a sample of rows
_SAMPLE = 512  # rows of it
_LAZY = 8  # rows of a source that has to read or decode


def check_splits(splits: Splits, *, classes: int | None = None) -> None:
    """Look at every split; what can be told of labels and values without training.

    Data in memory is looked at whole up to 100 million numbers, then by a sample; a source
    that reads on demand by its first rows. "test" is looked at too: nothing is chosen by it.

    Args:
        splits: the data.
        classes: number of classes; those of `splits.about["classes"]` when not given.

    Raises:
        DataError: an empty split, labels that are missing, out of range or all of one class,
            values that are not finite or of a type no model takes; names data, split and row.
    """
    names = splits.about.get("classes")
    if classes is None and names is not None:
        classes = len(names)
    opened = splits.judging()
    for role in opened:
        source = opened[role]
        where = f"{splits.edition or 'the data'}, split '{role}'"
        if len(source) == 0:
            raise DataError(f"{where}: it is empty")
        # A class for every pixel (there is a label to ignore) is looked at where it is opened.
        one_label = classes is not None and "ignore" not in splits.about
        if classes is not None and one_label and role in {"train", "val", "test"}:
            check_labels(labels_of(source), classes, where, several=role == "train")
        check_views(source, where)


def check_labels(labels: Tensor | None, classes: int, where: str, *, several: bool = False) -> None:
    """Refuse labels that no classifier can be trained on.

    Args:
        labels: (N,) int64, -100 on rows that carry none; None where there are none that can be
            told beforehand.
        classes: how many classes there are.
        where: data and split, for the error.
        several: more than one class must occur.

    Raises:
        DataError: see above.
    """
    if labels is None:
        raise DataError(f"{where}: no class labels (a view 'target' of whole numbers, one a row)")
    carried = labels != IGNORE
    if not bool(carried.any()):
        raise DataError(f"{where}: none of its {len(labels)} rows carries a label")
    wrong = (carried & ((labels < 0) | (labels >= classes))).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise DataError(
            f"{where}, row {row}: the label {int(labels[row])} is out of range; there are "
            f"{classes} classes, numbered 0 to {classes - 1} ({len(wrong)} such rows)"
        )
    labels = labels[carried]
    if several and len(torch.unique(labels)) < 2:
        raise DataError(
            f"{where}: all {len(labels)} labels are {int(labels[0])}; at least two classes must "
            "occur in it"
        )


def check_views(source: Source, where: str) -> None:
    """Refuse values that are not finite, and types that no model takes.

    Raises:
        DataError: names the view and the row.
    """
    rows: Tensor | None = None
    inner = source
    while isinstance(inner, Subset):
        rows = inner.rows if rows is None else inner.rows[rows]
        inner = inner.source
    if isinstance(inner, TensorSource):
        _check_all(_rows_of(inner.views, rows), where)
        return
    first = torch.arange(min(_LAZY, len(source)))
    try:
        batch = read_rows(source, first, None)
    except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
        raise DataError(
            f"{where}: its first rows cannot be read: {type(error).__name__}: {error}"
        ) from error
    _check_all({key: value for key, value in batch.items() if isinstance(value, Tensor)}, where)


def _rows_of(views: Mapping[str, Any], rows: Tensor | None) -> dict[str, Tensor]:
    tensors = {key: value for key, value in views.items() if isinstance(value, Tensor)}
    if rows is None:
        return tensors
    return {
        key: value.index_select(0, rows.to(value.device)) if value.is_floating_point() else value
        for key, value in tensors.items()
    }


def _check_all(views: Mapping[str, Tensor], where: str) -> None:
    for name, value in views.items():
        if value.is_complex():
            raise DataError(f"{where}: the view '{name}' holds complex numbers ({value.dtype})")
        if value.is_floating_point():
            check_finite(value, f"{where}, view '{name}'")


def check_finite(value: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Args:
        value: (N, ...) floating point.
        where: data, split and view, for the error.

    Raises:
        DataError: names the first row, and what is in it.
    """
    rows = torch.arange(len(value))
    if value.numel() > _WHOLE:
        # Evenly spread; the guard of the training loop watches for the rest.
        rows = torch.unique(torch.linspace(0, len(value) - 1, _SAMPLE).long())
        value = value.index_select(0, rows.to(value.device))
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return
    row = int(bad.reshape(len(value), -1).any(1).nonzero()[0, 0])
    found = value[row].reshape(-1)[bad[row].reshape(-1)][0].item()
    raise DataError(
        f"{where}, row {int(rows[row])}: holds {found} ({int(bad.sum())} such values among those "
        "looked at)"
    )
