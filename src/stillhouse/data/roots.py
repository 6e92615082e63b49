"""Where data lies: the read-only search path, and the cache for all that is made.

`STILLHOUSE_DATA` is a search path like PATH; its folders are only read. What is downloaded,
converted or decoded goes to `STILLHOUSE_CACHE` (default `~/.cache/stillhouse`), whose
`data` folder is searched last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from stillhouse.errors import DataError, nearest


def cache_root() -> Path:
    """The folder for everything that is made; it need not exist yet."""
    given = os.environ.get("STILLHOUSE_CACHE", "").strip()
    return Path(given).expanduser() if given else Path.home() / ".cache" / "stillhouse"


def cache_folder(*parts: str) -> Path:
    """A folder below the cache, created when absent.

    Raises:
        DataError: it cannot be created.
    """
    folder = cache_root().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create the cache folder {folder}: {error.strerror}; "
            "set STILLHOUSE_CACHE to a folder that can be written"
        ) from error
    return folder


def given_roots() -> list[Path]:
    """The folders named by STILLHOUSE_DATA, in order, whether they exist or not."""
    given = os.environ.get("STILLHOUSE_DATA", "")
    return [Path(part).expanduser() for part in given.split(os.pathsep) if part.strip()]


def search_path() -> list[Path]:
    """Every folder that is searched for data, in order."""
    return [*given_roots(), cache_root() / "data"]


def find_file(files: Iterable[str]) -> Path | None:
    """The first of `files` in the first root that has any of them."""
    names = list(files)
    for root in search_path():
        for name in names:
            if (root / name).is_file():
                return root / name
    return None


def missing(name: str, files: Sequence[str], *, get: str = "", tried: str = "") -> DataError:
    """The error for data that is not there: what, where looked, how to get it.

    Args:
        name: the data set.
        files: what was looked for, below each root.
        get: how to come by it.
        tried: the download that was tried and why it failed.
    """
    lines = [f"the data set '{name}' is not there: looked for {' or '.join(files)} below"]
    for root in search_path():
        note = "" if root.is_dir() else " (no such folder)"
        lines.append(f"  {root}{note}")
    if not given_roots():
        lines.append("STILLHOUSE_DATA is not set; set it to a folder that holds the data")
    else:
        lines.append("set STILLHOUSE_DATA to a folder that holds the data")
    if tried:
        lines.append(f"download tried: {tried}")
    if get:
        lines.append(f"how to get it: {get}")
    return DataError("\n".join(lines))


def locate(given: str, *, option: str, folder: bool = False) -> Path:
    """A user's own file or folder: as it stands, else below a data root.

    Args:
        given: the path in the recipe.
        option: the option that named it, for the error.
        folder: a folder is wanted, not a file.

    Raises:
        DataError: it does not exist, or is of the other kind; near names beside it are named.
    """
    path = Path(given).expanduser()
    tried = [path] if path.is_absolute() else [path, *(root / path for root in search_path())]
    for place in tried:
        if place.is_dir() if folder else place.is_file():
            return place
    kind = "folder" if folder else "file"
    if any(place.exists() for place in tried):
        raise DataError(f"data option '{option}': {given} exists but is not a {kind}")
    parent = tried[0].parent
    of_its_kind = Path.is_dir if folder else Path.is_file
    entries = list(parent.iterdir()) if parent.is_dir() else []
    beside = [entry.name for entry in entries if of_its_kind(entry)]
    hint = nearest(path.name, beside) if beside else ""
    places = ", ".join(str(place) for place in tried)
    raise DataError(f"data option '{option}': there is no {kind} {given} (tried {places}){hint}")
