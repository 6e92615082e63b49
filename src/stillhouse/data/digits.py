"""scikit-learn's handwritten digits: embedded, no download, the default of the quickstart."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import torch

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
    tasks = ("classification",)
    licence = "CC BY 4.0 (UCI)"
    source = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, Alpaydin)"
    edition = "scikit-learn, test split of 360 by a fixed seed"
    rows: ClassVar = {"train": 1437, "test": 360}

    Options = DigitsOptions

    def open(self, options: DigitsOptions, seed: int) -> Splits:
        """Grey levels 0..16 become 0..255; splits "train" and "test"."""
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        levels = np.rint(np.asarray(images).reshape(-1, 1, 8, 8) * (255.0 / 16.0))
        pixels = torch.from_numpy(levels.astype(np.uint8))
        targets = torch.from_numpy(np.asarray(labels).astype(np.int64))
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
