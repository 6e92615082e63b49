"""Texts in a user's own files: lines of text, JSON lines, tables; as any editor saves them.

UTF-8 with or without a byte order mark, any line ends, packed with gzip where the name says so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError, nearest

TABLES = (".csv", ".tsv")
# Names under which a prompt is found, in order of preference.
PROMPTS = ("prompt", "instruction", "question", "query")


def content_of(path: Path) -> str:
    """All of a file as text.

    Raises:
        DataError: it is not there, damaged, or not UTF-8.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as opened:
            return opened.read().decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, without their ends, each with its number in the file."""
    # Not splitlines(): a text may hold the other line separators of Unicode as they are.
    content = content_of(path).replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line, each with the line's number.

    Raises:
        DataError: a line that is no JSON object.
    """
    for number, line in numbered_lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}, line {number}: an object is needed, not {line[:60]}")
        yield number, entry


def entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a .jsonl, .csv or .tsv file by field, each with its line.

    Raises:
        DataError: damaged, or a row with more or fewer fields than the first line names.
    """
    kind = kind_of(path)
    if kind not in TABLES:
        yield from json_lines(path)
        return
    lines = io.StringIO(content_of(path), newline="")
    reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        for entry in reader:
            if None in entry or None in entry.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(reader.fieldnames or [])} fields are "
                    "expected, as in the first line"
                )
            yield reader.line_num, entry
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num}: {error}") from error


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, without the packing."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def texts_of(path: Path, field: str = "text") -> list[tuple[int, str]]:
    """The texts of a file with their lines; blank ones are left out.

    Args:
        path: .jsonl, .csv or .tsv, of which `field` is read; anything else has a text a line.
        field: name of the field or column.

    Raises:
        DataError: a row without the field, or with something else than text in it.
    """
    if kind_of(path) not in (".jsonl", *TABLES):
        return list(numbered_lines(path))
    found = []
    for number, entry in entries(path):
        text = entry.get(field)
        if not isinstance(text, str):
            hint = "" if field in entry else nearest(field, entry)
            raise DataError(f"{path}, line {number}: no text in the field '{field}'{hint}")
        if text.strip():
            found.append((number, text))
    return found


def field_of(entry: Mapping[str, Any], names: Sequence[str], option: str, where: str) -> str:
    """The first of some names that a row has a field of.

    Raises:
        DataError: it has none; begins with `where` and names the data option that says which.
    """
    for name in names:
        if name in entry:
            return name
    raise DataError(
        f"{where}: no field '{names[0]}'{nearest(names[0], entry)} (the option '{option}' names "
        "the field)"
    )


def prompt_of(entry: Mapping[str, Any], field: str | None, where: str) -> str:
    """The prompt of a row: one field, or that of the usual names with the input of an instruction.

    Raises:
        DataError: there is none, or it is empty; begins with `where`.
    """
    name = field_of(entry, PROMPTS if field is None else (field,), "prompt", where)
    found = entry[name]
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{where}: the prompt is empty (field '{name}': {found!r})")
    more = entry.get("input") if field is None and name == "instruction" else None
    return f"{found}\n\n{more}" if isinstance(more, str) and more.strip() else found
