"""scikit-learn's handwritten digits: embedded, no download, the default of the quickstart."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.cached import tensors_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_arrays import ImageRows, image_splits
from stillhouse.data.options import Augment, ImageOptions
from stillhouse.data.splitting import stratified

_TEST = 360


class DigitsOptions(ImageOptions):
    """Options of the digits."""

    standard_augment: ClassVar[Augment] = "crop"
    flips: ClassVar[bool] = False


class Digits(DataSet[DigitsOptions]):
    """1,797 digits of 8x8 with 17 grey levels; 360 of them, drawn class by class, are test.

    The source has no test split; ours is fixed, the same for every run's seed.
    """

    name = "digits"
    title = "1,797 handwritten digits of 8x8, embedded in scikit-learn"
    tasks = ("classification", "image-generation")
    licence = "CC BY 4.0 (UCI)"
    source = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, Alpaydin)"
    edition = "scikit-learn, test split of 360 by a fixed seed"
    rows: ClassVar = {"train": 1437, "test": 360}

    Options = DigitsOptions

    def open(self, options: DigitsOptions, seed: int) -> Splits:
        """Grey levels 0..16 become 0..255; splits "train" and "test"."""
        table = embedded_table()
        levels = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255.0 / 16.0))
        pixels = torch.from_numpy(levels.astype(np.uint8))
        targets = torch.from_numpy(table[:, -1].astype(np.int64))
        held = torch.zeros(len(targets), dtype=torch.bool)
        held[stratified(targets, _TEST, generator("digits", "test"))] = True
        official = {
            role: ImageRows(targets[keep], partial(pixels[keep].index_select, 0))
            for role, keep in (("train", ~held), ("test", held))
        }
        return image_splits(
            self,
            official,
            options,
            classes=[str(digit) for digit in range(10)],
            digest=tensors_hash({"images": pixels, "labels": targets}),
            edition=self.edition,
        )


def embedded_table() -> NDArray[np.float64]:
    """scikit-learn's digits: (1797, 65), 64 grey levels 0..16 and the digit.

    The file inside the package is read as it is: importing scikit-learn takes seconds, which
    a run of a minute and a half should not pay. Where the file is not, `load_digits` is asked.
    """
    package = find_spec("sklearn")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(images), np.asarray(labels)])
