"""A user's own texts without labels: .txt files (one text each) and .jsonl files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import locate
from stillhouse.errors import DataError
from stillhouse.parts.text_lines import content_of, texts_of


class PlainTextOptions(DataOptions):
    """Options of the user's own texts."""

    path: str = Field(description="a file or folder: as it stands, or below a data root")
    text: str = Field("text", description="field of a .jsonl line that holds the text")
    test: float = Field(
        0.1, gt=0, lt=1, description="share of texts held out for the test, by subset_seed"
    )
    limit: int | None = Field(None, ge=2, description="read at most so many texts")
    subset_seed: int = Field(0, description="seed of what is held out; not the run's seed")


class PlainTexts(DataSet[PlainTextOptions]):
    """Texts as they are: each .txt file is one, each line of a .jsonl file holds one."""

    name = "plain_texts"
    title = "your own texts without labels in txt or jsonl files"
    tasks = ("token-classification",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = PlainTextOptions

    def open(self, options: PlainTextOptions, seed: int) -> Splits:
        """ "train" and "test"; views "text" and "entities" (none)."""
        files = text_files(options.path)
        texts: list[str] = []
        for file in files:
            for text in read_texts(file, options.text):
                if options.limit is None or len(texts) < options.limit:
                    texts.append(text)
        if len(texts) < 2:
            raise DataError(f"{options.path} holds {len(texts)} texts; at least two are needed")
        held = min(max(1, round(len(texts) * options.test)), len(texts) - 1)
        order = torch.randperm(len(texts), generator=generator(options.subset_seed, "held out"))
        rows = {"test": order[:held].sort().values, "train": order[held:].sort().values}
        sources = {
            split: TensorSource(
                {"text": [texts[i] for i in chosen.tolist()], "entities": [[] for _ in chosen]},
                ids=chosen,
                name=f"plain_texts/{split}",
            )
            for split, chosen in rows.items()
        }
        digest = hashlib.sha256("".join(map(content_hash, files)).encode()).hexdigest()
        about = {"name": self.name, "hash": digest, "source": options.path}
        return Splits(sources, f"{Path(options.path).name} (as given)", about)


def text_files(path: str) -> list[Path]:
    """The .txt and .jsonl files that a path names, in order.

    Raises:
        DataError: there are none.
    """
    given = Path(path).expanduser()
    folder = given.is_dir() or (not given.is_file() and not given.suffix)
    place = locate(path, option="path", folder=folder)
    files = sorted(p for p in place.rglob("*") if p.suffix in _SUFFIXES) if folder else [place]
    if not files or files[0].suffix not in _SUFFIXES:
        raise DataError(f"data option 'path': {path} holds no {' or '.join(_SUFFIXES)} file")
    return files


_SUFFIXES = (".txt", ".jsonl")


def read_texts(file: Path, field: str) -> Iterator[str]:
    """The texts of one file, blank ones left out.

    Raises:
        DataError: a line that is no JSON object or lacks the field, by number.
    """
    if file.suffix == ".txt":
        text = content_of(file).replace("\r\n", "\n")
        if text.strip():
            yield text
        return
    yield from (text for _, text in texts_of(file, field))
