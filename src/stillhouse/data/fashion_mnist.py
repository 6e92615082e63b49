"""Fashion-MNIST: grey images of 28x28 of ten kinds of clothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import found_or_fetched, torchvision_datasets
from stillhouse.data.image_arrays import (
    grey_npz,
    image_splits,
    stored_edition,
    write_npz,
)
from stillhouse.data.options import ImageOptions

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


class FashionMnist(DataSet[ImageOptions]):
    """Fashion-MNIST in one npz file: `{train,test}_images` (N, 28, 28) uint8, `_labels`."""

    name = "fashion_mnist"
    title = "grey images of 28x28 of ten kinds of clothing, lossless"
    tasks = ("classification", "image-generation")
    licence = "MIT (Zalando SE 2017)"
    source = "torchvision FashionMNIST (github.com/zalandoresearch/fashion-mnist)"
    files = ("fashion_mnist/fashion_mnist.npz",)
    editions: ClassVar = {
        "af530252332714aa797bffc8e2d9ea284e14b2f9f7a8dd529247d31d3013099a": "first 12,000 + 4,000"
    }
    rows: ClassVar = {"train": 12_000, "test": 4_000}
    get = "with a network it is downloaded by torchvision and converted on first use"

    Options = ImageOptions

    def open(self, options: ImageOptions, seed: int) -> Splits:
        """Splits "train" and "test"."""
        path = found_or_fetched(self, download)
        digest = content_hash(path)
        return image_splits(
            self,
            grey_npz(path),
            options,
            classes=CLASSES,
            digest=digest,
            edition=self.edition_of(digest, stored_edition(path)),
            mean=(0.2860,),
            std=(0.3530,),
        )


def download(scratch: Path, target: Path) -> None:
    """Download by torchvision and convert."""
    sets = {
        role: torchvision_datasets().FashionMNIST(
            str(scratch), train=role == "train", download=True
        )
        for role in ("train", "test")
    }
    convert({r: (s.data.numpy(), s.targets.numpy()) for r, s in sets.items()}, target)


def convert(splits: dict[str, tuple[NDArray[Any], NDArray[Any]]], target: Path) -> None:
    """Write images (N, 28, 28) uint8 and labels (N,) by split in the one form on disk."""
    arrays: dict[str, NDArray[Any]] = {}
    for role, (images, labels) in splits.items():
        arrays[f"{role}_images"] = images.astype(np.uint8)
        arrays[f"{role}_labels"] = labels.astype(np.uint8)
    counts = " + ".join(f"{len(labels):,}" for _, labels in splits.values())
    arrays["edition"] = np.array(f"whole, {counts}")
    write_npz(target, arrays)
