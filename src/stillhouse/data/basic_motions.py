"""BasicMotions: a smart watch's accelerometer and gyroscope, four activities."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.roots import find_file, missing
from stillhouse.data.series import SeriesOptions, series_splits
from stillhouse.errors import DataError
from stillhouse.parts.series import windows

SENSORS = {"acc": ("acc_x", "acc_y", "acc_z"), "gyro": ("gyro_x", "gyro_y", "gyro_z")}
CHANNELS = (*SENSORS["acc"], *SENSORS["gyro"])
_VAL_SHARE = 0.2


class BasicMotionsOptions(SeriesOptions):
    """Options of BasicMotions."""

    window: int = Field(50, ge=4, le=100, description="points of a window, at 10 Hz")
    stride: int = Field(10, ge=1, description="points from one window to the next")


class BasicMotions(DataSet[BasicMotionsOptions]):
    """BasicMotions (UEA archive): 40 + 40 recordings of 10 s at 10 Hz, cut into windows.

    `BasicMotions_{TRAIN,TEST}.ts`. All windows of a recording are on one side: of each
    activity's recordings the last fifth is validation, and `part` divides the others.
    """

    name = "basic_motions"
    title = "80 recordings of a smart watch (6 x 100), four activities"
    tasks = ("representation",)
    licence = "none stated (UEA archive); package aeon BSD-3"
    source = "UEA & UCR time series archive, BasicMotions; PyPI aeon"
    files = ("har/BasicMotions_TRAIN.ts",)
    editions: ClassVar = {
        "8dc43cc6306cb679c888c01e26f91772ac4441a916da43bac8b79734a538b9d6": "aeon 1.6.0"
    }
    rows: ClassVar = {"train": 40, "test": 40}
    get = "pip install aeon brings it"

    Options = BasicMotionsOptions

    def open(self, options: BasicMotionsOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test" of windows."""
        path = _found(self)
        other = path.with_name(path.name.replace("TRAIN", "TEST"))
        if not other.exists():
            raise DataError(f"{other} is missing beside {path}")
        (series, labels, classes), (test, test_labels, _) = read_ts(path), read_ts(other)
        held, first = _divided(labels, options.pretrain)
        official = {
            "train": _windowed(series[~held], labels[~held], options),
            "val": _windowed(series[held], labels[held], options),
            "test": _windowed(test, test_labels, options),
        }
        each = len(official["train"][1]) // int((~held).sum())
        digest = content_hash(path)
        both = hashlib.sha256(f"{digest}{content_hash(other)}".encode()).hexdigest()
        return series_splits(
            self,
            official,
            options,
            channels=CHANNELS,
            groups=SENSORS,
            classes=classes,
            digest=both,
            edition=f"basic_motions ({self.edition_of(digest)})",
            pretrain=first[~held].repeat_interleave(each),
        )


def _found(data: BasicMotions) -> Path:
    found = find_file(data.files)
    if found is not None:
        return found
    spec = find_spec("aeon")
    if spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "datasets/data/BasicMotions/BasicMotions_TRAIN.ts"
        if own.exists():
            return own
    raise missing(data.name, data.files, get=data.get, tried="the package aeon is not there")


def _divided(labels: Tensor, pretrain: float) -> tuple[Tensor, Tensor]:
    """(validation, set aside for teachers) as flags of recordings, activity by activity."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    first = torch.zeros(len(labels), dtype=torch.bool)
    for value in torch.unique(labels):
        own = (labels == value).nonzero()[:, 0]
        rest = len(own) - max(1, round(len(own) * _VAL_SHARE))
        held[own[rest:]] = True
        first[own[: max(1, round(rest * pretrain))]] = True
    return held, first


def _windowed(
    series: Tensor, labels: Tensor, options: BasicMotionsOptions
) -> tuple[Tensor, Tensor]:
    """The windows of all recordings, those of one beside each other, and their labels."""
    parts = windows(series, options.window, options.stride)  # (n, N, C, window)
    return parts.transpose(0, 1).flatten(0, 1), labels.repeat_interleave(len(parts))


def read_ts(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """A `.ts` file of the UEA archive with series of equal length.

    Returns:
        ((N, C, T) float32, (N,) int64, names of the classes).

    Raises:
        DataError: no such form, missing values, or series that differ.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    classes: list[str] = []
    series, labels = [], []
    begun = False
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        if not begun:
            if word.lower().startswith("@classlabel"):
                classes = word.split()[2:]
            begun = word.lower() == "@data"
            continue
        *dimensions, label = word.split(":")
        try:
            series.append([[float(v) for v in d.split(",")] for d in dimensions])
            labels.append(classes.index(label.strip()))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    shapes = {(len(s), *{len(d) for d in s}) for s in series}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise DataError(f"{path}: series of equal length are needed, found {sorted(shapes)[:4]}")
    return torch.tensor(series), torch.tensor(labels), classes
