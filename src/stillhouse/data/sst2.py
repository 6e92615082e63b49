"""SST-2: sentences of film reviews, negative or positive."""

from __future__ import annotations

import hashlib
from typing import ClassVar

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.labelled_lines import Entry, found_lines, read_lines
from stillhouse.data.options import TextOptions
from stillhouse.data.text_rows import text_splits

CLASSES = ("negative", "positive")
_URL = (
    "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/"
    "457ffd83de90a9d6d472d8ffc31bbffe40a8b236/data/SST2/{}.tsv"
)
# The data's split by the library's name of it.
_NAMES = {"train": "train", "val": "dev", "test": "test"}


class Sst2(DataSet[TextOptions]):
    """Stanford Sentiment Treebank (Socher et al. 2013), whole sentences, without neutral ones."""

    name = "sst2"
    title = "9,613 sentences of film reviews, negative or positive"
    tasks = ("classification",)
    licence = "none stated"
    source = "github.com/clairett/pytorch-sentiment-classification (Stanford Sentiment Treebank)"
    files = (
        "text_classification/sst2_train.jsonl.gz",
        "text_classification/sst2_dev.jsonl.gz",
        "text_classification/sst2_test.jsonl.gz",
    )
    editions: ClassVar = {
        "417341e3efb9c709ee8b4d5917af44c23f3a5a835e21c041b24df645e9258122": "binary sentences"
    }
    rows: ClassVar = {"train": 6_920, "val": 872, "test": 1_821}
    get = "with a network it is downloaded on first use"

    Options = TextOptions

    def open(self, options: TextOptions, seed: int) -> Splits:
        """Splits "train", "val" (the official dev) and "test"."""
        official, digests = {}, []
        for (role, named), file in zip(_NAMES.items(), self.files, strict=True):
            path = found_lines(self, file, _URL.format(named), parse)
            official[role] = read_lines(path, len(CLASSES))
            digests.append(content_hash(path))
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        edition = self.edition_of(digest)
        return text_splits(self, official, options, classes=CLASSES, digest=digest, edition=edition)


def parse(content: bytes) -> list[Entry]:
    """The source's lines: the sentence, a tab, 0 or 1."""
    entries = []
    for line in content.decode("utf-8").splitlines():
        text, _, label = line.rpartition("\t")
        if text.strip():
            entries.append({"text": text.strip(), "label": int(label)})
    return entries
