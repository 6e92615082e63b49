"""Getting a data set that is on no data root: download, convert, keep in the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from stillhouse.data.cached import write_whole
from stillhouse.data.data_set import DataSet
from stillhouse.data.roots import cache_folder, cache_root, find_file, missing
from stillhouse.errors import MissingExtra, StillhouseError

_TIMEOUT = 60.0  # seconds without an answer


def offline() -> bool:
    """Whether STILLHOUSE_OFFLINE forbids downloads."""
    return os.environ.get("STILLHOUSE_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def found_or_fetched(
    data: DataSet[Any], fetch: Callable[[Path, Path], None], *, file: str = ""
) -> Path:
    """The data set's file: on the search path, else downloaded and converted into the cache.

    Args:
        data: whose `files` are looked for.
        fetch: `fetch(scratch, target)` downloads into the folder `scratch` and writes the
            data in its one form to the file `target`.
        file: which of `data.files` a download makes; the last when not given.

    Raises:
        DataError: it is nowhere, and the download failed or is forbidden; says what was
            looked for, where, and why the download failed.
    """
    found = find_file(data.files)
    if found is not None:
        return found
    if offline():
        tried = "none, STILLHOUSE_OFFLINE is set"
        raise missing(data.name, data.files, get=data.get, tried=tried)
    target = cache_root() / "data" / (file or data.files[-1])
    scratch_root = cache_folder("downloads")
    with tempfile.TemporaryDirectory(dir=scratch_root, prefix=f"{data.name}.") as scratch:
        made = Path(scratch) / "made"
        try:
            fetch(Path(scratch), made)
        except MissingExtra as error:
            raise missing(data.name, data.files, get=data.get, tried=str(error)) from error
        except StillhouseError:
            raise
        except Exception as error:
            # Whatever a downloader raises, the user needs the same sentence.
            tried = f"{data.source}: {type(error).__name__}: {error}"
            raise missing(data.name, data.files, get=data.get, tried=tried) from error
        write_whole(target, lambda beside: shutil.copyfile(made, beside))
    return target


def torchvision_datasets() -> ModuleType:
    """The module `torchvision.datasets`.

    Raises:
        MissingExtra: torchvision is not installed.
    """
    try:
        return import_module("torchvision.datasets")
    except ImportError as error:
        raise MissingExtra("torchvision", "images", "to download the data") from error


def download_file(url: str, target: Path) -> None:
    """Download one file over https.

    Raises:
        OSError: no connection, or the server refuses.
        ValueError: not an https address.
    """
    if not url.startswith("https://"):
        raise ValueError(f"only https addresses are downloaded, not {url}")
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, target.open("wb") as out:
        while block := answer.read(1 << 20):
            out.write(block)
