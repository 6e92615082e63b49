"""A user's own texts to embed: files to learn from, a collection to search, scored pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.cached import content_hash
from stillhouse.data.cranfield import KINDS, Collection, Kind, first_of_each, judged_source
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import locate
from stillhouse.errors import DataError, RecipeError, nearest
from stillhouse.parts.text_lines import entries, json_lines, numbered_lines, texts_of

Pair = tuple[str, str, float]


class EmbeddingFileOptions(DataOptions):
    """Options of the user's own texts to embed."""

    documents: str | list[str] | None = Field(
        None,
        description="files with texts to learn from: .jsonl, .csv or .tsv (the field `text`), or "
        "any other with a text a line; none: the documents of `collection`",
    )
    queries: str | list[str] | None = Field(
        None, description="likewise, of texts that stand for queries"
    )
    text: str = Field("text", description="field or column that holds the text")
    collection: str | None = Field(
        None,
        description="folder in the form of BEIR, to judge by: corpus.jsonl (_id, text, and title "
        "if there is one), queries.jsonl (_id, text), and qrels.tsv or qrels/test.tsv (query, "
        "document, grade); each with .gz if packed",
    )
    pairs: str | None = Field(
        None,
        description=".jsonl, .csv or .tsv with sentence1, sentence2 and score, to judge by",
    )
    query_prefix: str = Field(
        "",
        description="put before every query, as some teachers ask for; what is stored, asked and "
        "learned is the text with it",
    )
    document_prefix: str = Field("", description="put before every document and side of a pair")
    val_share: float = Field(
        0.2, ge=0, lt=1, description="share of the queries, and of the pairs, judged in val"
    )
    test: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the texts held out for the test where there is neither collection "
        "nor pairs",
    )
    limit: int | None = Field(None, ge=2, description="learn from at most so many texts of a file")
    subset_seed: int = Field(0, description="seed of what is held out; not the run's seed")


class EmbeddingFiles(DataSet[EmbeddingFileOptions]):
    """Texts with the prefix of their kind; each distinct one once in train."""

    name = "embedding_files"
    title = "your own texts to embed, with your own collection or scored pairs to judge by"
    tasks = ("embedding",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = EmbeddingFileOptions

    def open(self, options: EmbeddingFileOptions, seed: int) -> Splits:
        """ "train", "val" where it can be, and "test"; views as `cranfield` has them."""
        files: list[Path] = []
        collection = _collection(options, files)
        pairs = _pairs(options, files)
        sent, kinds = _learned(options, collection, files)
        first = first_of_each(sent)
        sources = {}
        if collection is None and not pairs:
            first, held = _held_out(first, options)
            sources["test"] = _texts(sent, kinds, held, f"{self.name}/test")
        sources["train"] = _texts(sent, kinds, first, f"{self.name}/train")
        sources |= _judged(options, collection, pairs, self.name)
        digest = hashlib.sha256("".join(map(content_hash, files)).encode()).hexdigest()
        about: dict[str, Any] = {"name": self.name, "hash": digest, "source": "the user's"}
        prefixes = {"query": options.query_prefix, "document": options.document_prefix}
        if any(prefixes.values()):
            about["prefixes"] = prefixes
        named = ", ".join(dict.fromkeys(path.name for path in files))
        return Splits(sources, f"{named} (as given)", about)


def _files(given: str | Sequence[str] | None, option: str) -> list[Path]:
    names = [] if given is None else [given] if isinstance(given, str) else given
    return [locate(name, option=option) for name in names]


def _learned(
    options: EmbeddingFileOptions, collection: Collection | None, files: list[Path]
) -> tuple[list[str], list[int]]:
    """Texts as they are sent, and the number of the kind of each."""
    sent: list[str] = []
    kinds: list[int] = []
    # What is judged is not learned from: people hand in the collection's own queries as well.
    judged = {text for _, text in collection.queries} if collection is not None else set()

    def add(texts: Sequence[str], kind: Kind, prefix: str) -> None:
        sent.extend(prefix + text for text in texts)
        kinds.extend([KINDS.index(kind)] * len(texts))

    for kind, given, prefix in (
        (KINDS[0], options.documents, options.document_prefix),
        (KINDS[1], options.queries, options.query_prefix),
    ):
        option = "documents" if kind == KINDS[0] else "queries"
        for path in _files(given, option):
            files.append(path)
            texts = [text for _, text in texts_of(path, options.text) if text not in judged]
            add(texts[: options.limit], kind, prefix)
    if options.documents is None and collection is not None:
        known = [text for _, _, text in collection.documents]  # with their prefix already
        add(known[: options.limit], KINDS[0], "")
    if options.documents is None and options.queries is None and collection is None:
        raise RecipeError(
            "embedding_files needs texts to learn from: data.options.documents, queries, or a "
            "collection"
        )
    if len(set(sent)) < 2:
        raise DataError(f"{len(set(sent))} texts to learn from were found; at least two are needed")
    return sent, kinds


def _texts(
    sent: Sequence[str], kinds: Sequence[int], rows: Sequence[int], name: str
) -> TensorSource:
    views = {"text": [sent[i] for i in rows], "kind": torch.tensor([kinds[i] for i in rows])}
    return TensorSource(views, ids=torch.tensor(list(rows)), name=name)


def _held_out(rows: Sequence[int], options: EmbeddingFileOptions) -> tuple[list[int], list[int]]:
    count = min(max(1, round(len(rows) * options.test)), len(rows) - 1)
    order = torch.randperm(len(rows), generator=generator(options.subset_seed, "held out"))
    held = set(order[:count].tolist())
    parts = [[row for place, row in enumerate(rows) if (place in held) == out] for out in (0, 1)]
    return parts[0], parts[1]


def _judged(
    options: EmbeddingFileOptions, collection: Collection | None, pairs: list[Pair], name: str
) -> dict[str, TensorSource]:
    """ "val" and "test" of a collection and of pairs; val has none where the share is too small."""
    empty = Collection([], [], {})
    kept = collection or empty
    queries = _shared(kept.queries, options, "queries")
    sides = _shared(pairs, options, "pairs")
    found = {}
    for role in ("val", "test"):
        if len(queries[role]) + len(sides[role]) >= 2 or (role == "test" and queries[role]):
            found[role] = judged_source(
                kept, queries[role], sides[role], f"{name}/{role}", options.query_prefix
            )
    return found


def _shared(rows: Sequence[Any], options: EmbeddingFileOptions, what: str) -> dict[str, list[Any]]:
    count = int(len(rows) * options.val_share)
    order = torch.randperm(len(rows), generator=generator(options.subset_seed, what)).tolist()
    parts = {"val": order[:count], "test": order[count:]}
    return {role: [rows[i] for i in sorted(chosen)] for role, chosen in parts.items()}


def _collection(options: EmbeddingFileOptions, files: list[Path]) -> Collection | None:
    if options.collection is None:
        return None
    folder = locate(options.collection, option="collection", folder=True)
    corpus, asked, graded = (
        _one(folder, names)
        for names in (("corpus.jsonl",), ("queries.jsonl",), ("qrels.tsv", "qrels/test.tsv"))
    )
    files += [corpus, asked, graded]
    prefix = options.document_prefix
    documents = [
        (key, "", prefix + _titled(entry, text)) for key, text, entry in _keyed(corpus, "text")
    ]
    queries = [(key, text) for key, text, _ in _keyed(asked, "text")]
    grades = _grades(graded, {d[0] for d in documents}, {q[0] for q in queries})
    # A file of queries often holds those of other splits as well, which nothing is known of.
    judged = [query for query in queries if query[0] in grades]
    if not judged:
        raise DataError(f"{graded} grades no document above 0 for any query of {asked}")
    return Collection(documents, judged, grades)


def _one(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for packed in ("", ".gz"):
            if (folder / (name + packed)).is_file():
                return folder / (name + packed)
    raise DataError(f"data option 'collection': {folder} holds no {' or '.join(names)}")


def _keyed(path: Path, field: str) -> list[tuple[str, str, dict[str, Any]]]:
    found: dict[str, tuple[str, str, dict[str, Any]]] = {}
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        for name in ("_id", field):
            if name not in entry:
                raise DataError(f"{where}: no field '{name}'{nearest(name, entry)}")
        key, text = str(entry["_id"]), entry[field]
        if not isinstance(text, str):
            raise DataError(f"{where}: no text in the field '{field}'")
        if key in found:
            raise DataError(f"{where}: the _id '{key}' occurs twice")
        found[key] = (key, text, entry)
    if not found:
        raise DataError(f"{path} is empty: it holds no rows")
    return list(found.values())


def _titled(entry: Mapping[str, Any], text: str) -> str:
    """Title and text, as BEIR joins them; not where the text begins with its title anyway."""
    title = str(entry.get("title") or "").strip()
    return text if not title or text.lstrip().startswith(title) else f"{title} {text}".strip()


def _grades(path: Path, documents: set[str], queries: set[str]) -> dict[str, dict[str, int]]:
    """Grades above 0 in the form of BEIR (query, document, grade) or of TREC (query, 0, ...)."""
    found: dict[str, dict[str, int]] = {}
    for place, (number, line) in enumerate(numbered_lines(path)):
        fields = line.split("\t") if "\t" in line else line.split()
        where = f"{path}, line {number}"
        if len(fields) not in (3, 4):
            raise DataError(f"{where}: query, document and grade are needed, not {line[:60]!r}")
        query, document, said = fields[0].strip(), fields[-2].strip(), fields[-1].strip()
        try:
            grade = int(float(said))
        except ValueError as error:
            if place == 0:
                continue  # names of the columns
            raise DataError(f"{where}: the grade {said!r} is no number") from error
        for key, known, what in ((query, queries, "query"), (document, documents, "document")):
            if key not in known:
                raise DataError(f"{where}: there is no {what} '{key}'")
        if grade > 0:
            found.setdefault(query, {})[document] = grade
    return found


def _pairs(options: EmbeddingFileOptions, files: list[Path]) -> list[Pair]:
    if options.pairs is None:
        return []
    path = locate(options.pairs, option="pairs")
    files.append(path)
    found: list[Pair] = []
    for number, entry in entries(path):
        where = f"{path}, line {number}"
        for name in ("sentence1", "sentence2", "score"):
            if name not in entry:
                raise DataError(f"{where}: no field '{name}'{nearest(name, entry)}")
        try:
            score = float(entry["score"])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: the score {entry['score']!r} is no number") from error
        if not torch.tensor(score).isfinite():
            raise DataError(f"{where}: the score {entry['score']!r} is no number")
        one, other = (options.document_prefix + str(entry[f"sentence{i}"]) for i in (1, 2))
        found.append((one, other, score))
    if len(found) < 2:
        raise DataError(f"{path} holds {len(found)} pairs; at least two are needed")
    return found
