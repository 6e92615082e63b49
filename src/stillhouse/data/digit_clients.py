"""Five clients with real digits of five kinds: the same classes, honest shifts of domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor
from torch.nn import functional as F

from stillhouse.batch import Source, Splits
from stillhouse.clock import generator
from stillhouse.data.clients import joined_clients, with_own_val
from stillhouse.data.data_set import DataSet
from stillhouse.data.digits import embedded_table
from stillhouse.data.downloads import found_or_fetched
from stillhouse.data.image_arrays import ImageRows, ImageSource, grey_npz, resized
from stillhouse.data.image_files import ImageFiles, decode_image
from stillhouse.data.mnist5k import CLASSES, Mnist5k, download
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import find_file, missing
from stillhouse.data.splitting import stratified
from stillhouse.data.super_resolution import Bsd100
from stillhouse.errors import DataError, RecipeError, nearest

NAMES = ("mnist", "uci", "photo", "turned", "noisy")
_SHARDS = ("mnist", "photo", "turned", "noisy")  # each has a share of MNIST-5k of its own
_SIDE = 28
_ANGLE, _BLUR = 30.0, 1.0  # degrees; pixels
_NOISE = 0.1  # share of pixels that are salt or pepper
_TEST_PHOTOS = 20


class DigitClientsOptions(DataOptions):
    """Options of the digit clients."""

    clients: list[str] = Field(
        default_factory=lambda: list(NAMES), min_length=1, description="which of the five, in order"
    )
    per_client: int = Field(
        800, ge=20, le=1000, description="training rows of each client, validation rows included"
    )
    per_test: int = Field(250, ge=10, le=250, description="test rows of each client")
    image_size: int = Field(_SIDE, ge=8, le=64, description="height and width in pixels")
    channels: Literal[1, 3] = Field(3, description="grey (1) or colour (3)")
    val: Literal[0] = Field(0, description="not used here: see client_val")
    client_val: int | float | None = Field(
        None,
        description="rows (integer) or share (below 1) of each client's training rows that are "
        "carved off for validation by the run's seed, 0 for none; a tenth when not said",
    )

    @field_validator("clients")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in NAMES:
                raise ValueError(f"no client '{name}'{nearest(name, NAMES)}")
        if len(set(value)) < len(value):
            raise ValueError("a client is named twice")
        return value


class DigitClients(DataSet[DigitClientsOptions]):
    """Disjoint shards of MNIST-5k and scikit-learn's digits, each with a look of its own.

    - mnist: as they are;
    - uci: scikit-learn's digits of 8x8, enlarged;
    - photo: the absolute difference of a digit and a crop of a photograph (the recipe of MNIST-M,
      Ganin and Lempitsky 2015); photographs of train and test differ;
    - turned: by 30 degrees, then blurred (Gaussian of one pixel);
    - noisy: strokes thickened (a maximum over 3x3), then a tenth of the pixels black or white.

    Shards, looks and test rows depend on no seed; validation rows are carved off each client's
    own training rows by the run's. Images are normalised by 0.5 and 0.5, as in the released
    FedLGD.
    """

    name = "digit_clients"
    title = "digits of five clients: MNIST, UCI, on photographs, turned and blurred, noisy"
    tasks = ("classification",)
    licence = "none stated (MNIST; BSDS non-commercial research); CC BY 4.0 (UCI)"
    source = "built from mnist5k, scikit-learn's digits and bsd100"
    files = ("mnist5k/mnist5k.npz",)
    edition = "built from mnist5k, digits and bsd100"
    rows: ClassVar = {"train": 4_000, "test": 1_250}
    get = "it is built from mnist5k and bsd100, which see"

    Options = DigitClientsOptions

    def open(self, options: DigitClientsOptions, seed: int) -> Splits:
        """Every client's splits "train", "val" and "test", one after another."""
        made = {name: self._client(options, seed, name) for name in options.clients}
        return self._joined(made)

    def open_client(self, options: DigitClientsOptions, seed: int, client: str) -> Splits:
        """The splits of one client."""
        if client not in options.clients:
            hint = nearest(client, options.clients)
            raise RecipeError(f"digit_clients has no client '{client}'{hint}")
        return self._joined({client: self._client(options, seed, client)})

    def _joined(self, made: Mapping[str, Splits]) -> Splits:
        told = f"{self.name} ({', '.join(made)})"
        found = joined_clients(made, edition=told)
        found.about["source"] = self.source
        return found

    def _client(self, options: DigitClientsOptions, seed: int, name: str) -> Splits:
        wanted = {"train": options.per_client, "test": options.per_test}
        rows = _uci(wanted) if name == "uci" else _shard(name, wanted)
        sources: dict[str, Source] = {}
        for role, own in rows.items():
            images = own.read(torch.arange(len(own.labels)))
            images = LOOKS[name](images, role, generator("digit clients", name, role))
            images = resized(images, options.image_size, options.channels)
            sources[role] = ImageSource(
                {"x": images, "target": own.labels},
                ids=torch.arange(len(own.labels)) + (0 if role == "train" else 1000),
                name=f"digit_clients/{name}/{role}",
            )
        shape = [options.channels, options.image_size, options.image_size]
        about = {"classes": list(CLASSES), "input": shape, "licence": self.licence}
        splits = Splits(sources, name, about)
        return with_own_val(splits, options.client_val, seed=seed, client=name)


def _shard(name: str, wanted: Mapping[str, int]) -> dict[str, ImageRows]:
    """A client's own share of MNIST-5k; the classes nearly even, no digit in two shards."""
    path = found_or_fetched(Mnist5k(), download)
    digits = grey_npz(path)
    found = {}
    for role, count in wanted.items():
        labels = digits[role].labels
        order = torch.randperm(len(labels), generator=generator("digit clients", "shards", role))
        # Dealt class by class, so that every shard has the same number of each.
        order = order[labels[order].argsort(stable=True)]
        own = order[_SHARDS.index(name) :: len(_SHARDS)]
        found[role] = _first(digits[role], own, count, f"{name} {role}")
    return found


def _uci(wanted: Mapping[str, int]) -> dict[str, ImageRows]:
    """scikit-learn's digits, enlarged from 8x8 (levels 0..16) to 28x28."""
    table = embedded_table()
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    small = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8)).float() * (255.0 / 16.0)
    large = F.interpolate(small, (_SIDE, _SIDE), mode="bilinear", align_corners=False)
    pixels = _bytes(large)
    whole = ImageRows(labels, lambda rows: pixels.index_select(0, rows))
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[stratified(labels, 360, generator("digit clients", "uci test"))] = True
    places = {"train": (~held).nonzero()[:, 0], "test": held.nonzero()[:, 0]}
    return {
        role: _first(whole, places[role], count, f"uci {role}") for role, count in wanted.items()
    }


def _first(whole: ImageRows, rows: Tensor, count: int, where: str) -> ImageRows:
    """`count` of the rows, the classes as even as can be, class by class."""
    if count > len(rows):
        raise DataError(f"digit_clients: {count} rows are asked of {where}, which has {len(rows)}")
    chosen = rows[stratified(whole.labels[rows], count, generator("digit clients", where))]
    return ImageRows(whole.labels[chosen], lambda own: whole.read(chosen[own]))


# ------------------------------------------------------------------------------------ looks
def on_photographs(images: Tensor, photographs: list[Tensor], rng: Generator) -> Tensor:
    """|photograph - digit| per channel, a random crop of a random photograph for each digit.

    Args:
        images: (N, 1, H, W) uint8.
        photographs: (3, H', W') uint8 each, none smaller than a digit.
        rng: the chance.

    Returns:
        (N, 3, H, W) uint8.
    """
    height, width = images.shape[2:]
    picks = torch.rand(len(images), 3, generator=rng)
    crops = []
    for number, top, left in picks.tolist():
        photograph = photographs[int(number * len(photographs))]
        rows, columns = (s - d for s, d in zip(photograph.shape[1:], (height, width), strict=True))
        y, x = int(top * (rows + 1)), int(left * (columns + 1))
        crops.append(photograph[:, y : y + height, x : x + width])
    difference = torch.stack(crops).int() - images.int()
    return difference.abs().to(torch.uint8)


def turned(images: Tensor, degrees: float = _ANGLE) -> Tensor:
    """Turned anticlockwise about the centre, bilinear, zeros around; (N, C, H, W) uint8."""
    angle = math.radians(degrees)
    matrix = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    theta = torch.tensor(matrix).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return _bytes(F.grid_sample(images.float(), grid, align_corners=False))


def blurred(images: Tensor, sigma: float = _BLUR) -> Tensor:
    """A Gaussian blur, cut at three sigma, zeros around; (N, C, H, W) uint8."""
    reach = math.ceil(3 * sigma)
    line = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sigma * sigma))
    line = line / line.sum()
    flat = images.float().reshape(-1, 1, *images.shape[2:])
    flat = F.conv2d(flat, line.view(1, 1, -1, 1), padding=(reach, 0))
    flat = F.conv2d(flat, line.view(1, 1, 1, -1), padding=(0, reach))
    return _bytes(flat.reshape(images.shape))


def thickened(images: Tensor) -> Tensor:
    """Every pixel the maximum of its 3x3 neighbourhood; (N, C, H, W) uint8."""
    return _bytes(F.max_pool2d(images.float(), 3, stride=1, padding=1))


def salted(images: Tensor, rng: Generator, share: float = _NOISE) -> Tensor:
    """A share of the pixels black or white, half and half; (N, C, H, W) uint8."""
    drawn = torch.rand(len(images), 1, *images.shape[2:], generator=rng)
    salt = images.masked_fill(drawn < share / 2, 255)
    return salt.masked_fill(drawn > 1 - share / 2, 0)


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def _photographs(role: str) -> list[Tensor]:
    """Those of BSD100 that serve a split: the last 20 for the test, the rest for training."""
    data = Bsd100()
    place = find_file(data.files)
    if place is None:
        raise missing(data.name, data.files, get=data.get)
    pictures = list(ImageFiles.find(place).read())
    chosen = pictures[-_TEST_PHOTOS:] if role == "test" else pictures[:-_TEST_PHOTOS]
    return [
        torch.from_numpy(decode_image(content, name)).permute(2, 0, 1) for name, content in chosen
    ]


LOOKS: Mapping[str, Callable[[Tensor, str, Generator], Tensor]] = {
    "mnist": lambda images, role, rng: images,
    "uci": lambda images, role, rng: images,
    "photo": lambda images, role, rng: on_photographs(images, _photographs(role), rng),
    "turned": lambda images, role, rng: blurred(turned(images)),
    "noisy": lambda images, role, rng: salted(thickened(images), rng),
}
