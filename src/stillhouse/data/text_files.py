"""A user's own labelled texts in csv, tsv or jsonl files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import OwnOptions, TextOptions
from stillhouse.data.split_files import files_of_splits, hash_of_splits
from stillhouse.data.splitting import hold_out
from stillhouse.data.text_rows import TextRows, text_splits
from stillhouse.errors import DataError, RecipeError, nearest
from stillhouse.parts.text_lines import entries

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_WANTED = f"train file (train with one of {', '.join(_SUFFIXES)}, with .gz or without)"


class TextFileOptions(OwnOptions, TextOptions):
    """Options of files of labelled texts."""

    text: str = Field("text", description="column or field that holds the text")
    label: str = Field("label", description="column or field that holds the class")


class TextFiles(DataSet[TextFileOptions]):
    """One file, or a folder with `train.*` and, if there are any, `val.*` and `test.*`.

    Files end in .csv, .tsv (first line: names of the columns) or .jsonl (one object a line),
    UTF-8, each with .gz if packed. Classes are the labels of train, as text: in numerical
    order where all are whole numbers, else in alphabetical order.
    """

    name = "text_files"
    title = "your own labelled texts in csv, tsv or jsonl files"
    tasks = ("classification",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = TextFileOptions

    def open(self, options: TextFileOptions, seed: int) -> Splits:
        """The splits there are; "test" is held out of train where there is none."""
        files = files_of_splits(options.path, _SUFFIXES, _WANTED)
        rows = {role: _read(path, options.text, options.label) for role, path in files.items()}
        classes = _classes(rows["train"], files["train"])
        number = {name: place for place, name in enumerate(classes)}
        official = {}
        for role, found in rows.items():
            for row in found:
                if row.label not in number:
                    raise DataError(
                        f"{files[role]}, line {row.line}: the class '{row.label}' does not occur "
                        f"in train{nearest(row.label, classes)}"
                    )
            labels = torch.tensor([number[row.label] for row in found])
            official[role] = TextRows([row.text for row in found], labels)
        if "test" not in official:
            held = hold_out(
                official["train"].labels,
                options.test,
                seed=options.subset_seed,
                name=str(files["train"]),
            )
            whole = official["train"]
            official |= {"test": whole.where(held), "train": whole.where(~held)}
        elif options.test is not None:
            raise RecipeError(
                f"data option 'test': {options.path} has a test split; leave 'test' out"
            )
        splits = text_splits(
            self,
            official,
            options,
            classes=classes,
            digest=hash_of_splits(files),
            edition="own texts",
        )
        splits.edition = f"{Path(options.path).name} (own texts)"
        splits.about["source"] = str(options.path)
        return splits


@dataclass(frozen=True)
class Row:
    """One labelled text and the line it stands on."""

    text: str
    label: str
    line: int


def _read(path: Path, text: str, label: str) -> list[Row]:
    """All rows of a file.

    Raises:
        DataError: damaged, not UTF-8, a missing column, an empty text or label; names the line.
    """
    rows = []
    for line, entry in entries(path):
        for wanted in (text, label):
            if wanted not in entry:
                raise DataError(
                    f"{path}, line {line}: no field '{wanted}'{nearest(wanted, entry)} (the "
                    "options 'text' and 'label' name the fields)"
                )
        found, named = entry[text], entry[label]
        if not isinstance(found, str) or not found.strip():
            raise DataError(f"{path}, line {line}: the text is empty (field '{text}': {found!r})")
        if isinstance(named, (dict, list, float)) or named is None or not str(named).strip():
            raise DataError(
                f"{path}, line {line}: the label is no class (field '{label}': {named!r})"
            )
        rows.append(Row(found, str(named).strip(), line))
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows")
    return rows


def _classes(rows: list[Row], path: Path) -> list[str]:
    names = {row.label for row in rows}
    if len(names) < 2:
        raise DataError(
            f"{path}: all {len(rows)} labels are '{rows[0].label}'; at least two classes must occur"
        )
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)
