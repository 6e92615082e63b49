"""Subj: sentences about films, told by a reviewer or by a plot summary."""

from __future__ import annotations

from typing import ClassVar

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.labelled_lines import Entry, UnsplitTextOptions, unsplit_texts

CLASSES = ("subjective", "objective")
_URL = (
    "https://raw.githubusercontent.com/AcademiaSinicaNLPLab/sentiment_dataset/master/data/subj.all"
)


class Subj(DataSet[UnsplitTextOptions]):
    """The subjectivity data of Pang and Lee 2004; its test rows are held out by us."""

    name = "subj"
    title = "10,000 sentences about films, subjective or objective"
    tasks = ("classification",)
    licence = "none stated"
    source = "github.com/AcademiaSinicaNLPLab/sentiment_dataset (Pang and Lee 2004)"
    files = ("text_classification/subj.jsonl.gz",)
    editions: ClassVar = {
        "998f54aeb40785ea2bbc0011bce3337a1fdc90c8ae78f7fdbbcd39a8e83004d7": "whole"
    }
    rows: ClassVar = {"train": 8_000, "test": 2_000}
    get = "with a network it is downloaded on first use"

    Options = UnsplitTextOptions

    def open(self, options: UnsplitTextOptions, seed: int) -> Splits:
        """Splits "train" and "test"."""
        return unsplit_texts(self, options, _URL, parse, classes=CLASSES)


def parse(content: bytes) -> list[Entry]:
    """The source's lines: 0 or 1, a space, the sentence."""
    entries = []
    for line in content.decode("latin-1").split("\n"):
        label, _, text = line.strip().partition(" ")
        if text.strip():
            entries.append({"text": text.strip(), "label": int(label)})
    return entries
