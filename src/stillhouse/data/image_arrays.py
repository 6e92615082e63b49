"""Sets of small images kept in memory: one decoded uint8 tensor per split."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Batch, Source, Splits, TensorSource
from stillhouse.clock import Views
from stillhouse.data.affine_images import AffineImages
from stillhouse.data.augment_images import AugmentImages
from stillhouse.data.cached import cached_tensors
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import ImageOptions
from stillhouse.data.roots import cache_root
from stillhouse.data.splitting import choose
from stillhouse.errors import DataError

# Weights of red, green and blue in grey (ITU-R BT.601), as Pillow's "L" mode has them.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ImageRows:
    """One official split: its labels, and how to get the pixels of some rows.

    Attributes:
        labels: (N,) int64.
        read: positions (n,) to pixels (n, C, H, W) uint8.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]


class ImageSource(TensorSource):
    """Images in memory as bytes, augmented as bytes, and only then read as [0, 1].

    A quarter of the memory is moved that augmenting floats would move; at steps of a
    millisecond that counts. Arguments as for `TensorSource`.
    """

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The samples at positions `rows`; augmented unless `views` is None."""
        batch = Batch(id=self.ids.index_select(0, rows))
        for name, value in self.views.items():
            if isinstance(value, Tensor):
                # Whole rows: index_select copies them in one piece each, indexing does not.
                batch[name] = value.index_select(0, rows.to(value.device))
            else:
                batch[name] = [value[row] for row in rows.tolist()]
        if self.augment is not None and views is not None:
            batch = self.augment(batch, views)
        for name in self.views:
            value = batch[name]
            if self.scale and isinstance(value, Tensor) and value.dtype == torch.uint8:
                batch[name] = value.float().div_(255.0)
        return batch


def open_npz(path: Path) -> NpzFile:
    """An npz file without pickles.

    Raises:
        DataError: damaged, or not an npz file.
    """
    try:
        opened = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        # For whatever it does not know numpy says that pickles may be allowed; they may not.
        told = "it is no such file, or its beginning is damaged"
        why = told if isinstance(error, ValueError) else str(error)
        raise DataError(f"{path} cannot be read as an npz file: {why}") from error
    if not isinstance(opened, NpzFile):
        raise DataError(f"{path} holds one bare array, not named ones (npz)")
    return opened


def array_of(stored: NpzFile, key: str, path: Path) -> NDArray[Any]:
    """One array of an npz file.

    Raises:
        DataError: no such array, or its bytes are damaged.
    """
    if key not in stored.files:
        raise DataError(f"{path} has no array '{key}'; it holds {', '.join(stored.files)}")
    try:
        found: NDArray[Any] = stored[key]
    except Exception as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path}: the array '{key}' holds Python objects, which only a pickle can keep; "
                "save numbers (numpy.savez with arrays of one dtype)"
            ) from error
        # zipfile and zlib raise their own kinds for damaged members.
        raise DataError(f"{path}: the array '{key}' is damaged: {error}") from error
    return found


def rows_in_memory(images: NDArray[Any], labels: NDArray[Any], where: str) -> ImageRows:
    """A split whose pixels are (N, H, W) or (N, H, W, C) uint8 in memory.

    Raises:
        DataError: other types or shapes, or as many labels as there are not images.
    """
    if images.dtype != np.uint8 or images.ndim not in {3, 4}:
        raise DataError(
            f"{where}: images are {images.dtype} of shape {images.shape}; uint8 of shape "
            "(N, H, W) or (N, H, W, C) is needed"
        )
    if labels.shape != images.shape[:1]:
        raise DataError(f"{where}: {len(images)} images but labels of shape {labels.shape}")
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return ImageRows(
        torch.from_numpy(labels.astype(np.int64)),
        lambda rows: pixels.index_select(0, rows).contiguous(),
    )


def rows_in_blob(
    blob: Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64]]],
    labels: NDArray[Any],
    *,
    shape: tuple[int, int, int],
    cache: str,
    where: str,
) -> ImageRows:
    """A split whose images are encoded one after another in one array of bytes.

    Where most of a split is wanted it is decoded whole, once, into the cache; a smaller part
    is decoded alone.

    Args:
        blob: gives bytes (M,) and offsets (N + 1,): image i is bytes[off[i]:off[i + 1]].
        labels: (N,).
        shape: (C, H, W) of every image.
        cache: name of the decoded copy, unique to the content.
        where: what it is, for errors.
    """
    kept = cache_root() / "decoded" / f"{cache}.safetensors"

    def decode(rows: Tensor) -> Tensor:
        content, offsets = blob()
        if len(offsets) != len(labels) + 1 or int(offsets[-1]) > len(content):
            raise DataError(
                f"{where}: {len(labels)} labels, {len(offsets)} offsets and {len(content)} bytes "
                "do not belong together"
            )
        return decoded(content, offsets, rows.tolist(), shape, where)

    def read(rows: Tensor) -> Tensor:
        if 2 * len(rows) <= len(labels) and not kept.is_file():
            return decode(rows)
        every = torch.arange(len(labels))
        pixels = cached_tensors(kept, lambda: {"images": decode(every)})["images"]
        return pixels if len(rows) == len(labels) else pixels.index_select(0, rows)

    return ImageRows(torch.from_numpy(labels.astype(np.int64)), read)


def decoded(
    content: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    rows: Sequence[int],
    shape: tuple[int, int, int],
    where: str,
) -> Tensor:
    """Images of a blob as (n, C, H, W) uint8.

    Raises:
        DataError: an image that cannot be decoded, or of another size; its row is told.
    """
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    made = np.empty((len(rows), height, width, channels), dtype=np.uint8)
    for place, row in enumerate(rows):
        piece = content[offsets[row] : offsets[row + 1]].tobytes()
        try:
            with Image.open(io.BytesIO(piece), formats=("JPEG", "PNG")) as image:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: image {row} cannot be decoded: {error}") from error
        if pixels.shape[:2] != (height, width):
            raise DataError(
                f"{where}: image {row} is {pixels.shape[0]}x{pixels.shape[1]}, "
                f"{height}x{width} is expected"
            )
        made[place] = pixels.reshape(height, width, channels)
    return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()


def encoded(images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, C) as one blob of PNGs, lossless, with offsets (N + 1,)."""
    from PIL import Image

    pieces = []
    for image in images:
        made = io.BytesIO()
        Image.fromarray(image).save(made, "PNG")
        pieces.append(made.getvalue())
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets


def write_npz(target: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an npz file under exactly the name `target`."""
    opened: BinaryIO
    with target.open("wb") as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def resized(images: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Images (N, C, H, W) uint8 brought to a square size and to 1 or 3 channels.

    Whole factors of reduction are means over blocks (as "pooled" images of the sheets are);
    all else is bilinear, with antialiasing where it reduces.
    """
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif channels == 1 and images.shape[1] == 3:
        weights = torch.tensor(_GREY).view(1, 3, 1, 1)
        images = _in_blocks(images, lambda block: (block * weights).sum(1, keepdim=True))
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images.contiguous()
    if height % size == 0 and width % size == 0:
        return _in_blocks(images, lambda block: F.interpolate(block, (size, size), mode="area"))
    return _in_blocks(
        images,
        lambda block: F.interpolate(
            block, (size, size), mode="bilinear", align_corners=False, antialias=True
        ),
    )


def centred(images: Tensor, size: int | None) -> Tensor:
    """Images (N, C, H, W) in the middle of a square of zeros; cut where they are larger."""
    if size is None:
        return images
    height, width = (size - length for length in images.shape[-2:])
    borders = (width // 2, width - width // 2, height // 2, height - height // 2)
    return F.pad(images, borders).contiguous()


def _in_blocks(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    # Float copies of a whole set would need four times its memory.
    parts = [
        change(block.float()).round_().clamp_(0, 255).to(torch.uint8)
        for block in torch.split(images, 4096)
    ]
    return torch.cat(parts)


def moments(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of images (N, C, H, W), in [0, 1] for uint8."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    count = images.numel() / images.shape[1]
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for block in torch.split(images, 4096):
        values = block.double() / scale
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never changes is not divided by.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return [round(v, 6) for v in mean.tolist()], [round(v, 6) for v in std.tolist()]


def image_splits(
    data: DataSet[Any],
    official: Mapping[str, ImageRows],
    options: ImageOptions,
    *,
    classes: Sequence[str],
    digest: str,
    edition: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """Splits of a labelled image set, with only the wanted rows decoded.

    Args:
        data: its facts.
        official: rows by official split.
        options: what is kept and how it is read.
        classes: names of all classes.
        digest: sha256 of the content.
        edition: name of the edition.
        mean: per channel in [0, 1], of the training images as they are; measured when None
            or when the channels are changed.
        std: likewise.

    Returns:
        The official splits as sources of "x" (C, H, W) uint8, read as float in [0, 1],
        "target", and "subclass" where classes are joined; train reads are augmented.
    """
    for role, rows in official.items():
        check_range(rows.labels, len(classes), f"{data.name} {role}")
    choice = choose({r: s.labels for r, s in official.items()}, classes, options, name=data.name)
    sources: dict[str, Source] = {}
    shape: tuple[int, ...] = ()
    for role, chosen in choice.splits.items():
        native = official[role].read(chosen.rows)
        pixels = centred(resized(native, options.image_size, options.channels), options.canvas)
        shape = tuple(pixels.shape[1:])
        if role == "train" and (mean is None or std is None or shape[0] != native.shape[1]):
            mean, std = moments(pixels)
        sources[role] = ImageSource(
            {"x": pixels, **chosen.views()},
            augment=augment_of(options.augment, shape[-1]) if role == "train" else None,
            ids=chosen.ids,
            name=f"{data.name}/{role}",
        )
    about = {
        "name": data.name,
        "hash": digest,
        "licence": data.licence,
        "source": data.source,
        **choice.about(),
        "input": list(shape),
        "mean": list(mean or ()),
        "std": list(std or ()),
    }
    return Splits(sources, f"{data.name} ({edition})", about)


def grey_npz(path: Path) -> dict[str, ImageRows]:
    """The splits of an npz file with `{train,test}_images` and `{train,test}_labels`.

    Raises:
        DataError: missing or damaged arrays, wrong types or shapes.
    """
    with open_npz(path) as stored:
        return {
            role: rows_in_memory(
                array_of(stored, f"{role}_images", path),
                array_of(stored, f"{role}_labels", path),
                f"{path}, {role}",
            )
            for role in ("train", "test")
        }


def stored_edition(path: Path) -> str:
    """The edition that an npz file names itself; empty where it does not."""
    with open_npz(path) as stored:
        return str(stored["edition"]) if "edition" in stored.files else ""


def augment_of(named: str, size: int) -> AugmentImages | AffineImages | None:
    """The augmentation an option names; crops shift by up to an eighth of `size`."""
    if named == "none":
        return None
    if named == "affine":
        return AffineImages()
    padding = max(1, size // 8) if "crop" in named else 0
    return AugmentImages(padding=padding, flip="flip" in named)


def check_range(labels: Tensor, classes: int, where: str) -> None:
    """Refuse labels outside [0, classes).

    Raises:
        DataError: names the first such row.
    """
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise DataError(
            f"{where}, row {row}: the label {int(labels[row])} is out of range; "
            f"there are {classes} classes, numbered from 0"
        )
