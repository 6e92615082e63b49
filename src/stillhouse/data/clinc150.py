"""CLINC150: short requests to an assistant in 150 intents, and some in none of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, found_or_fetched
from stillhouse.data.options import TextOptions
from stillhouse.data.text_rows import TextRows, text_splits
from stillhouse.errors import DataError

_URL = "https://raw.githubusercontent.com/clinc/oos-eval/master/data/data_full.json"
_ROLES = ("train", "val", "test")
OUT_OF_SCOPE = "oos"


class ClincOptions(TextOptions):
    """Options of CLINC150."""

    oos: Literal["none", "class"] = Field(
        "none", description="out-of-scope requests: left out, or one more class, 'oos', the last"
    )


class Clinc150(DataSet[ClincOptions]):
    """CLINC150 (Larson et al. 2019), `data_full.json`, gzipped.

    Keys `train`, `val`, `test` and `oos_train`, `oos_val`, `oos_test`; rows [text, intent].
    """

    name = "clinc150"
    title = "22,500 requests to an assistant in 150 intents, 1,200 out of scope"
    tasks = ("classification",)
    licence = "CC BY 3.0"
    source = "github.com/clinc/oos-eval"
    files = ("clinc150/data_full.json.gz",)
    editions: ClassVar = {
        "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0": "full"
    }
    rows: ClassVar = {"train": 15_000, "val": 3_000, "test": 4_500}
    get = "with a network it is downloaded on first use; or put data_full.json of the source there"

    Options = ClincOptions

    def open(self, options: ClincOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test"; classes in alphabetical order."""
        path = found_or_fetched(self, download)
        stored = read(path)
        classes = sorted({intent for _, intent in stored["train"]})
        parts = {role: list(stored[role]) for role in _ROLES}
        if options.oos == "class":
            classes.append(OUT_OF_SCOPE)
            for role in _ROLES:
                parts[role] += stored[f"oos_{role}"]
        number = {intent: place for place, intent in enumerate(classes)}
        official = {}
        for role, rows in parts.items():
            strange = sorted({intent for _, intent in rows} - number.keys())
            if strange:
                raise DataError(f"{path}, {role}: the intent '{strange[0]}' is not in train")
            labels = torch.tensor([number[intent] for _, intent in rows])
            official[role] = TextRows([text for text, _ in rows], labels)
        digest = content_hash(path)
        edition = self.edition_of(digest)
        return text_splits(self, official, options, classes=classes, digest=digest, edition=edition)


def read(path: Path) -> dict[str, list[list[str]]]:
    """The rows by key.

    Raises:
        DataError: damaged, or of another form.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as opened:
            stored: Any = json.load(opened)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read as gzipped JSON: {error}") from error
    return _checked(stored, path)


def _checked(stored: Any, path: Path) -> dict[str, list[list[str]]]:
    wanted = [*_ROLES, *(f"oos_{role}" for role in _ROLES)]
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), list) for k in wanted):
        raise DataError(f"{path} does not hold the lists {', '.join(wanted)}")
    for key in wanted:
        for number, row in enumerate(stored[key]):
            if not (isinstance(row, list) and len(row) == 2 and all(map(_is_text, row))):
                raise DataError(f"{path}, {key}, row {number}: [text, intent] is needed, not {row}")
    return stored


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def download(scratch: Path, target: Path) -> None:
    """Download data_full.json and convert."""
    download_file(_URL, scratch / "data_full.json")
    convert(scratch / "data_full.json", target)


def convert(source: Path, target: Path) -> None:
    """Write data_full.json in the one form on disk: checked, gzipped, its bytes untouched.

    Raises:
        DataError: not the file that is meant.
    """
    content = source.read_bytes()
    try:
        _checked(json.loads(content), source)
    except ValueError as error:
        raise DataError(f"{source} is no JSON: {error}") from error
    # Without a time in the header, so that the same content gives the same file.
    target.write_bytes(gzip.compress(content, mtime=0))
