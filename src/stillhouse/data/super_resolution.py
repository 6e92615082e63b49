"""Pairs of low- and high-resolution images from a folder or a zip of photographs.

Images are decoded once into one memory-mapped file of the cache, together with their
low-resolution versions (made by Matlab's bicubic rule unless a folder of them is given), so
that a training step reads a patch without decoding, also when the images exceed the memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample, Splits, Subset
from stillhouse.clock import Views, generator
from stillhouse.data.cached import write_whole
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import ImageFiles, Pixels, as_tensor, decode_image
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import cache_folder, find_file, missing, search_path
from stillhouse.errors import DataError
from stillhouse.parts.degrade import imresize

_log = logging.getLogger(__name__)
_DRAWS = 5  # row, column, horizontal flip, vertical flip, transpose


# --- the decoded pairs ---------------------------------------------------------------------


class PairStore:
    """Decoded pairs in one memory-mapped file: uint8 pixels, and a table of where they lie.

    Args:
        file: the pixels; the table lies beside it, with the suffix .json.

    Attributes:
        names: of the high-resolution files.
        content: hash of names, files and how the low-resolution images were made.

    Raises:
        DataError: the pixels are not those the table tells of.
    """

    def __init__(self, file: Path) -> None:
        table = json.loads(file.with_suffix(".json").read_text())
        self.names: list[str] = table["names"]
        self.content: str = table["content"]
        self._entries: list[dict[str, list[int]]] = table["entries"]
        if file.stat().st_size != table["bytes"]:
            raise DataError(f"{file} is damaged: its size is not {table['bytes']} bytes")
        self._pixels: Pixels = np.memmap(file, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.names)

    def hr(self, index: int) -> Pixels:
        """The high-resolution image (H, W, 3), a view on the file."""
        return self._view(self._entries[index]["hr"])

    def lr(self, index: int) -> Pixels:
        """The low-resolution image (h, w, 3), a view on the file."""
        return self._view(self._entries[index]["lr"])

    def _view(self, entry: list[int]) -> Pixels:
        offset, height, width = entry
        return self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)


def decoded_pairs(
    hr: str | Path,
    scale: float,
    *,
    lr: str | Path | None = None,
    enlarge: bool = False,
    cache: str | Path | None = None,
) -> PairStore:
    """The pairs of a folder or zip, decoded into the cache if they are not there yet.

    Args:
        hr: folder or zip of high-resolution images; cut at the far sides to a multiple of
            `scale` when that is whole.
        scale: HR size / LR size, at least 1; whole unless `enlarge`.
        lr: folder or zip of low-resolution images of the same names (a suffix like `x2`,
            `_LR` or `_HR` is ignored); made by Matlab's bicubic reduction when not given.
        enlarge: low-resolution images are enlarged bicubically to the size of the
            high-resolution ones (for networks that keep the size, such as IMDN_AS).
        cache: folder for the decoded file; below the cache by default.

    Raises:
        DataError: missing or unreadable images, low-resolution images that do not pair up.
    """
    if scale < 1 or (not enlarge and scale != int(scale)):
        raise DataError(
            f"the scale of super-resolution must be a whole number >= 1, not {scale} "
            "(any number >= 1 when the input is enlarged first)"
        )
    files = ImageFiles.find(hr)
    reduced = None if lr is None else ImageFiles.find(lr)
    stamp = files.stamp() + ("" if reduced is None else reduced.stamp())
    key = hashlib.sha256(f"1|{stamp}|{scale:g}|{enlarge}".encode()).hexdigest()[:24]
    folder = cache_folder("super_resolution") if cache is None else Path(cache)
    target = folder / f"{key}.pixels"
    if target.exists() and target.with_suffix(".json").exists():
        try:
            return PairStore(target)
        except (DataError, ValueError, KeyError) as error:
            _log.warning("%s; decoding again", error)
    _decode(files, reduced, scale, enlarge, target)
    return PairStore(target)


def _decode(
    files: ImageFiles, reduced: ImageFiles | None, scale: float, enlarge: bool, target: Path
) -> None:
    """Write pixels and table; each appears whole or not at all, the table last."""
    table: dict[str, Any] = {}

    def write_pixels(beside: Path) -> None:
        with beside.open("wb") as out:
            table.update(_write_pairs(files, reduced, scale, enlarge, out))

    write_whole(target, write_pixels)
    write_whole(target.with_suffix(".json"), lambda beside: beside.write_text(json.dumps(table)))


def _write_pairs(
    files: ImageFiles, reduced: ImageFiles | None, scale: float, enlarge: bool, out: BinaryIO
) -> dict[str, Any]:
    """Write every pair's pixels; what the table says of them."""
    given = None if reduced is None else _by_stem(reduced)
    digest = hashlib.sha256(f"{scale:g}|{enlarge}|{reduced is not None}".encode())
    names: list[str] = []
    entries: list[dict[str, list[int]]] = []
    offset = 0
    for name, content in files.read():
        digest.update(name.encode() + hashlib.sha256(content).digest())
        small = None
        if given is not None and reduced is not None:
            small = _given_lr(given, reduced, name)
            digest.update(hashlib.sha256(small.tobytes()).digest())
        pair = make_pair(decode_image(content, name), scale, small, enlarge=enlarge, name=name)
        entry = {}
        for part, pixels in zip(("hr", "lr"), pair, strict=True):
            out.write(np.ascontiguousarray(pixels).tobytes())
            entry[part] = [offset, pixels.shape[0], pixels.shape[1]]
            offset += pixels.size
        names.append(name)
        entries.append(entry)
    content_hash = digest.hexdigest()[:32]
    return {"names": names, "content": content_hash, "entries": entries, "bytes": offset}


def make_pair(
    large: Pixels,
    scale: float,
    small: Pixels | None = None,
    *,
    enlarge: bool = False,
    name: str = "an image",
) -> tuple[Pixels, Pixels]:
    """High- and low-resolution image of one photograph, of sizes that fit each other.

    Args:
        large: (H, W, 3) uint8.
        scale: HR size / LR size.
        small: a given low-resolution image; reduced from `large` when not given.
        enlarge: bring the low-resolution image to the size of the high-resolution one.
        name: for messages.

    Returns:
        `(large, small)`; `large` is cut to `scale` times the reduced size when scale is whole.

    Raises:
        DataError: the image is smaller than the scale, or the sizes do not fit.
    """
    height, width = large.shape[:2]
    if min(height, width) < scale:
        raise DataError(f"{name} ({height}x{width}) is too small for scale {scale:g}")
    if scale == int(scale):
        whole = int(scale)
        large = large[: height - height % whole, : width - width % whole]
    height, width = large.shape[:2]
    if small is None:
        small = large if scale == 1 else imresize(large, 1.0 / scale)
    fitting = (math.ceil(height / scale - 1e-9), math.ceil(width / scale - 1e-9))
    if small.shape[:2] != fitting:
        raise DataError(
            f"{name}: a low-resolution image of {small.shape[0]}x{small.shape[1]} does not fit "
            f"{height}x{width} at scale {scale:g}; {fitting[0]}x{fitting[1]} would"
        )
    if enlarge and small.shape != large.shape:
        small = imresize(small, size=(height, width))
    return large, small


def _stem(name: str) -> str:
    """The name without folder, suffix and marks of resolution (x2, _LR, _HR, _SRF_2)."""
    stem = Path(name).stem
    while True:
        shorter = re.sub(r"([_-]?x\d+(\.\d+)?|[_-](LR|HR)|[_-]SRF[_-]?\d+)$", "", stem, flags=re.I)
        if shorter in {"", stem}:
            return stem
        stem = shorter


def _by_stem(files: ImageFiles) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in files.names:
        if found.setdefault(_stem(name), name) != name:
            raise DataError(
                f"{files.place}: '{found[_stem(name)]}' and '{name}' stand for the same image"
            )
    return found


def _given_lr(given: Mapping[str, str], files: ImageFiles, name: str) -> Pixels:
    found = given.get(_stem(name))
    if found is None:
        raise DataError(
            f"no low-resolution image for '{name}' in {files.place}; "
            f"'{_stem(name)}' was looked for, suffixes like x2 or _LR aside"
        )
    return decode_image(files.content(found), found)


# --- sources -------------------------------------------------------------------------------


class WholeImages:
    """Pairs as whole images, for validation and test: "x" and "target", (3, h, w) in [0, 1].

    Args:
        store: the decoded pairs.
        scale: HR size / size of "x" (1 when the input is enlarged first).

    Attributes:
        fingerprint: of the content and how it is read.
    """

    def __init__(self, store: PairStore, scale: int) -> None:
        self.store = store
        self.scale = scale
        self.fingerprint = _fingerprint("whole", store.content)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """The whole pair at position `item[0]`; never augmented."""
        index = int(item[0])
        return {
            "x": as_tensor(self.store.lr(index)),
            "target": as_tensor(self.store.hr(index)),
        }

    def name_of(self, index: int) -> str:
        """The file that position `index` comes from."""
        return self.store.names[index]


class RandomPatches:
    """Paired random patches, flipped and transposed alike, for training.

    Position i is patch i // N of image i % N; which patch it is, a function of the chance of
    the reading alone. Flips horizontal and vertical and the transpose each have probability
    1/2 (released code of IMDN).

    Args:
        store: the decoded pairs.
        scale: HR size / size of "x" (1 when the input is enlarged first).
        patch: side of the high-resolution patch, a multiple of `scale`.
        repeats: patches of an image in one epoch.
        rows: positions of the images used; all when not given.

    Attributes:
        fingerprint: of the content, the images used and how patches are cut.

    Raises:
        DataError: a patch that is no multiple of the scale, or larger than an image.
    """

    def __init__(
        self,
        store: PairStore,
        scale: int,
        patch: int,
        *,
        repeats: int = 1,
        rows: Tensor | None = None,
    ) -> None:
        if patch < 1 or patch % scale or repeats < 1:
            raise DataError(
                f"patches of {patch} px (high resolution) at scale {scale}, {repeats} an image: "
                f"the side must be a multiple of {scale} and there must be at least one"
            )
        self.store, self.scale, self.patch, self.repeats = store, scale, patch, repeats
        self.rows = list(range(len(store))) if rows is None else [int(r) for r in rows]
        self.fingerprint = _fingerprint("patches", store.content, patch, repeats, self.rows)
        for index in self.rows:
            height, width = store.hr(index).shape[:2]
            if min(height, width) < patch:
                raise DataError(
                    f"'{store.names[index]}' ({height}x{width}) is smaller than a patch of "
                    f"{patch} px; choose a smaller patch or leave the image out"
                )

    def __len__(self) -> int:
        return len(self.rows) * self.repeats

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """The pair at position `item[0]`: a random patch by the generator, else the centre."""
        index = int(item[0])
        if item[1] is None:
            return self._sample(index, None)
        return self._sample(index, torch.rand(_DRAWS, generator=item[1]).tolist())

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The pairs at positions `rows`; centre patches when `views` is None."""
        numbers: list[Any] = [None] * len(rows)
        if views is not None:
            numbers = views.uniform(rows, "patch", _DRAWS).tolist()
        pairs = [self._pair(i, n) for i, n in zip(rows.tolist(), numbers, strict=True)]
        low, high = (np.stack(side).transpose(0, 3, 1, 2) for side in zip(*pairs, strict=True))
        batch = Batch(id=rows.clone())
        for name, pixels in (("x", low), ("target", high)):
            batch[name] = torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255.0)
        return batch

    def _sample(self, index: int, numbers: list[float] | None) -> Sample:
        low, high = self._pair(index, numbers)
        return {"x": as_tensor(low), "target": as_tensor(high)}

    def _pair(self, index: int, numbers: list[float] | None) -> tuple[Pixels, Pixels]:
        image = self.rows[index % len(self.rows)]
        large, small = self.store.hr(image), self.store.lr(image)
        side = self.patch // self.scale
        free = (small.shape[0] - side + 1, small.shape[1] - side + 1)
        if numbers is None:
            y, x, turns = (free[0] - 1) // 2, (free[1] - 1) // 2, (False, False, False)
        else:
            y, x = int(numbers[0] * free[0]), int(numbers[1] * free[1])
            turns = (numbers[2] < 0.5, numbers[3] < 0.5, numbers[4] < 0.5)
        low = small[y : y + side, x : x + side]
        top, left = y * self.scale, x * self.scale
        high = large[top : top + self.patch, left : left + self.patch]
        return turned(low, *turns), turned(high, *turns)


def turned(image: Pixels, horizontal: bool, vertical: bool, transpose: bool) -> Pixels:
    """An image (H, W, 3) flipped left-right, top-bottom, then transposed, as told."""
    if horizontal:
        image = image[:, ::-1]
    if vertical:
        image = image[::-1]
    return image.transpose(1, 0, 2) if transpose else image


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def open_super_resolution(
    train: str | Path,
    *,
    scale: float = 2,
    patch: int = 48,
    repeats: int = 1,
    lr: str | Path | None = None,
    val: str | Path | int = 0,
    test: str | Path | int = 0,
    enlarge: bool = False,
    edition: str = "",
    cache: str | Path | None = None,
) -> Splits:
    """Train, validation and test data for super-resolution from folders or zips of images.

    Args:
        train: high-resolution images.
        scale: factor of enlargement; whole, or any number >= 1 with `enlarge`.
        patch: side of the high-resolution training patch.
        repeats: patches of an image in one epoch.
        lr: low-resolution images of `train`; made from them when not given.
        val: another folder or zip, or how many images of `train` to hold out (chosen by a
            fixed seed, so every run and every side of a comparison holds out the same).
        test: another folder or zip, or how many images to hold out likewise.
        enlarge: see `decoded_pairs`; network input and output then have one size.
        edition: the data's name for reports.
        cache: folder for decoded images.

    Returns:
        Splits "train" (random patches), "val" and "test" (whole images), where given; `about`
        holds `scale` (HR size / input size), `factor` (as asked for), `enlarge`, `channels`,
        `input` (3, side, side) of a training patch, and `hash`.

    Raises:
        DataError: missing or unusable images; too few to hold some out.
    """
    ratio = 1 if enlarge else int(scale)
    store = decoded_pairs(train, scale, lr=lr, enlarge=enlarge, cache=cache)
    order = torch.randperm(len(store), generator=generator("super-resolution", "held out"))
    sources: dict[str, Any] = {}
    for role, asked in (("val", val), ("test", test)):
        if not isinstance(asked, int):
            other = decoded_pairs(asked, scale, enlarge=enlarge, cache=cache)
            sources[role] = WholeImages(other, ratio)
            continue
        if not 0 <= asked < len(order):
            raise DataError(
                f"cannot hold out {asked} of {len(order)} images of {train} for '{role}'"
            )
        if asked:
            sources[role] = Subset(WholeImages(store, ratio), order[:asked].sort().values)
            order = order[asked:]
    rows = order.sort().values
    sources["train"] = RandomPatches(store, ratio, patch, repeats=repeats, rows=rows)
    splits = Splits(sources, edition or Path(train).name)
    splits.about = {
        "scale": ratio,
        "factor": float(scale),
        "enlarge": enlarge,
        "channels": 3,
        "input": (3, patch // ratio, patch // ratio),
        "hash": splits.fingerprint(),
    }
    return splits


# --- data sets by name ---------------------------------------------------------------------


class PairOptions(DataOptions):
    """Options of photographs for super-resolution."""

    val: Literal[0] = Field(
        0, description="not used here: see the data set's own options for held-out images"
    )
    scale: float = Field(
        2.0, ge=1, le=16, description="factor of enlargement; whole unless `enlarge`"
    )
    patch: int = Field(48, ge=1, description="side of the high-resolution training patch, px")
    repeats: int = Field(10, ge=1, description="patches of an image in one epoch")
    enlarge: bool = Field(
        False, description="enlarge the input bicubically first, for networks that keep the size"
    )


class Bsd100(DataSet[PairOptions]):
    """80 images of BSD100 to train on, its other 20 to validate, Set5 to test."""

    name = "bsd100"
    title = "photographs: BSD100 (80 train, 20 val) and Set5 (test), for super-resolution"
    tasks = ("super-resolution",)
    licence = "none stated; research sets (BSDS: non-commercial research)"
    source = "https://github.com/jbhuang0604/SelfExSR"
    files = ("super_resolution/bsd100_hr.zip",)
    rows = {"train": 80, "val": 20, "test": 5}  # noqa: RUF012
    get = (
        "put the *_HR.png of data/BSD100/image_SRF_2 and data/Set5/image_SRF_2 of the source "
        "into super_resolution/bsd100_hr.zip and super_resolution/set5_hr.zip"
    )

    Options = PairOptions

    def open(self, options: PairOptions, seed: int) -> Splits:
        """See `open_super_resolution`; which 20 images validate depends on no seed."""
        return open_super_resolution(
            _required(self),
            scale=options.scale,
            patch=options.patch,
            repeats=options.repeats,
            enlarge=options.enlarge,
            val=20,
            test=_required(Set5()),
            edition="bsd100 (80 train, 20 val), set5 (test)",
        )


class Set5(DataSet[PairOptions]):
    """The five images of Set5, to test on only."""

    name = "set5"
    title = "photographs: the five of Set5 (test only), for super-resolution"
    tasks = ("super-resolution",)
    licence = "none stated; research set"
    source = "https://github.com/jbhuang0604/SelfExSR"
    files = ("super_resolution/set5_hr.zip",)
    rows = {"test": 5}  # noqa: RUF012
    get = "put the *_HR.png of data/Set5/image_SRF_2 into super_resolution/set5_hr.zip"

    Options = PairOptions

    def open(self, options: PairOptions, seed: int) -> Splits:
        """Whole images under "test"."""
        store = decoded_pairs(_required(self), options.scale, enlarge=options.enlarge)
        ratio = 1 if options.enlarge else int(options.scale)
        splits = Splits({"test": WholeImages(store, ratio)}, "set5")
        splits.about = {
            "scale": ratio,
            "factor": options.scale,
            "enlarge": options.enlarge,
            "channels": 3,
            "hash": splits.fingerprint(),
        }
        return splits


class PhotographOptions(PairOptions):
    """Options of the user's own photographs."""

    images: str = Field(description="folder or zip of high-resolution images to train on")
    lr_images: str | None = Field(
        None, description="folder or zip of their low-resolution versions; none: made from them"
    )
    held_out: int = Field(
        0, ge=0, description="images of `images` held out for validation, by a fixed seed"
    )
    val_images: str | None = Field(
        None, description="folder or zip to validate on, instead of `held_out`"
    )
    held_out_test: int = Field(
        0, ge=0, description="images of `images` held out for the test, by a fixed seed"
    )
    test_images: str | None = Field(
        None, description="folder or zip to test on, instead of `held_out_test`"
    )


class Photographs(DataSet[PhotographOptions]):
    """Any folder or zip of images: DIV2K, Flickr2K, LSDIR, or one's own."""

    name = "photographs"
    title = "your own images (folder or zip), for super-resolution"
    tasks = ("super-resolution",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = PhotographOptions

    def open(self, options: PhotographOptions, seed: int) -> Splits:
        """See `open_super_resolution`."""
        if options.held_out and options.val_images is not None:
            raise DataError("data options: give either 'held_out' or 'val_images', not both")
        if bool(options.held_out_test) == (options.test_images is not None):
            raise DataError(
                "data options: a run is judged on images it was not trained on; give either "
                "'test_images' (a folder or zip) or 'held_out_test' (how many of 'images')"
            )
        return open_super_resolution(
            _given(options.images),
            scale=options.scale,
            patch=options.patch,
            repeats=options.repeats,
            lr=None if options.lr_images is None else _given(options.lr_images),
            val=options.held_out if options.val_images is None else _given(options.val_images),
            test=options.held_out_test
            if options.test_images is None
            else _given(options.test_images),
            enlarge=options.enlarge,
        )


def _required(data: DataSet[Any]) -> Path:
    found = find_file(data.files)
    if found is None:
        raise missing(data.name, data.files, get=data.get)
    return found


def _given(place: str) -> Path:
    """A user's path as it stands, else below a data root."""
    path = Path(place).expanduser()
    if path.exists() or path.is_absolute():
        return path
    for root in search_path():
        if (root / path).exists():
            return root / path
    return path
