"""Passages of English prose from four public sources, with the names that occur in some."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, found_or_fetched
from stillhouse.data.options import DataOptions
from stillhouse.errors import DataError

Part = Literal["crossner", "e2e", "gsm8k", "shakespeare"]
_DOMAINS = ("ai", "literature", "music", "politics", "science")
_RAW = "https://raw.githubusercontent.com/"


class ProseOptions(DataOptions):
    """Options of the passages."""

    parts: list[Part] = Field(
        ["crossner", "e2e", "gsm8k", "shakespeare"],
        min_length=1,
        description="sources, from which passages are drawn in equal shares",
    )
    words: int = Field(
        120, ge=10, le=20_000, description="a passage ends with the sentence that reaches this"
    )
    passages: dict[Literal["train", "test"], int] | None = Field(
        None, description="passages to keep per split, drawn by subset_seed; none: all there are"
    )
    subset_seed: int = Field(0, description="seed of the draw; not the run's seed")


class Passage(NamedTuple):
    """A text, and where named entities stand in it."""

    text: str
    entities: list[tuple[int, int]]


class Prose(DataSet[ProseOptions]):
    """Encyclopaedic sentences (CrossNER), restaurant descriptions (E2E), word problems
    (GSM8K) and plays (TinyShakespeare), joined to passages.

    Test passages come from the sources' own test files (of the plays, from their last tenth).
    Entities are annotated in CrossNER only.
    """  # noqa: D205 - one sentence

    name = "prose"
    title = "passages of English prose from four public sources"
    tasks = ("token-classification",)
    licence = "CrossNER MIT, E2E CC BY-SA 4.0, GSM8K MIT, Shakespeare public domain"
    source = (
        "github.com/zliucr/CrossNER, tuetschek/e2e-dataset, openai/grade-school-math, "
        "karpathy/char-rnn"
    )
    files = ("crossner/ai-test.txt.gz",)
    get = "with a network each source is downloaded on first use"

    Options = ProseOptions

    def open(self, options: ProseOptions, seed: int) -> Splits:
        """ "train" and "test"; views "text" and "entities" (offsets into the text)."""
        sources, digests = {}, []
        for split in ("train", "test"):
            chosen: list[Passage] = []
            for part in options.parts:
                files = _FILES[part](split)
                paths = [self._file(file, url) for file, url in files]
                digests += [content_hash(path) for path in paths]
                passages = _joined(_READERS[part](paths, split), options.words)
                chosen += _drawn(passages, split, part, options)
            sources[split] = TensorSource(
                {"text": [p.text for p in chosen], "entities": [p.entities for p in chosen]},
                name=f"prose/{split}",
            )
        digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        told = f"{'+'.join(options.parts)}, passages of {options.words} words"
        about = {
            "name": self.name,
            "hash": digest,
            "licence": self.licence,
            "source": self.source,
            "selection": told,
        }
        return Splits(sources, f"prose ({told})", about)

    def _file(self, file: str, url: str) -> Path:
        def fetch(scratch: Path, target: Path) -> None:
            download_file(_RAW + url, scratch / "raw")
            target.write_bytes(gzip.compress((scratch / "raw").read_bytes(), mtime=0))

        part = type("ProsePart", (Prose,), {"files": (file,)})()
        return found_or_fetched(part, fetch)


def _drawn(passages: list[Passage], split: str, part: str, options: ProseOptions) -> list[Passage]:
    wanted = (options.passages or {}).get(split)  # type: ignore[call-overload]
    if wanted is None:
        return passages
    share = -(-wanted // len(options.parts))
    if share > len(passages):
        raise DataError(
            f"data option 'passages': {share} {split} passages of {options.words} words are asked "
            f"of '{part}', which has {len(passages)}"
        )
    rng = generator(options.subset_seed, "prose", part, split)
    rows = torch.randperm(len(passages), generator=rng)[:share].sort().values
    return [passages[row] for row in rows.tolist()]


# From sentences to passages ----------------------------------------------------------------


def _joined(sentences: Iterator[Passage | None], words: int) -> list[Passage]:
    """Consecutive sentences joined until `words` are reached; None ends a passage early."""
    passages: list[Passage] = []
    text, entities = "", list[tuple[int, int]]()
    for sentence in sentences:
        if sentence is not None:
            start = len(text) + 1 if text else 0
            text = f"{text} {sentence.text}" if text else sentence.text
            entities += [(a + start, b + start) for a, b in sentence.entities]
        if len(text.split()) >= words or (sentence is None and text):
            passages.append(Passage(text, entities))
            text, entities = "", []
    return passages


# The sources -------------------------------------------------------------------------------


def _crossner_files(split: str) -> list[tuple[str, str]]:
    parts = ("train", "dev") if split == "train" else ("test",)
    return [
        (f"crossner/{domain}-{part}.txt.gz", f"zliucr/CrossNER/main/ner_data/{domain}/{part}.txt")
        for domain in _DOMAINS
        for part in parts
    ]


def _crossner(paths: Sequence[Path], split: str) -> Iterator[Passage | None]:
    for path in paths:
        for block in _text(path).strip().split("\n\n"):
            pairs = [line.split("\t") for line in block.split("\n") if line.strip()]
            if any(len(pair) != 2 for pair in pairs):
                raise DataError(f"{path}: lines of 'word TAB tag' are needed, not {pairs[0]}")
            yield spelt([word for word, _ in pairs], [tag for _, tag in pairs])
        yield None


_NO_SPACE_BEFORE = frozenset(".,;:!?)]}%'’”")
_NO_SPACE_AFTER = frozenset("([{$£€“")
_CLITICS = frozenset(("'s", "n't", "'re", "'ve", "'ll", "'d", "'m", "s", "t"))


def spelt(words: Sequence[str], tags: Sequence[str]) -> Passage:
    """Tokens with BIO tags as running text with the entities' offsets."""
    text, entities = "", list[tuple[int, int]]()
    for number, (word, tag) in enumerate(zip(words, tags)):
        before = words[number - 1] if number else ""
        tight = (
            not text
            or word[0] in _NO_SPACE_BEFORE
            or before in _NO_SPACE_AFTER
            or (before in {"'", "’"} and word in _CLITICS)
        )
        start = len(text) if tight else len(text) + 1
        text += word if tight else " " + word
        if tag.startswith("B-"):
            entities.append((start, len(text)))
        elif tag.startswith("I-") and entities:
            entities[-1] = (entities[-1][0], len(text))
    return Passage(text, entities)


def _e2e_files(split: str) -> list[tuple[str, str]]:
    name = "devset" if split == "train" else "testset_w_refs"
    return [(f"e2e_nlg/{name}.csv.gz", f"tuetschek/e2e-dataset/master/{name}.csv")]


def _e2e(paths: Sequence[Path], split: str) -> Iterator[Passage | None]:
    meaning = ""
    for row in csv.DictReader(io.StringIO(_text(paths[0]))):
        if row["mr"] != meaning and meaning:
            yield None  # references of one meaning belong together
        meaning = row["mr"]
        yield Passage(row["ref"].strip(), [])
    yield None


def _gsm8k_files(split: str) -> list[tuple[str, str]]:
    file = f"llm_text/gsm8k_{split}.jsonl.gz"
    return [
        (file, f"openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"),
    ]


def _gsm8k(paths: Sequence[Path], split: str) -> Iterator[Passage | None]:
    for line in _text(paths[0]).strip().split("\n"):
        problem = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", problem["answer"]).partition("####")[0]
        yield Passage(" ".join(f"{problem['question']} {answer}".split()), [])


def _shakespeare_files(split: str) -> list[tuple[str, str]]:
    return [
        (
            "llm_text/tinyshakespeare.txt.gz",
            "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        )
    ]


def _shakespeare(paths: Sequence[Path], split: str) -> Iterator[Passage | None]:
    speeches = _text(paths[0]).strip().split("\n\n")
    cut = len(speeches) * 9 // 10
    for speech in speeches[:cut] if split == "train" else speeches[cut:]:
        yield Passage(speech.strip(), [])


_FILES: dict[str, Callable[[str], list[tuple[str, str]]]] = {
    "crossner": _crossner_files,
    "e2e": _e2e_files,
    "gsm8k": _gsm8k_files,
    "shakespeare": _shakespeare_files,
}
_READERS: dict[str, Callable[[Sequence[Path], str], Iterator[Passage | None]]] = {
    "crossner": _crossner,
    "e2e": _e2e,
    "gsm8k": _gsm8k,
    "shakespeare": _shakespeare,
}


def _text(path: Path) -> str:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as opened:
            return opened.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as gzipped UTF-8 text: {error}") from error
