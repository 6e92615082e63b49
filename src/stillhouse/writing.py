"""Files that are whole or absent, and what is said when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stillhouse.errors import CheckpointError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_atomic(path: Path, data: bytes, *, synced: bool = True) -> None:
    """Write a file so that it is either whole or absent, and survives a power cut.

    Args:
        path: of the file.
        data: what it holds.
        synced: wait until it is on the disk; else a power cut (no kill) may leave it damaged,
            and no time is spent on waiting.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written; the old one, if any,
            is untouched.
    """
    aside = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if error.errno in FULL:
            raise CheckpointError(disk_full(path, len(data))) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def file_name(name: str) -> str:
    """A name for a file or folder that stands for any name, and for no other."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
    if plain and plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def disk_full(path: Path, needed: int | None = None) -> str:
    """What is said of a full disk.

    Args:
        path: what could not be written.
        needed: its bytes, where they are known.
    """
    folder = next((p for p in (path, *path.absolute().parents) if p.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    needs = f" needs {needed:,} bytes and" if needed is not None else " cannot be written;"
    return (
        f"the disk is full: {path}{needs} {free:,} are free. "
        "What was saved before is untouched; make room and run the same command again"
    )


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Tell a disk that runs full inside the block, whatever was being written below `folder`.

    Raises:
        CheckpointError: it ran full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(disk_full(Path(error.filename or folder))) from error
