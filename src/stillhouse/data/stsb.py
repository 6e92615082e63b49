"""STS benchmark: pairs of sentences with a score of how alike they mean, in four languages."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from stillhouse.batch import Splits, TensorSource
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import find_file, missing
from stillhouse.errors import DataError

_ROLES = {"train": "train", "val": "dev", "test": "test"}
Row = tuple[str, str, float]


class StsbOptions(DataOptions):
    """Options of the STS benchmark."""

    language: Literal["en", "de", "es", "nl"] = Field(
        "en", description="en is the original, the others are machine translations"
    )
    sentences: int | None = Field(
        None, ge=2, description="of train: keep the first so many different sentences; None: all"
    )


class Stsb(DataSet[StsbOptions]):
    """STS benchmark (Cer et al. 2017), as gzipped JSON lines: sentence1, sentence2, score 0-5."""

    name = "stsb"
    title = "8,628 pairs of sentences with a score of similarity, in four languages"
    tasks = ("embedding",)
    licence = "scores CC BY-SA 4.0; the sentences keep the terms of their sources"
    source = "github.com/PhilipMay/stsb-multi-mt"
    files = ("stsb/stsb_en_train.jsonl.gz",)
    editions: ClassVar = {
        "3e9feaeba4a031c7af393e4ebc5ab033f63f6acd3b903f12512a7399e6bf10c7": "en, stsb-multi-mt"
    }
    rows: ClassVar = {"train": 5749, "val": 1500, "test": 1379}
    get = (
        "convert the CSV files of the source to stsb/stsb_LANGUAGE_{train,dev,test}.jsonl.gz, "
        "one object with sentence1, sentence2 and score a line"
    )

    Options = StsbOptions

    def open(self, options: StsbOptions, seed: int) -> Splits:
        """ "train" is every different sentence once; "val" and "test" are sides of pairs.

        Views: "text"; in val and test also `pair` (number, side, number of pairs) and
        `target`, the score.
        """
        pairs, digest = {}, hashlib.sha256()
        for role, part in _ROLES.items():
            file = f"stsb/stsb_{options.language}_{part}.jsonl.gz"
            path = find_file([file])
            if path is None:
                raise missing(self.name, [file], get=self.get)
            pairs[role] = read_pairs(path)
            digest.update(content_hash(path).encode())
        texts = list(dict.fromkeys(text for row in pairs["train"] for text in row[:2]))
        kept = texts[: options.sentences]
        name = f"{self.name}/{options.language}"
        sources = {"train": TensorSource({"text": kept}, name=f"{name}/train")}
        for role in ("val", "test"):
            sources[role] = pair_source(pairs[role], f"{name}/{role}")
        about = {
            "name": self.name,
            "hash": digest.hexdigest(),
            "licence": self.licence,
            "source": self.source,
        }
        edition = self.edition_of(digest.hexdigest(), f"{options.language}, own copy")
        return Splits(sources, f"{self.name} ({edition})", about)


def pair_source(pairs: list[Row], name: str) -> TensorSource:
    """Rows 2 p and 2 p + 1 are the sides of pair p.

    Args:
        pairs: (one text, other text, score).
        name: of the source.
    """
    count = len(pairs)
    rows = torch.arange(2 * count)
    places = torch.stack([rows // 2, rows % 2, torch.full_like(rows, count)], dim=1)
    return TensorSource(
        {
            "text": [text for row in pairs for text in row[:2]],
            "pair": places,
            "target": torch.tensor([row[2] for row in pairs]).repeat_interleave(2),
        },
        name=name,
    )


def read_pairs(path: Path) -> list[Row]:
    """The rows of one file.

    Raises:
        DataError: damaged, or of another form.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as opened:
            stored: list[Any] = [json.loads(line) for line in opened if line.strip()]
        rows = [(str(r["sentence1"]), str(r["sentence2"]), float(r["score"])) for r in stored]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as gzipped JSON lines with sentence1, sentence2 and score: "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(rows) < 2:
        raise DataError(f"{path} holds {len(rows)} pairs; at least two are needed")
    return rows
