"""A user's own files of rows: one, or one for each split in a folder; and lines of JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def read_text(path: Path) -> str:
    """A file of UTF-8, unpacked where it ends in .gz.

    Raises:
        DataError: damaged, or not UTF-8.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
            return opened.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def json_lines(content: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of lines, with their numbers; blank lines are left out.

    Args:
        content: of the file.
        path: for the error.

    Raises:
        DataError: a line is no JSON object; by number.
    """
    # Not splitlines(): JSON strings may hold the other line separators of Unicode as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}, line {number}: an object is needed, not {line[:60]}")
        yield number, entry
