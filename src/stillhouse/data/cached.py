"""What is made is written whole or not at all, and checked when it is read again."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from stillhouse.errors import DataError

_log = logging.getLogger(__name__)
_BLOCK = 1 << 20


def content_hash(path: Path) -> str:
    """sha256 of a file's content; of the unpacked content when its name ends in .gz.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and contents of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place in one move.

    Raises:
        DataError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    beside = Path(name)
    try:
        write(beside)
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.chmod(0o644)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors with their own hash in the header.

    Raises:
        DataError: the folder cannot be written or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = {"sha256": tensors_hash(held)}

    def write(beside: Path) -> None:
        try:
            save_file(held, str(beside), metadata=header)
        except SafetensorError as error:
            # The library reports a full disk under its own name.
            raise OSError(str(error)) from error

    write_whole(path, write)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: truncated, changed, or not written by `save_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if header.get("sha256") != tensors_hash(tensors):
        raise DataError(f"{path} is damaged: its content is not what its header says")
    return tensors


def cached_tensors(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept at `path`, made first when they are not there or damaged.

    A cache that cannot be written costs time only: a warning tells so, and the result is the
    same.
    """
    if path.is_file():
        try:
            return load_tensors(path)
        except DataError as error:
            _log.warning("%s; making it again", error)
    made = dict(make())
    try:
        save_tensors(path, made)
    except DataError as error:
        _log.warning("%s; it will be made again next time", error)
    return made
