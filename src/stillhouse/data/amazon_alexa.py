"""Amazon Alexa: short product reviews, of which one in twelve is negative."""

from __future__ import annotations

import csv
import io
from typing import ClassVar

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.labelled_lines import Entry, UnsplitTextOptions, unsplit_texts

CLASSES = ("negative", "positive")
_URL = (
    "https://raw.githubusercontent.com/ghdkim/Sentiment-Analysis-on-Amazon-Alexa-Reviews/"
    "1d4a874b1ac387c23c8b817fb2d164cd6b4f6e43/data/amazon_alexa.tsv"
)


class AmazonAlexa(DataSet[UnsplitTextOptions]):
    """Reviews of Alexa devices with the buyer's verdict; its test rows are held out by us."""

    name = "amazon_alexa"
    title = "3,150 reviews of Alexa devices, 257 negative"
    tasks = ("classification",)
    licence = "none stated"
    source = "github.com/ghdkim/Sentiment-Analysis-on-Amazon-Alexa-Reviews"
    files = ("text_classification/amazon_alexa.jsonl.gz",)
    editions: ClassVar = {
        "012370681153cfd510198b0b453ffc6bb2c7406ca0da9dc5a12618ee20a2352e": "whole"
    }
    rows: ClassVar = {"train": 2_520, "test": 630}
    get = "with a network it is downloaded on first use"

    Options = UnsplitTextOptions

    def open(self, options: UnsplitTextOptions, seed: int) -> Splits:
        """Splits "train" and "test"."""
        return unsplit_texts(self, options, _URL, parse, classes=CLASSES)


def parse(content: bytes) -> list[Entry]:
    """The source's table: rating, date, variation, verified_reviews, feedback (0 or 1)."""
    table = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), delimiter="\t")
    return [
        {
            "text": row["verified_reviews"].strip(),
            "label": int(row["feedback"]),
            "product": row["variation"].strip(),
            "date": row["date"],
        }
        for row in table
    ]
