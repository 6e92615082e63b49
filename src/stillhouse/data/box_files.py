"""What readers of detection data share: images decoded when read, sizes, weather, splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Source, Splits
from stillhouse.clock import generator
from stillhouse.data.box_source import BoxSource
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import Pixels, as_tensor, decode_image
from stillhouse.data.options import DataOptions
from stillhouse.errors import DataError, RecipeError
from stillhouse.parts.boxes import clipped, resized
from stillhouse.parts.corruptions import corrupted

_TEST = 0.2
_HEAD = 1 << 16  # bytes of each image that are hashed


class BoxOptions(DataOptions):
    """Options of images with boxes."""

    longest: int | None = Field(
        None, ge=32, description="longer side that larger images are reduced to, px; none: as is"
    )
    flip: bool = Field(False, description="mirror half of the training reads, boxes alike")
    corruption: Literal["none", "fog", "blur", "night", "mixed"] = Field(
        "none", description="laid over every image: another domain of the same scenes"
    )
    strength: float = Field(1.0, ge=0, le=1.5, description="of the corruption")
    test: int | float | None = Field(
        None,
        description="images (integer) or share (below 1) held out for the test by a fixed seed; "
        "only where the data has no test split of its own, and a fifth when not said; 0 for none",
    )
    subset: dict[str, int] = Field(
        default_factory=dict,
        description="images to keep of a split ({train: 500, test: 100}), drawn by a fixed seed",
    )


@dataclass
class Listing:
    """Images of a split and what is marked on them.

    Attributes:
        names: of the images.
        content: from a position to the encoded file.
        boxes: per image (n, 4) left, top, right, bottom in pixels of the file.
        labels: per image (n,) from 0.
        sizes: per image height and width of the file.
        ignored: per image (n,) bool, or nothing.
        crowd: likewise.
        instances: from a position to a map (H, W) in the file's size, or nothing.
    """

    names: list[str]
    content: Callable[[int], bytes]
    boxes: list[Tensor]
    labels: list[Tensor]
    sizes: list[tuple[int, int]]
    ignored: list[Tensor] | None = None
    crowd: list[Tensor] | None = None
    instances: Callable[[int], Pixels] | None = None

    def take(self, rows: Sequence[int]) -> Listing:
        """Some of the images."""
        rows = list(rows)

        def of(values: Any) -> Any:
            return None if values is None else [values[i] for i in rows]

        maps = self.instances
        return Listing(
            of(self.names),
            lambda i: self.content(rows[i]),
            of(self.boxes),
            of(self.labels),
            of(self.sizes),
            of(self.ignored),
            of(self.crowd),
            None if maps is None else lambda i: maps(rows[i]),
        )


class FileImages:
    """Decodes an image when it is read, reduced and under weather as told.

    Args:
        listing: of the split.
        options: sizes and weather.
        key: with the image's name, the chance of the weather.
    """

    def __init__(self, listing: Listing, options: BoxOptions, key: str) -> None:
        self.listing, self.options, self.key = listing, options, key

    def __call__(self, index: int) -> Tensor:
        """(3, H, W): uint8, or float in [0, 1] under weather."""
        name = self.listing.names[index]
        pixels = decode_image(self.listing.content(index), name)
        size = reduced(pixels.shape[:2], self.options.longest)
        if size != pixels.shape[:2]:
            from PIL import Image

            image = Image.fromarray(pixels)
            pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
        if self.options.corruption == "none":
            return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
        rng = generator("weather", self.key, name)
        kind, strength = self.options.corruption, self.options.strength
        return corrupted(as_tensor(pixels), kind, rng, strength=strength)

    def instances(self, index: int) -> Tensor:
        """(H, W) map of instances in the size of the image."""
        assert self.listing.instances is not None
        held = self.listing.instances(index)
        size = reduced(held.shape[:2], self.options.longest)
        if size != held.shape[:2]:
            from PIL import Image

            held = np.asarray(Image.fromarray(held).resize(size[::-1], Image.Resampling.NEAREST))
        return torch.from_numpy(np.array(held)).long()


def reduced(size: Sequence[int], longest: int | None) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to `longest` at most."""
    height, width = int(size[0]), int(size[1])
    if longest is None or max(height, width) <= longest:
        return height, width
    factor = longest / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def box_splits(
    data: DataSet[Any],
    listings: Mapping[str, Listing],
    categories: Sequence[str],
    options: BoxOptions,
    *,
    edition: str,
    sizes: tuple[float, float] = (32.0, 96.0),
) -> Splits:
    """Splits of images with boxes; "test" is held out of train where there is none.

    Args:
        data: which data set, for names.
        listings: by split; "train" at least.
        categories: names of the classes.
        options: as given.
        edition: for reports.
        sizes: where small ends and large begins, px.

    Raises:
        RecipeError: a test share beside a test split.
        DataError: empty splits, or boxes that do not fit.
    """
    found = dict(listings)
    if "test" not in found and options.test != 0:
        share = _TEST if options.test is None else options.test
        held, rest = _held_out(len(found["train"].names), share, data.name)
        found["test"], found["train"] = found["train"].take(held), found["train"].take(rest)
    elif "test" in found and options.test:
        raise RecipeError(f"data option 'test': {data.name} has a test split; leave 'test' out")
    for role, count in options.subset.items():
        if role not in found or not 0 < count <= len(found[role].names):
            there = {name: len(own.names) for name, own in found.items()}
            raise DataError(f"data option 'subset': {count} images of '{role}'; there are {there}")
        chance = generator("subset of boxes", data.name, role)
        order = torch.randperm(len(found[role].names), generator=chance)[:count]
        found[role] = found[role].take(order.sort().values.tolist())
    sources: dict[str, Source] = {}
    first = 0
    for role in sorted(found):
        listing = found[role]
        sources[role] = _source(data, role, listing, categories, options, first)
        first += len(listing.names)
    about = {"categories": list(categories), "sizes": list(sizes)}
    told = edition if options.corruption == "none" else f"{edition}, {options.corruption}"
    return Splits(sources, told, about)


def _source(
    data: DataSet[Any],
    role: str,
    listing: Listing,
    categories: Sequence[str],
    options: BoxOptions,
    first: int,
) -> BoxSource:
    images = FileImages(listing, options, data.name)
    boxes = []
    for own, size in zip(listing.boxes, listing.sizes, strict=True):
        after = reduced(size, options.longest)
        boxes.append(clipped(resized(own.float().reshape(-1, 4), size, after), *after))
    said = (options.longest, options.corruption, options.strength)
    return BoxSource(
        images,
        boxes,
        listing.labels,
        ignored=listing.ignored,
        crowd=listing.crowd,
        instances=None if listing.instances is None else images.instances,
        names=listing.names,
        ids=torch.arange(first, first + len(listing.names)),
        flip=options.flip and role == "train",
        content=_digest(listing) + repr(said),
        categories=len(categories),
        name=f"{data.name} {role}",
    )


def _digest(listing: Listing) -> str:
    digest = hashlib.sha256()
    for index, name in enumerate(listing.names):
        content = listing.content(index)
        digest.update(repr((name, len(content))).encode())
        digest.update(content[:_HEAD])
    return digest.hexdigest()


def _held_out(count: int, share: int | float, name: str) -> tuple[list[int], list[int]]:
    wanted = round(count * share) if isinstance(share, float) else share
    if not 0 < wanted < count:
        raise DataError(f"data option 'test': cannot hold out {wanted} of {count} images of {name}")
    order = torch.randperm(count, generator=generator("test boxes", name))
    return order[:wanted].sort().values.tolist(), order[wanted:].sort().values.tolist()
