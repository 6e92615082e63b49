"""CIFAR-10: 60,000 colour images of 32x32 in ten classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import found_or_fetched, torchvision_datasets
from stillhouse.data.image_arrays import (
    array_of,
    encoded,
    image_splits,
    open_npz,
    rows_in_blob,
    stored_edition,
    write_npz,
)
from stillhouse.data.options import ImageOptions

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Cifar10(DataSet[ImageOptions]):
    """CIFAR-10 as encoded images in one npz file.

    `{train,test}_blob` (bytes of all images), `_off` (N + 1 offsets), `_labels`, `classes`,
    and, in files converted here, `edition`. Images are JPEG in the copy that is known by its
    hash (its pixels are lossy: published checkpoints lose about ten points on it), PNG in a
    converted download (the original pixels).
    """

    name = "cifar10"
    title = "50,000 + 10,000 colour images of 32x32 in ten classes"
    tasks = ("classification", "image-generation")
    licence = "none stated (Krizhevsky 2009)"
    source = "torchvision CIFAR10 (www.cs.toronto.edu/~kriz/cifar.html)"
    files = ("cifar10/cifar10_png.npz", "cifar10/cifar10_jpg.npz")
    editions: ClassVar = {
        "b869bc482111b437659a64d2b453ec888f499b7c3df06bc475897b469a9e57ed": "jpeg copy"
    }
    rows: ClassVar = {"train": 50_000, "test": 10_000}
    get = "with a network it is downloaded by torchvision and converted on first use"

    Options = ImageOptions

    def open(self, options: ImageOptions, seed: int) -> Splits:
        """Splits "train" and "test"; only the rows that are kept are decoded."""
        path = found_or_fetched(self, download, file=self.files[0])
        digest = content_hash(path)
        with open_npz(path) as stored:
            labels = {r: array_of(stored, f"{r}_labels", path) for r in ("train", "test")}
            classes = [str(name) for name in array_of(stored, "classes", path)]

        def blob(role: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            with open_npz(path) as stored:
                content = array_of(stored, f"{role}_blob", path)
                return content, array_of(stored, f"{role}_off", path)

        official = {
            role: rows_in_blob(
                partial(blob, role),
                labels[role],
                shape=(3, 32, 32),
                cache=f"cifar10-{role}-{digest[:24]}",
                where=f"{path}, {role}",
            )
            for role in ("train", "test")
        }
        return image_splits(
            self,
            official,
            options,
            classes=classes,
            digest=digest,
            edition=self.edition_of(digest, stored_edition(path)),
            mean=MEAN,
            std=STD,
        )


def download(scratch: Path, target: Path) -> None:
    """Download by torchvision and convert."""
    sets = {
        role: torchvision_datasets().CIFAR10(str(scratch), train=role == "train", download=True)
        for role in ("train", "test")
    }
    convert({role: (s.data, np.asarray(s.targets)) for role, s in sets.items()}, target)


def convert(splits: dict[str, tuple[NDArray[Any], NDArray[Any]]], target: Path) -> None:
    """Write images (N, 32, 32, 3) uint8 and labels (N,) by split in the one form on disk.

    Pixels are kept exactly (PNG).
    """
    arrays: dict[str, NDArray[Any]] = {"classes": np.array(CLASSES)}
    for role, (images, labels) in splits.items():
        arrays[f"{role}_blob"], arrays[f"{role}_off"] = encoded(images)
        arrays[f"{role}_labels"] = labels.astype(np.uint8)
    arrays["edition"] = np.array("original pixels")
    write_npz(target, arrays)
