"""Cranfield: 1,400 abstracts on aerodynamics, 225 questions, and which abstract answers which."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.clinc150 import read as read_clinc
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import find_file, missing
from stillhouse.data.stsb import pair_source, read_pairs
from stillhouse.errors import DataError

Kind = Literal["document", "query"]
KINDS: tuple[Kind, Kind] = ("document", "query")
_PLACE = "retrieval/cranfield_"
_FILES = ("corpus.jsonl.gz", "queries.jsonl.gz", "qrels.tsv.gz")
_STSB = "stsb/stsb_en_{}.jsonl.gz"
_CLINC = "clinc150/data_full.json.gz"
_SENTENCE = re.compile(r"\s\.(?:\s+|$)")
_WORD = re.compile(r"[a-z]{2,}")
_SHORTEST = 3


class CranfieldOptions(DataOptions):
    """Options of Cranfield: what is learned from, and what is judged."""

    sentences: int | None = Field(
        None,
        ge=0,
        description="sentences of the abstracts in train, as documents; drawn by `draw`, none: all",
    )
    titles: int | None = Field(
        None,
        ge=0,
        description="titles of the abstracts in train, as queries; none: all",
    )
    words: int = Field(0, ge=0, description="of the most frequent words in train, as documents")
    stsb: int = Field(0, ge=0, description="sentences of STS-B's train in train, as documents")
    clinc150: int = Field(0, ge=0, description="requests of CLINC150's train in train, as queries")
    longest: int = Field(
        24, ge=1, description="words of a text of train at most; longer ones are left out"
    )
    prefix: str = Field(
        "",
        description="put before every query, as some teachers ask for; what is stored, asked and "
        "learned is the text with it",
    )
    val_queries: int = Field(
        45,
        ge=0,
        lt=225,
        description="questions, drawn by `draw`, that are judged in val and not in test",
    )
    pairs: bool = Field(False, description="val and test hold the scored pairs of STS-B as well")
    draw: int = Field(0, description="seed of what is drawn; not the run's seed")


@dataclass(frozen=True)
class Collection:
    """A test collection.

    Attributes:
        documents: (id, title, text).
        queries: (id, text).
        grades: query id to document id to grade, those above 0.
    """

    documents: list[tuple[str, str, str]]
    queries: list[tuple[str, str]]
    grades: dict[str, dict[str, int]]


class Cranfield(DataSet[CranfieldOptions]):
    """Cranfield (Cleverdon 1967) in the form of BEIR: corpus and queries, and a table of grades."""

    name = "cranfield"
    title = "1,400 abstracts on aerodynamics, 225 queries with their relevant abstracts"
    tasks = ("embedding",)
    licence = "none stated"
    source = "github.com/oussbenk/cranfield-trec-dataset"
    files = ("retrieval/cranfield_corpus.jsonl.gz",)
    editions: ClassVar = {
        "79961e39fdf74d7368cdca32c3606386ce1cec5251a0c94551cb777e553769ec": "cranfield-trec"
    }
    rows: ClassVar = {"documents": 1400, "queries": 225}
    get = (
        "convert the collection to retrieval/cranfield_corpus.jsonl.gz (_id, title, text a line), "
        "cranfield_queries.jsonl.gz (_id, text) and cranfield_qrels.tsv.gz (query-id, corpus-id, "
        "score, with a header)"
    )

    Options = CranfieldOptions

    def open(self, options: CranfieldOptions, seed: int) -> Splits:
        """Distinct texts in "train"; the abstracts in "corpus"; what is judged in "val", "test".

        Views: "text"; in train `kind` (0 document, 1 query); in val and test `place` and
        `relevant`, and `pair` and `target` where there are pairs (see `tasks/embedding.py`).
        """
        collection, digest = self._collection()
        edition = self.edition_of(digest.hexdigest())
        texts = list(self._texts(collection, options, digest))
        sent = sent_texts([text for text, _ in texts], [k for _, k in texts], options.prefix)
        first = first_of_each(sent)
        kinds = torch.tensor([KINDS.index(texts[i][1]) for i in first])
        train = {"text": [sent[i] for i in first], "kind": kinds}
        sources = {"train": TensorSource(train, name=f"{self.name}/train")}
        whole = [text for _, _, text in collection.documents if text]
        sources["corpus"] = TensorSource({"text": whole}, name=f"{self.name}/corpus")
        order = _chosen(len(collection.queries), None, options.draw, "queries")
        parts = {"val": order[: options.val_queries], "test": order[options.val_queries :]}
        for role, rows in parts.items():
            queries = [collection.queries[i] for i in sorted(rows)]
            pairs = self._pairs(role, digest) if options.pairs else []
            if queries or pairs:
                name = f"{self.name}/{role}"
                judged = judged_source(collection, queries, pairs, name, options.prefix)
                sources[role] = judged
        about: dict[str, Any] = {
            "name": self.name,
            "hash": digest.hexdigest(),
            "licence": self.licence,
            "source": self.source,
        }
        if options.prefix:
            about["prefixes"] = {"query": options.prefix, "document": ""}
        also = [n for n in ("stsb", "clinc150") if getattr(options, n)]
        return Splits(sources, f"{self.name} ({'+'.join([edition, *also])})", about)

    def _file(self, name: str) -> Path:
        path = find_file([name])
        if path is None:
            raise missing(self.name, [name], get=self.get)
        return path

    def _collection(self) -> tuple[Collection, Any]:
        paths = [self._file(_PLACE + name) for name in _FILES]
        digest = hashlib.sha256("".join(map(content_hash, paths)).encode())
        return read_collection(*paths), digest

    def _texts(
        self, collection: Collection, options: CranfieldOptions, digest: Any
    ) -> Iterable[tuple[str, Kind]]:
        """The texts to learn from with what they stand for; none of the test queries."""

        def some(found: Iterable[str], most: int | None, name: str) -> list[str]:
            texts = [t for t in dict.fromkeys(found) if _fits(t, options.longest)]
            return [texts[i] for i in sorted(_chosen(len(texts), most, options.draw, name))]

        titles = {t.rstrip(" .") for _, t, _ in collection.documents}
        sentences = (s for _, _, t in collection.documents for s in sentences_of(t))
        found = some((s for s in sentences if s not in titles), options.sentences, "sentences")
        yield from ((text, "document") for text in found)
        for text in some((t for _, t, _ in collection.documents), options.titles, "titles"):
            yield text, "query"
        counts = Counter(w for _, _, t in collection.documents for w in _WORD.findall(t))
        for word, _ in sorted(counts.items(), key=lambda at: (-at[1], at[0]))[: options.words]:
            yield word, "document"
        if options.stsb:
            path = self._file(_STSB.format("train"))
            digest.update(content_hash(path).encode())
            sides = (text for row in read_pairs(path) for text in row[:2])
            yield from ((text, "document") for text in some(sides, options.stsb, "stsb"))
        if options.clinc150:
            path = self._file(_CLINC)
            digest.update(content_hash(path).encode())
            requests = (text for text, _ in read_clinc(path)["train"])
            yield from ((text, "query") for text in some(requests, options.clinc150, "clinc150"))

    def _pairs(self, role: str, digest: Any) -> list[tuple[str, str, float]]:
        path = self._file(_STSB.format("dev" if role == "val" else role))
        digest.update(content_hash(path).encode())
        return read_pairs(path)


def sent_texts(texts: Sequence[str], kinds: Sequence[Kind], prefix: str) -> list[str]:
    """What teacher and student are both given: queries with the prefix, documents as they are."""
    return [
        prefix + text if kind == "query" else text for text, kind in zip(texts, kinds, strict=True)
    ]


def first_of_each(texts: Sequence[str]) -> list[int]:
    """Where each distinct text stands first, in order; letter by letter, spaces included."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text, place)
    return list(first.values())


def sentences_of(text: str) -> list[str]:
    """Sentences of a text whose full stops stand apart, as Cranfield's do."""
    return [part for part in (s.strip() for s in _SENTENCE.split(text)) if part]


def _fits(text: str, longest: int) -> bool:
    return _SHORTEST <= len(text.split()) <= longest


def _chosen(count: int, most: int | None, draw: int, name: str) -> list[int]:
    """`most` of `count` numbers by chance; all in a random order when it is None."""
    order = torch.randperm(count, generator=generator("cranfield", draw, name)).tolist()
    return order if most is None else order[:most]


def judged_source(
    collection: Collection,
    queries: Sequence[tuple[str, str]],
    pairs: Sequence[tuple[str, str, float]],
    name: str,
    prefix: str = "",
) -> TensorSource:
    """Documents, then queries, then the sides of scored pairs, as rows of one source.

    Args:
        collection: whose documents are searched; without queries they are left out.
        queries: that are judged.
        pairs: (one text, other text, score).
        name: of the source.
        prefix: of queries.
    """
    documents = collection.documents if queries else []
    number = {identity: place for place, (identity, _, _) in enumerate(documents)}
    judged = [
        [(number[d], grade) for d, grade in collection.grades.get(query, {}).items()]
        for query, _ in queries
    ]
    texts = [text for _, _, text in documents]
    texts += sent_texts([text for _, text in queries], ["query"] * len(queries), prefix)
    count = (len(documents), len(queries))
    rows = [(0, n, *count) for n in range(count[0])] + [(1, n, *count) for n in range(count[1])]
    most = max([1, *map(len, judged)])
    relevant = torch.tensor([-1, 0]).repeat(len(texts), most, 1)
    for query, found in enumerate(judged):
        if found:
            relevant[count[0] + query, : len(found)] = torch.tensor(found)
    views: dict[str, Any] = {"text": texts}
    place = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    if pairs:
        sides = pair_source(list(pairs), name).views
        views = {"text": texts + sides["text"]}
        views["pair"] = torch.cat([torch.full((len(texts), 3), -1), sides["pair"]])
        views["target"] = torch.cat([torch.zeros(len(texts)), sides["target"]])
        place = _followed(place, (-1, -1, *count), len(sides["text"]))
        relevant = torch.cat([relevant, torch.tensor([-1, 0]).repeat(len(sides["text"]), most, 1)])
    if count[0]:
        views |= {"place": place, "relevant": relevant}
    return TensorSource(views, name=name)


def _followed(rows: Tensor, row: Sequence[int], times: int) -> Tensor:
    return torch.cat([rows, torch.tensor(row).expand(times, -1)])


def read_collection(corpus: Path, queries: Path, qrels: Path) -> Collection:
    """A collection in the form of BEIR.

    Raises:
        DataError: damaged, of another form, or grades of documents or queries that are not there.
    """
    documents = [
        (str(d["_id"]), str(d.get("title", "")), str(d["text"]))
        for d in _lines(corpus, ("_id", "text"))
    ]
    asked = [(str(q["_id"]), str(q["text"])) for q in _lines(queries, ("_id", "text"))]
    grades = _grades(qrels)
    known, here = {d[0] for d in documents}, {q[0] for q in asked}
    lost = [q for q in grades if q not in here]
    lost += [d for found in grades.values() for d in found if d not in known]
    if lost:
        raise DataError(f"{qrels} grades '{lost[0]}', which is neither in {corpus} nor {queries}")
    return Collection(documents, asked, grades)


def _lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as opened:
            rows: list[Any] = [json.loads(line) for line in opened if line.strip()]
        for row in rows:
            for key in needed:
                row[key]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as gzipped JSON lines with {' and '.join(needed)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not rows:
        raise DataError(f"{path} holds no line")
    return rows


def _grades(path: Path) -> dict[str, dict[str, int]]:
    """Grades above 0; a document that is graded twice has the last grade."""
    found: dict[str, dict[str, int]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as opened:
            table = csv.DictReader(io.StringIO(opened.read()), delimiter="\t")
            for row in table:
                grade = int(row["score"])
                if grade > 0:
                    found.setdefault(row["query-id"], {})[row["corpus-id"]] = grade
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as a gzipped table with query-id, corpus-id and score: "
            f"{type(error).__name__}: {error}"
        ) from error
    return found
