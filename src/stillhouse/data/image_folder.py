"""A user's own images in one folder per class, decoded when they are read."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample, Source, Splits
from stillhouse.clock import Views, generator, seed_of
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import SUFFIXES, decode_image
from stillhouse.data.options import Augment, OwnOptions
from stillhouse.data.roots import locate
from stillhouse.data.splitting import choose, hold_out
from stillhouse.errors import DataError, RecipeError, nearest

# What the usual pretrained networks were trained with (ImageNet).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip
_DRAWS = 5  # area, ratio, top, left, flip
_WHOLE = 512 << 20  # bytes of images that are hashed whole
_HEAD = 1 << 16  # bytes of each file that are hashed beyond it
_OPENED = 2000  # images whose header is read before training; a sample of larger sets


class FolderOptions(OwnOptions):
    """Options of a folder of images."""

    image_size: int = Field(224, ge=4, le=4096, description="height and width, pixels")
    resize: int | None = Field(
        None,
        ge=4,
        description="the shorter side is brought to this before the centre is cut out, in reads "
        "without augmentation; as image_size when not said",
    )
    channels: Literal[1, 3] = Field(3, description="grey (1) or colour (3)")
    augment: Augment = Field(
        "none",
        description="of training reads: crop (a random part of the image, brought to size), "
        "flip (left to right, half of the reads)",
    )
    crop_area: float = Field(
        0.35, gt=0.0, le=1.0, description="least share of the image's area that a crop keeps"
    )
    label_list: str | None = Field(
        None,
        description="file that names the images of train that keep their labels, one a line or "
        "the 'train' of a few-shot split in JSON; the rest becomes the split 'unlabelled'",
    )
    workers: int = Field(0, ge=0, description="threads that decode the images of a batch")

    @field_validator("augment")
    @classmethod
    def _crops_and_flips(cls, value: Augment) -> Augment:
        if value == "affine":
            raise ValueError("images in folders are cropped and flipped; use 'crop' or 'flip'")
        return value


class ImageFolder(DataSet[FolderOptions]):
    """`path/CLASS/image.jpg`, or `path/{train,val,test}/CLASS/image.jpg`.

    Classes are the folders below train, in alphabetical order; images may lie deeper. Nothing
    is decoded before it is read. A content id is a hash of the path below its split.
    """

    name = "image_folder"
    title = "your own images, one folder per class"
    tasks = ("classification", "image-generation")
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = FolderOptions

    def open(self, options: FolderOptions, seed: int) -> Splits:
        """The splits there are; "test" is held out of train where there is none."""
        root = locate(options.path, option="path", folder=True)
        folders = _by_split(root)
        classes = _classes(folders["train"])
        files = {role: _files(folder, classes) for role, folder in folders.items()}
        if "test" not in files:
            held = hold_out(
                _labels(files["train"]), options.test, seed=options.subset_seed, name=str(root)
            )
            whole = files["train"]
            for role, keep in (("test", held), ("train", ~held)):
                files[role] = [whole[row] for row in keep.nonzero()[:, 0].tolist()]
        elif options.test is not None:
            raise RecipeError(f"data option 'test': {root} has a test split; leave 'test' out")
        labels = {role: _labels(entries) for role, entries in files.items()}
        choice = choose(labels, classes, options, name=str(root))
        size = Sizing.of(options)
        stamps, told = _stamps([e.path for entries in files.values() for e in entries])
        sources: dict[str, Source] = {}
        for role, chosen in choice.splits.items():
            kept = [files[role][row].path for row in chosen.rows.tolist()]
            _check_readable(kept)
            sources[role] = ImageFolderSource(
                kept,
                chosen.labels,
                subclasses=chosen.subclasses,
                size=size,
                augment=options.augment if role == "train" else "none",
                root=root,
                stamps=stamps,
                workers=options.workers,
            )
        about = {
            "name": self.name,
            "hash": _joined(stamps, root),
            "hash_of": told,
            "licence": self.licence,
            "source": str(root),
            **choice.about(),
            "input": [options.channels, options.image_size, options.image_size],
            "mean": list(MEAN) if options.channels == 3 else [sum(MEAN) / 3],
            "std": list(STD) if options.channels == 3 else [sum(STD) / 3],
        }
        return Splits(sources, f"{root.name} (image folder)", about)


@dataclass(frozen=True)
class Entry:
    """An image file and its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Sizing:
    """How an image is brought to size.

    Attributes:
        size: height and width, pixels.
        shorter: what the shorter side is brought to before the centre is cut out.
        channels: 1 or 3.
        area: least share of the area that a random crop keeps.
    """

    size: int
    shorter: int
    channels: int = 3
    area: float = 0.35

    @classmethod
    def of(cls, options: FolderOptions) -> Sizing:
        """As the options say.

        Raises:
            RecipeError: the image would be smaller than what is cut out of it.
        """
        shorter = options.resize or options.image_size
        if shorter < options.image_size:
            raise RecipeError(
                f"data option 'resize': a shorter side of {shorter} is smaller than the "
                f"image_size of {options.image_size} that is cut out of it"
            )
        return cls(options.image_size, shorter, options.channels, options.crop_area)


class ImageFolderSource:
    """Images decoded when they are read: "x" (C, S, S) float in [0, 1] and "target".

    Args:
        files: paths of the images.
        labels: (N,) int64.
        subclasses: (N,) int64, the view "subclass"; None where there is none.
        size: how images are brought to size.
        augment: "none", "crop" (random part: area and aspect ratio 3/4 to 4/3 drawn as by
            Szegedy et al. 2015, once, cut to the image), "flip", or both.
        root: content ids hash the paths below it.
        stamps: what identifies the content of each file.
        workers: threads that decode a batch; 0 decodes one after another.

    Attributes:
        targets: the labels.
        names: paths below the root.
        ids: (N,) int64, a hash of each path.
        fingerprint: of paths, contents, labels, and how images are read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Tensor,
        *,
        subclasses: Tensor | None = None,
        size: Sizing,
        augment: Augment = "none",
        root: Path,
        stamps: Mapping[Path, str],
        workers: int = 0,
    ) -> None:
        self.files = list(files)
        self.targets = labels
        self._known = {"target": labels}
        if subclasses is not None:
            self._known["subclass"] = subclasses
        self.size = size
        self.augment = augment
        self.workers = workers
        names = self.names = [path.relative_to(root).as_posix() for path in self.files]
        self.ids = torch.tensor([seed_of("image", name) for name in names])
        digest = hashlib.sha256(repr((size, augment)).encode())
        for name, path, label in zip(names, self.files, labels.tolist(), strict=True):
            digest.update(repr((name, stamps[path], label)).encode())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.files)

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        return int(self.ids[index])

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """One image; augmented by the generator where there is one.

        Raises:
            DataError: the file cannot be read; its path is told.
        """
        index, rng = int(item[0]), item[1]
        numbers = None if rng is None else torch.rand(_DRAWS, generator=rng).tolist()
        known = {name: values[index] for name, values in self._known.items()}
        return {"x": self._image(index, numbers), **known}

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The images at positions `rows`; augmented unless `views` is None."""
        ids = self.ids[rows]
        drawn: list[list[float] | None] = [None] * len(rows)
        if views is not None and self.augment != "none":
            drawn = list(views.uniform(ids, "geometry", _DRAWS).tolist())
        positions = rows.tolist()
        if self.workers > 1:
            with ThreadPoolExecutor(self.workers) as pool:
                images = list(pool.map(self._image, positions, drawn))
        else:
            images = [self._image(i, numbers) for i, numbers in zip(positions, drawn, strict=True)]
        known = {name: values[rows] for name, values in self._known.items()}
        return Batch(id=ids, x=torch.stack(images), **known)

    def _image(self, index: int, numbers: list[float] | None) -> Tensor:
        from PIL import Image

        path = self.files[index]
        image = Image.fromarray(decode_image(path, str(path)))
        if self.size.channels == 1:
            image = image.convert("L")
        size = (self.size.size, self.size.size)
        image = image.resize(size, Image.Resampling.BILINEAR, box=self._box(image.size, numbers))
        pixels = torch.from_numpy(np.array(image)).float().div_(255.0)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
        mirrored = numbers is not None and "flip" in self.augment and numbers[4] < 0.5
        return pixels.flip(-1) if mirrored else pixels

    def _box(
        self, size: tuple[int, int], numbers: list[float] | None
    ) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the part that is kept."""
        width, height = size
        if numbers is None or "crop" not in self.augment:
            side = min(size) * self.size.size / self.size.shorter
            left, top = (width - side) / 2, (height - side) / 2
            return left, top, left + side, top + side
        area = width * height * (self.size.area + numbers[0] * (1 - self.size.area))
        ratio = math.exp((2 * numbers[1] - 1) * math.log(4 / 3))
        wide = min(float(width), math.sqrt(area * ratio))
        tall = min(float(height), math.sqrt(area / ratio))
        top, left = numbers[2] * (height - tall), numbers[3] * (width - wide)
        return left, top, left + wide, top + tall


def _by_split(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in sorted(p for p in root.iterdir() if p.is_dir()):
        role = _SPLITS.get(place.name.lower())
        if role is not None and role in found:
            raise DataError(f"{root}: both '{found[role].name}' and '{place.name}' are {role} data")
        if role is not None:
            found[role] = place
    if not found:
        return {"train": root}
    if "train" not in found:
        raise DataError(f"{root} has {', '.join(p.name for p in found.values())} but no 'train'")
    return found


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(
            f"{folder}: {len(names)} folders; one folder per class and at least two classes are "
            "needed"
        )
    return names


def _files(folder: Path, classes: Sequence[str]) -> list[Entry]:
    """Images of a split, class by class and sorted.

    Raises:
        DataError: a class without images, or one that train does not have.
    """
    strange = [p.name for p in folder.iterdir() if p.is_dir() and p.name not in classes]
    strange = [name for name in strange if not name.startswith(".")]
    if strange:
        raise DataError(
            f"{folder}: train has no class '{strange[0]}'{nearest(strange[0], classes)}"
        )
    entries = []
    for number, name in enumerate(classes):
        paths = sorted(
            Path(place) / file
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith(".")
        )
        if not paths:
            raise DataError(f"{folder / name} holds no images ({', '.join(SUFFIXES)})")
        entries += [Entry(path, number) for path in paths]
    return entries


def _labels(entries: Sequence[Entry]) -> Tensor:
    return torch.tensor([entry.label for entry in entries])


def _check_readable(paths: Sequence[Path]) -> None:
    """Open the headers of all images, or of a fixed sample of many.

    Raises:
        DataError: a file that is no image; its path is told.
    """
    from PIL import Image, UnidentifiedImageError

    if len(paths) > _OPENED:
        order = torch.randperm(len(paths), generator=generator("readable"))[:_OPENED]
        paths = [paths[row] for row in order.tolist()]
    for path in paths:
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from error


def _stamps(paths: Sequence[Path]) -> tuple[dict[Path, str], str]:
    """What identifies each file's content, and what of it went in."""
    sizes = {path: path.stat().st_size for path in paths}
    if sum(sizes.values()) <= _WHOLE:
        return {path: content_hash(path) for path in paths}, "content"
    stamps = {}
    for path, size in sizes.items():
        with path.open("rb") as opened:
            stamps[path] = f"{size}:{hashlib.sha256(opened.read(_HEAD)).hexdigest()}"
    return stamps, f"sizes and the first {_HEAD} bytes"


def _joined(stamps: Mapping[Path, str], root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(stamps):
        digest.update(repr((path.relative_to(root).as_posix(), stamps[path])).encode())
    return digest.hexdigest()
