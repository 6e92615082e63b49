"""Image files of a folder or a zip, decoded to RGB grey levels."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.errors import DataError

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder or a zip, by name and sorted.

    Attributes:
        place: the folder or zip.
        names: paths within it.
    """

    place: Path
    names: tuple[str, ...]

    @classmethod
    def find(cls, place: str | Path) -> ImageFiles:
        """All images below a folder or inside a zip, in sorted order.

        Raises:
            DataError: no such place, not a zip, or no image in it.
        """
        path = Path(place).expanduser()
        if path.is_dir():
            found = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
        elif path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    found = archive.namelist()
            except zipfile.BadZipFile:
                raise DataError(f"{path} is neither a folder nor a zip of images") from None
        else:
            raise DataError(f"no images at {path}: there is no such folder or zip")
        names = sorted(n for n in found if _is_image(n))
        if not names:
            raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        return cls(path, tuple(names))

    def stamp(self) -> str:
        """Changes when a file is added, removed or rewritten; cheap, reads no image."""
        digest = hashlib.sha256(str(self.place.resolve()).encode())
        for name in self.names:
            digest.update(name.encode())
            if self.place.is_dir():
                stat = (self.place / name).stat()
                digest.update(f"{stat.st_size}:{stat.st_mtime_ns}".encode())
        if not self.place.is_dir():
            stat = self.place.stat()
            digest.update(f"{stat.st_size}:{stat.st_mtime_ns}".encode())
        return digest.hexdigest()

    def content(self, name: str) -> bytes:
        """One file's content."""
        if self.place.is_dir():
            return (self.place / name).read_bytes()
        with zipfile.ZipFile(self.place) as archive:
            return archive.read(name)

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Every file's name and content, in order."""
        if self.place.is_dir():
            for name in self.names:
                yield name, (self.place / name).read_bytes()
        else:
            with zipfile.ZipFile(self.place) as archive:
                for name in self.names:
                    yield name, archive.read(name)


def _is_image(name: str) -> bool:
    path = Path(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return not hidden and path.suffix.lower() in SUFFIXES


def png_targets(inputs: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Each image file and the PNG that is made of it; folders keep their inner structure.

    Args:
        inputs: files and folders.
        output: a folder, or a .png for a single image.

    Raises:
        DataError: nothing there, or two inputs with one output.
    """
    found: list[tuple[Path, Path]] = []
    for given in map(Path, inputs):
        if given.is_dir():
            files = ImageFiles.find(given)
            names = [Path(name) for name in files.names]
            found += [(given / n, (output / n).with_suffix(".png")) for n in names]
        elif given.is_file():
            found.append((given, (output / given.name).with_suffix(".png")))
        else:
            raise DataError(f"{given} does not exist")
    if not found:
        raise DataError("nothing to read: no image was found")
    if output.suffix.lower() == ".png":
        if len(found) > 1:
            raise DataError(f"{len(found)} images do not fit in one file {output}; give a folder")
        return [(found[0][0], output)]
    taken: dict[Path, Path] = {}
    for source, target in found:
        other = taken.setdefault(target, source)
        if other != source:
            raise DataError(f"'{other}' and '{source}' would both become {target}; rename one")
    return found


def decode_image(content: bytes | str | Path, name: str = "") -> Pixels:
    """An image file as RGB grey levels (H, W, 3) uint8.

    Greyscale is repeated to three channels, transparency is dropped, 16-bit greyscale is
    scaled to 8 bits. No colour management.

    Raises:
        DataError: not an image, or a damaged one; its name is told.
    """
    from PIL import Image, UnidentifiedImageError

    name = name or (str(content) if not isinstance(content, bytes) else "an image")
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.mode.startswith(("I", "F")):
                deep = np.asarray(image, dtype=np.float64)
                levels = np.floor(deep / 257.0 + 0.5) if deep.max(initial=0.0) > 255 else deep
                grey = np.clip(levels, 0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"), dtype=np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from None


def as_image(value: Any) -> Tensor:
    """An image from a user's hands as a float32 one (3, H, W) in [0, 1]; greyscale is repeated.

    Args:
        value: a tensor (3, H, W) or (1, H, W), uint8 or in [0, 1]; a PIL image; or an array
            (H, W) or (H, W, 3) uint8.

    Raises:
        DataError: another shape or type.
    """
    if isinstance(value, Tensor):
        image = value.float() / 255.0 if value.dtype == torch.uint8 else value.float()
    else:
        array = np.asarray(value.convert("RGB") if hasattr(value, "convert") else value)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3 or array.dtype != np.uint8:
            raise DataError(
                f"an array must be (H, W) or (H, W, 3) uint8, got {array.shape} {array.dtype}"
            )
        image = torch.from_numpy(np.array(array)).permute(2, 0, 1).float() / 255.0
    if image.ndim != 3 or image.shape[0] not in {1, 3} or min(image.shape) < 1:
        raise DataError(f"an image must be (3, H, W) or (1, H, W), got {tuple(image.shape)}")
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def as_tensor(pixels: Pixels) -> Tensor:
    """Grey levels (H, W, 3) uint8 as a float32 image (3, H, W) in [0, 1]."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return image.float().div_(255.0)
