"""UCI-HAR: a smart phone at the waist, its accelerometer and gyroscope, six activities."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, found_or_fetched
from stillhouse.data.image_arrays import array_of, open_npz, stored_edition, write_npz
from stillhouse.data.series import SeriesOptions, series_splits
from stillhouse.errors import DataError

_URL = (
    "https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip"
)
SENSORS = ("body_acc", "body_gyro", "total_acc")
CHANNELS = tuple(f"{sensor}_{axis}" for sensor in SENSORS for axis in "xyz")
CLASSES = (
    "WALKING",
    "WALKING_UPSTAIRS",
    "WALKING_DOWNSTAIRS",
    "SITTING",
    "STANDING",
    "LAYING",
)
_VAL = 1 / 6


class UciHar(DataSet[SeriesOptions]):
    """UCI-HAR (Anguita et al. 2013): `{train,test}_x` (N, 9, 128), `_y`, `channels`, `classes`.

    Windows of 2.56 s at 50 Hz, each overlapping its neighbour by half, in the order of the
    people who were recorded. So that no window of a person is on two sides, validation is the
    last sixth of train, and `part` divides the rest at one place too.
    """

    name = "uci_har"
    title = "activities from a phone's accelerometer and gyroscope, windows of 9 x 128"
    tasks = ("representation",)
    licence = "CC BY 4.0"
    source = "UCI Machine Learning Repository 240; a part of it: GitHub mokch/0814_edu"
    files = ("har/uci_har.npz", "har/uci_har_subset.npz")
    editions: ClassVar = {
        "1c39180f727d224992a393293dcc6e7a3e5970d4cd90a004916dfe3d31f93d60": "3,350 windows"
    }
    rows: ClassVar = {"train": 2_400, "test": 950}
    get = "with a network it is downloaded on first use (all 10,299 windows)"

    Options = SeriesOptions

    def open(self, options: SeriesOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test"."""
        path = found_or_fetched(self, download, file=self.files[0])
        digest = content_hash(path)
        stored = open_npz(path)
        channels = [str(c) for c in array_of(stored, "channels", path)]
        classes = [str(c) for c in array_of(stored, "classes", path)]
        parts = {role: _rows(stored, role, len(channels), path) for role in ("train", "test")}
        series, labels = parts["train"]
        cut = len(series) - round(len(series) * _VAL)
        official = {
            # A window at the cut overlaps its neighbour by half, so it is on no side.
            "train": (series[: cut - 1], labels[: cut - 1]),
            "val": (series[cut:], labels[cut:]),
            "test": parts["test"],
        }
        first = round((cut - 1) * options.pretrain)
        groups = {s: [c for c in channels if c.startswith(s + "_")] for s in SENSORS}
        return series_splits(
            self,
            official,
            options,
            channels=channels,
            groups=groups,
            classes=classes,
            digest=digest,
            edition=f"uci_har ({self.edition_of(digest, stored_edition(path))})",
            pretrain=torch.arange(cut - 1) < first,
        )


def _rows(stored: Any, role: str, channels: int, path: Path) -> tuple[Tensor, Tensor]:
    series, labels = (array_of(stored, f"{role}_{what}", path) for what in "xy")
    if series.ndim != 3 or series.shape[1] != channels or labels.shape != series.shape[:1]:
        raise DataError(
            f"{path}: {role} holds windows of shape {series.shape} and labels of shape "
            f"{labels.shape}; (N, {channels}, T) and (N,) are needed"
        )
    return (
        torch.from_numpy(series.astype(np.float32)),
        torch.from_numpy(labels.astype(np.int64)),
    )


def download(scratch: Path, target: Path) -> None:
    """Fetch the archive of the repository and write its windows in the one form on disk."""
    archive = scratch / "uci_har.zip"
    download_file(_URL, archive)
    convert(archive, target)


def convert(archive: Path, target: Path) -> None:
    """Write the npz file from the published archive, which may hold another one.

    Args:
        archive: with `UCI HAR Dataset/{train,test}/Inertial Signals/*.txt` and `y_*.txt`.
        target: the npz file to write.

    Raises:
        DataError: files are missing.
    """
    opened = zipfile.ZipFile(archive)
    inner = [n for n in opened.namelist() if n.endswith("UCI HAR Dataset.zip")]
    if inner:
        opened = zipfile.ZipFile(io.BytesIO(opened.read(inner[0])))
    arrays: dict[str, NDArray[Any]] = {
        "edition": np.array("all windows"),
        "channels": np.array(CHANNELS),
        "classes": np.array(CLASSES),
    }
    for role in ("train", "test"):
        signals = [
            _numbers(opened, f"{role}/Inertial Signals/{channel}_{role}.txt", archive)
            for channel in CHANNELS
        ]
        arrays[f"{role}_x"] = np.stack(signals, 1).astype(np.float16)
        labels = _numbers(opened, f"{role}/y_{role}.txt", archive)
        arrays[f"{role}_y"] = (labels.reshape(-1) - 1).astype(np.uint8)
    write_npz(target, arrays)


def _numbers(opened: zipfile.ZipFile, name: str, archive: Path) -> NDArray[Any]:
    found = [n for n in opened.namelist() if n.endswith(name)]
    if not found:
        raise DataError(f"{archive} holds no file {name}")
    numbers: NDArray[Any] = np.loadtxt(io.BytesIO(opened.read(found[0])), ndmin=2)
    return numbers
