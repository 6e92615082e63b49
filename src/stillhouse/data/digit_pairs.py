"""A problem of 100 classes made of real pixels: two MNIST digits side by side."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import found_or_fetched
from stillhouse.data.image_arrays import ImageRows, grey_npz, image_splits
from stillhouse.data.mnist5k import MEAN, STD, Mnist5k, MnistOptions, download
from stillhouse.data.splitting import stratified
from stillhouse.errors import DataError

_VAL_DIGITS = 0.2


class PairOptions(MnistOptions):
    """Options of the digit pairs."""

    image_size: None = Field(None, description="not used here: pairs are 28x56")
    train_pairs: int = Field(10_000, ge=100, description="training pairs, equally many per class")
    val_pairs: int = Field(1_000, ge=100, description="pairs for validation")
    test_pairs: int = Field(2_000, ge=100, description="pairs for the test")
    pair_seed: int = Field(0, description="which digits stand together; not the run's seed")


class DigitPairs(DataSet[PairOptions]):
    """Pairs of MNIST digits of 28x56; the class of digits a and b is 10 a + b.

    Many classes with honest labels, for methods whose effect needs them (dhkd's sheet,
    "Demonstration at small scale"). Train, validation and test pairs are made of different
    digits: a fifth of the training digits serve validation only. A digit may stand in several
    pairs.
    """

    name = "digit_pairs"
    title = "two MNIST digits side by side (28x56), 100 classes"
    tasks = ("classification",)
    licence = "none stated (LeCun, Cortes, Burges)"
    source = "built from mnist5k by a fixed seed"
    files = ("mnist5k/mnist5k.npz",)
    edition = "built from mnist5k"
    rows: ClassVar = {"train": 10_000, "val": 1_000, "test": 2_000}
    get = "it is built from mnist5k, which see"

    Options = PairOptions

    def open(self, options: PairOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test"."""
        path = found_or_fetched(Mnist5k(), download)
        digits = grey_npz(path)
        held = torch.zeros(len(digits["train"].labels), dtype=torch.bool)
        rng = generator(options.pair_seed, "digit pairs", "val digits")
        count = round(_VAL_DIGITS * len(held))
        held[stratified(digits["train"].labels, count, rng)] = True
        pools = {
            "train": ("train", (~held).nonzero()[:, 0], options.train_pairs),
            "val": ("train", held.nonzero()[:, 0], options.val_pairs),
            "test": ("test", torch.arange(len(digits["test"].labels)), options.test_pairs),
        }
        official = {
            role: paired(
                digits[origin], rows, count, generator(options.pair_seed, "digit pairs", role)
            )
            for role, (origin, rows, count) in pools.items()
        }
        return image_splits(
            self,
            official,
            options,
            classes=[f"{left}{right}" for left in range(10) for right in range(10)],
            digest=content_hash(path),
            edition=f"{self.edition}, pair seed {options.pair_seed}",
            mean=MEAN,
            std=STD,
        )


def paired(digits: ImageRows, rows: Tensor, count: int, rng: Generator) -> ImageRows:
    """Random pairs of digits, the classes as even as `count` allows.

    Args:
        digits: pixels and labels to draw from.
        rows: positions of the digits that may be used.
        count: number of pairs.
        rng: the chance.

    Raises:
        DataError: a digit that is not among `rows`.
    """
    whole, rest = divmod(count, 100)
    classes = torch.cat(
        [torch.arange(100).repeat(whole), torch.randperm(100, generator=rng)[:rest]]
    )
    classes = classes[torch.randperm(count, generator=rng)]
    sides = [_digits_of(digits.labels, rows, side, rng) for side in (classes // 10, classes % 10)]

    def read(chosen: Tensor) -> Tensor:
        return torch.cat([digits.read(side[chosen]) for side in sides], dim=-1)

    return ImageRows(classes, read)


def _digits_of(labels: Tensor, rows: Tensor, wanted: Tensor, rng: Generator) -> Tensor:
    """For each wanted digit the position of a random one."""
    found = torch.empty_like(wanted)
    for digit in range(10):
        own = rows[labels[rows] == digit]
        places = (wanted == digit).nonzero()[:, 0]
        if len(own) == 0:
            raise DataError(f"digit_pairs: there is no digit {digit} to draw from")
        found[places] = own[torch.randint(len(own), (len(places),), generator=rng)]
    return found
