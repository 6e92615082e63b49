"""Which words a large model would keep: texts cut to chunks, shortened by it, traced back.

Three stages: `ask_to_shorten` (a labelling stage), `align_words` (closed form), and a filter
on the two quality rates. What a side of a comparison is judged by is made here too, so that
all sides see the same words and labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Source, read_rows
from stillhouse.engine.job import Job
from stillhouse.losses.sequence import IGNORED
from stillhouse.method import Method
from stillhouse.metrics.kept_information import Information
from stillhouse.metrics.tagging import auc, f1
from stillhouse.parts.requests import chat, enclose, unwrap
from stillhouse.parts.select import keep_top
from stillhouse.parts.text_spans import (
    Alignment,
    Filtered,
    Word,
    align,
    chunk,
    count_tokens,
    lemma,
    percentile_filter,
    split_words,
)
from stillhouse.stages.label import answer_in, label, replies
from stillhouse.teacher import Request
from stillhouse.teachers.asking import FLAGGED, parse_shard, select

Commas = Literal["inherit", "drop", "align"]

ROLE = (
    "You are a careful linguist who shortens passages without losing what they say. You only "
    "ever cross words out."
)
TASK = (
    "Shorten the passage below by crossing out words.\n"
    "1. Cross out only words that carry little information.\n"
    "2. Leave the remaining words in their order.\n"
    "3. Leave every remaining word in exactly the form it has.\n"
    "4. Use no abbreviations and no emojis in place of words.\n"
    "5. Add nothing: no word, no symbol, no comment.\n"
    "Cross out as much as you can while someone who reads the rest would still learn every fact. "
    "Answer with the shortened passage alone.\n\n"
)
# About one token of a large model each; their concatenation is the text.
_TOKEN = re.compile(r"\n|[^\S\n]*\w{1,4}|[^\S\n]*[^\w\s]|[^\S\n]+")


@dataclass(frozen=True)
class Shortening:
    """How texts are shortened and traced back.

    Attributes:
        chunk: most tokens of a chunk, by the estimate of `count_tokens`.
        inclusive: chunks may hold one token more, as released.
        temperature: of the model.
        top_p: of the model.
        max_tokens: longest answer.
        seed: asked of the server, None for none.
        window: of the alignment.
        commas: a comma inherits the label of the word before it, gets none (drop), or is
            aligned like a word.
        lemmas: words are equal when their lemmas are.
        limit: most chunks to ask for.
        shard: "i/n": ask part i of n only.
    """

    chunk: int = 512
    inclusive: bool = False
    temperature: float = 0.3
    top_p: float = 1.0
    max_tokens: int = 4000
    seed: int | None = None
    window: int = 400
    commas: Commas = "inherit"
    lemmas: bool = False
    limit: int | None = None
    shard: str | None = None


class Chunk(NamedTuple):
    """A part of a document.

    Attributes:
        document: number of the document.
        start: offset in it.
        text: the part; blanks at its ends are left out.
    """

    document: int
    start: int
    text: str


class Labelled(NamedTuple):
    """A chunk with a label per word.

    Attributes:
        chunk: the text.
        words: of `split_words`.
        labels: 1 kept, 0 dropped, -100 no label.
        shortened: what the model answered.
        rates: variation, hitting, matching, alignment gap, compression.
    """

    chunk: Chunk
    words: list[Word]
    labels: list[int]
    shortened: str
    rates: dict[str, float]


RATES = ("variation", "hitting", "matching", "gap", "compression")


def cut_texts(texts: Sequence[str], how: Shortening) -> list[Chunk]:
    """Chunks of texts, ending at a full stop or a line's end where there is one.

    Source: LLMLingua-2 section 3.1 (chunk-wise compression): long passages are shortened too
    much.
    """
    found = []
    for number, text in enumerate(texts):
        tokens = [m.group() for m in _TOKEN.finditer(text)]
        starts = [not (t[0].isalnum() or t[0] == "_") for t in tokens]
        marks = [token.strip(" \t") for token in tokens]
        offset = 0
        for first, last in chunk(marks, how.chunk, inclusive=how.inclusive, starts=starts):
            whole = "".join(tokens[first:last])
            inner = whole.strip()
            if inner:
                lead = len(whole) - len(whole.lstrip())
                found.append(Chunk(number, offset + lead, inner))
            offset += len(whole)
    return found


def question(text: str, how: Shortening) -> Request:
    """The request to shorten one chunk: delete-only instruction in our own words."""
    return chat(
        TASK + enclose(text),
        system=ROLE,
        temperature=how.temperature,
        top_p=how.top_p,
        max_tokens=how.max_tokens,
        seed=how.seed,
    )


def asked(chunks: Sequence[Chunk], how: Shortening) -> list[Chunk]:
    """The chunks that are asked for under a limit or shard, in order."""
    if how.limit is None and how.shard is None:
        return list(chunks)
    part = parse_shard(how.shard) if how.shard else None
    keys = {
        request.key(draw)
        for request, draw in select(
            (question(c.text, how) for c in chunks), limit=how.limit, shard=part
        )
    }
    return [c for c in chunks if question(c.text, how).key() in keys]


def ask_to_shorten(
    job: Job, name: str, chunks: Sequence[Chunk], how: Shortening, *, kind: str = "label"
) -> dict[str, Any]:
    """Stage: the recipe's endpoint shortens every chunk; see `stages.label`."""
    return label(
        job, name, lambda: (question(c.text, how) for c in chunks), kind=kind, total=len(chunks)
    )


def words_of(text: str) -> list[str]:
    """The words of `split_words`, without where they stand."""
    return [word.text for word in split_words(text)]


def label_words(
    source: str, shortened: str, how: Shortening
) -> tuple[list[Word], list[int], Alignment]:
    """Labels of a text's words by what a shortened form of it holds.

    Args:
        source: the text.
        shortened: what is left of it.
        how: window, commas, equality.

    Returns:
        Words with offsets, a label per word, the alignment behind them (without commas,
        unless they are aligned).
    """
    words = split_words(source)
    left = words_of(shortened)
    aligned = [i for i, w in enumerate(words) if how.commas == "align" or w.text != ","]
    if how.commas != "align":
        left = [word for word in left if word != ","]
    found = align(
        [words[i].text for i in aligned],
        left,
        window=how.window,
        form=lemma if how.lemmas else str.lower,
    )
    labels = [IGNORED] * len(words)
    for i, kept in zip(aligned, found.labels):
        labels[i] = int(kept)
    if how.commas == "inherit":
        for i, word in enumerate(words):
            if word.text == ",":
                labels[i] = labels[i - 1] if i else 0
    return words, labels, found


def align_words(job: Job, name: str, chunks: Sequence[Chunk], how: Shortening) -> list[Labelled]:
    """Stage: every answer traced back to its chunk.

    Answers that were cut off or filtered are left out: they say nothing of the words that
    are missing.
    """

    def compute() -> dict[str, Tensor]:
        labels, rates, sound = [], [], []
        with replies(job) as journal:
            for part in chunks:
                entry = answer_in(journal, question(part.text, how))
                sound.append(entry["finish_reason"] not in FLAGGED)
                _, own, found = label_words(part.text, unwrap(entry["text"]), how)
                labels += own
                rates.append(_rates(found))
        return {
            "labels": torch.tensor(labels, dtype=torch.int8),
            "rates": torch.tensor(rates, dtype=torch.float64).reshape(-1, len(RATES)),
            "sound": torch.tensor(sound, dtype=torch.bool),
        }

    stored = job.once(name, compute)
    return list(_labelled(job, chunks, how, stored))


def _rates(found: Alignment) -> list[float]:
    return [
        found.variation_rate,
        found.hitting_rate,
        found.matching_rate,
        found.alignment_gap,
        found.compression_rate,
    ]


def _labelled(
    job: Job, chunks: Sequence[Chunk], how: Shortening, stored: Mapping[str, Tensor]
) -> Iterator[Labelled]:
    labels, place = stored["labels"].tolist(), 0
    with replies(job) as journal:
        for number, part in enumerate(chunks):
            words = split_words(part.text)
            own = labels[place : place + len(words)]
            place += len(words)
            if not stored["sound"][number]:
                continue
            answer = unwrap(answer_in(journal, question(part.text, how))["text"])
            rates = dict(zip(RATES, stored["rates"][number].tolist()))
            yield Labelled(part, words, own, answer, rates)


def filter_words(
    labelled: Sequence[Labelled],
    *,
    variation_percentile: float = 90.0,
    gap_percentile: float = 90.0,
    keep_ties: bool = True,
) -> Filtered:
    """Which chunks are kept: those that vary little and align well."""
    return percentile_filter(
        [one.rates["variation"] for one in labelled],
        [one.rates["gap"] for one in labelled],
        variation_percentile=variation_percentile,
        gap_percentile=gap_percentile,
        keep_ties=keep_ties,
    )


# Judging -----------------------------------------------------------------------------------


def texts_of(source: Source) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Texts and entities of a source, in order."""
    texts: list[str] = []
    entities: list[list[tuple[int, int]]] = []
    for start in range(0, len(source), 512):
        rows = torch.arange(start, min(start + 512, len(source)))
        batch = read_rows(source, rows, None)
        texts += batch.view("text")
        entities += batch.get("entities") or [[] for _ in rows]
    return texts, entities


def judged_words(job: Job, how: Shortening) -> tuple[list[Labelled], list[list[tuple[int, int]]]]:
    """Test chunks on which the model kept to its task, and the entities of each.

    Alignment and filter are the default ones whatever a side trains with, so that all sides
    are judged on the same words and labels.
    """
    how = Shortening(
        chunk=how.chunk,
        temperature=how.temperature,
        top_p=how.top_p,
        max_tokens=how.max_tokens,
        seed=how.seed,
    )
    texts, entities = texts_of(job.splits["test"])
    chunks = cut_texts(texts, how)
    ask_to_shorten(job, "compress-test", chunks, how, kind="judge")
    labelled = align_words(job, "align-test", chunks, how)
    kept = [labelled[i] for i in filter_words(labelled).kept]
    spans = []
    for one in kept:
        start, stop = one.chunk.start, one.chunk.start + len(one.chunk.text)
        own = entities[one.chunk.document]
        spans.append([(a - start, b - start) for a, b in own if a >= start and b <= stop])
    return kept, spans


Score = Callable[[Sequence[str]], list[list[float]]]


def judge_scores(
    labelled: Sequence[Labelled], entities: Sequence[Sequence[tuple[int, int]]], score: Score
) -> dict[str, float]:
    """How well scores agree with the model's labels, and what is left at its rate.

    Args:
        labelled: chunks with labels.
        entities: names of each chunk.
        score: texts to a score per word of `split_words`: higher is kept first.

    Returns:
        "auc" over all labelled words; "f1", "precision", "recall", "accuracy" when each text
        keeps the share of tokens that the model keeps overall; "entities", "numbers", "cloze"
        at that rate, and the same with "teacher_" for what the model itself keeps; "rate".
    """
    scores = score([one.chunk.text for one in labelled])
    rate = _teacher_rate(labelled)
    chosen, truth, values = [], [], []
    ours, theirs = Information(), Information()
    for one, own, spans in zip(labelled, scores, entities, strict=True):
        counts = [count_tokens(word.text) for word in one.words]
        keep = keep_top(own, counts, rate)
        given = [y == 1 for y in one.labels]
        ours.add(one.chunk.text, one.words, keep, spans)
        theirs.add(one.chunk.text, one.words, given, spans)
        marked = [i for i, y in enumerate(one.labels) if y != IGNORED]
        chosen += [keep[i] for i in marked]
        truth += [given[i] for i in marked]
        values += [own[i] for i in marked]
    figures = {"auc": auc(values, truth), **f1(chosen, truth), "rate": rate, **ours.compute()}
    figures |= {f"teacher_{name}": value for name, value in theirs.compute().items()}
    return figures


class WordDeletion(Method):
    """Base of baselines that learn nothing but counts: a subclass writes `scorer`."""

    def scorer(self, job: Job) -> Callable[[str], list[float]]:
        """A text to a score per word of `split_words`: higher is kept first."""
        raise NotImplementedError(f"{type(self).__name__} does not define scorer")

    def run(self, job: Job) -> Artifact:
        """Nothing is learnt; what is counted is counted when judging."""
        return Artifact("analysis", meta={"data": job.splits.edition})

    def judge(self, job: Job, artifact: Artifact) -> dict[str, float]:
        """As the compressors are judged, on the same words."""
        score = self.scorer(job)
        labelled, entities = judged_words(job, Shortening())
        return judge_scores(labelled, entities, lambda texts: [score(text) for text in texts])


def _teacher_rate(labelled: Sequence[Labelled]) -> float:
    kept = total = 0
    for one in labelled:
        for word, y in zip(one.words, one.labels):
            count = count_tokens(word.text)
            total += count
            kept += count if y == 1 else 0
    return kept / total if total else 0.0
