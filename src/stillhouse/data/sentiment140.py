"""Sentiment140: tweets labelled by hand as negative, neutral or positive."""

from __future__ import annotations

import csv
import io
from typing import ClassVar

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.labelled_lines import Entry, UnsplitTextOptions, unsplit_texts

CLASSES = ("negative", "neutral", "positive")
_URL = (
    "https://raw.githubusercontent.com/anfelipe31/Sentiment-140-dataset/"
    "8321bacd046d9f340d42602dd25da5090b94fc68/testdata.manual.2009.06.14.csv"
)


class Sentiment140(DataSet[UnsplitTextOptions]):
    """The hand-labelled tweets of Go et al. 2009; the 1.6 million noisy ones are not here.

    `classes: [negative, positive]` makes the usual problem of two classes (359 tweets). Test
    rows are held out by us.
    """

    name = "sentiment140"
    title = "498 tweets labelled by hand, negative, neutral or positive"
    tasks = ("classification",)
    licence = "none stated"
    source = "github.com/anfelipe31/Sentiment-140-dataset (Go, Bhayani, Huang 2009)"
    files = ("text_classification/sentiment140_test.jsonl.gz",)
    editions: ClassVar = {
        "8520ddeb7cf0a67a81e6e859851a27ed74bf2f106a6b3812498c8e66dc36794f": "hand-labelled part"
    }
    rows: ClassVar = {"train": 398, "test": 100}
    get = "with a network it is downloaded on first use"

    Options = UnsplitTextOptions

    def open(self, options: UnsplitTextOptions, seed: int) -> Splits:
        """Splits "train" and "test"."""
        return unsplit_texts(self, options, _URL, parse, classes=CLASSES)


def parse(content: bytes) -> list[Entry]:
    """The source's table without a header: polarity (0, 2, 4), id, date, query, user, text."""
    table = csv.reader(io.StringIO(content.decode("latin-1"), newline=""))
    return [{"label": int(row[0]) // 2, "text": row[5].strip()} for row in table if row]
