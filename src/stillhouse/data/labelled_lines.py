"""Labelled texts in gzipped JSON lines, one object per text, with a numbered class."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, found_or_fetched
from stillhouse.data.options import TextOptions
from stillhouse.data.splitting import hold_out
from stillhouse.data.text_rows import TextRows, text_splits
from stillhouse.errors import DataError

Entry = dict[str, Any]


class UnsplitTextOptions(TextOptions):
    """Options of labelled texts whose source has no test split."""

    test: int | float = Field(
        0.2,
        description="rows (integer) or share (below 1) held out for the test, class by class, "
        "by subset_seed",
    )

    @field_validator("test")
    @classmethod
    def _test_is_count_or_share(cls, value: int | float) -> int | float:
        if value <= 0 or (isinstance(value, float) and value >= 1):
            raise ValueError("a count of rows (integer >= 1) or a share in (0, 1)")
        return value


def read_lines(path: Path, classes: int) -> TextRows:
    """The texts of a file and their classes.

    Args:
        path: gzipped JSON lines with `text` and an integer `label`.
        classes: labels lie in [0, classes).

    Raises:
        DataError: damaged, or a line of another form; names it.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as opened:
            lines = opened.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as gzipped JSON lines: {error}") from error
    texts, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        text, label = _checked(entry, classes, f"{path}, line {number}")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise DataError(f"{path} is empty: it holds no rows")
    return TextRows(texts, torch.tensor(labels))


def _checked(entry: Any, classes: int, where: str) -> tuple[str, int]:
    text = entry.get("text") if isinstance(entry, dict) else None
    # A blank text is a text: one in forty of the Alexa reviews is a verdict without words.
    if not isinstance(text, str):
        raise DataError(f"{where}: an object with a string in the field 'text' is needed")
    label = entry.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < classes:
        raise DataError(f"{where}: the label {label!r} is no class; 0 to {classes - 1} are")
    return text, label


def write_lines(target: Path, entries: Iterable[Entry]) -> None:
    """Write entries in the form that `read_lines` reads; the same entries give the same file."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    # Without a time in the header.
    target.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def split_off_test(
    rows: TextRows, options: UnsplitTextOptions, name: str
) -> Mapping[str, TextRows]:
    """ "train" and "test" of texts that come without a split, the same for every run's seed."""
    held = hold_out(rows.labels, options.test, seed=options.subset_seed, name=name)
    return {"train": rows.where(~held), "test": rows.where(held)}


def unsplit_texts(
    data: DataSet[UnsplitTextOptions],
    options: UnsplitTextOptions,
    url: str,
    parse: Callable[[bytes], Sequence[Entry]],
    *,
    classes: Sequence[str],
) -> Splits:
    """Splits "train" and "test" of a data set whose one file comes without a split.

    Args:
        data: its facts.
        options: what is held out and kept, and how words are hashed.
        url: see `found_lines`.
        parse: likewise.
        classes: names of all classes.
    """
    path = found_lines(data, data.files[0], url, parse)
    digest = content_hash(path)
    official = split_off_test(read_lines(path, len(classes)), options, data.name)
    edition = data.edition_of(digest)
    return text_splits(data, official, options, classes=classes, digest=digest, edition=edition)


def found_lines(
    data: DataSet[Any], file: str, url: str, parse: Callable[[bytes], Sequence[Entry]]
) -> Path:
    """One file of a data set: on the search path, else downloaded and converted.

    Args:
        data: whose facts an error tells.
        file: below a data root.
        url: of the source's own file.
        parse: its bytes to entries.
    """

    def fetch(scratch: Path, target: Path) -> None:
        download_file(url, scratch / "raw")
        write_lines(target, parse((scratch / "raw").read_bytes()))

    part = type("Part", (type(data),), {"files": (file,)})()
    return found_or_fetched(part, fetch)
