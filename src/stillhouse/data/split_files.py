"""A user's own files of rows: one, or one for each split in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse.data.cached import content_hash
from stillhouse.data.roots import locate
from stillhouse.errors import DataError

# The library's name of a split by what its file may be called.
_STEMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}


def files_of_splits(given: str, suffixes: Sequence[str], wanted: str) -> dict[str, Path]:
    """The file of each split, "train" among them.

    Args:
        given: the option `path`: a file, which is train, or a folder with `train.*` and, if
            there are any, `val.*` and `test.*`; as it stands, or below a data root.
        suffixes: endings of such files, each with .gz if packed.
        wanted: what is told of a folder without a train file.

    Raises:
        DataError: it does not exist, a split has two files, or there is no train file.
    """
    endings = [suffix + packed for suffix in suffixes for packed in ("", ".gz")]
    if given.endswith(tuple(endings)):
        return {"train": locate(given, option="path")}
    folder = locate(given, option="path", folder=True)
    found: dict[str, Path] = {}
    for role, stems in _STEMS.items():
        places = [folder / f"{stem}{ending}" for stem in stems for ending in endings]
        there = [place for place in places if place.is_file()]
        if len(there) > 1:
            raise DataError(f"{folder}: both {there[0].name} and {there[1].name} are {role} data")
        if there:
            found[role] = there[0]
    if "train" not in found:
        raise DataError(f"{folder} holds no {wanted}")
    return found


def hash_of_splits(files: Mapping[str, Path]) -> str:
    """sha256 of the contents, and of which split each is."""
    told = "".join(f"{role}:{content_hash(path)};" for role, path in files.items())
    return hashlib.sha256(told.encode()).hexdigest()
