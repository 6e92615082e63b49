r"""LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression.

A large model shortens texts by deleting words only (stage `compress`); its answers are traced
back to the source, which gives every word a label keep or drop (`align`); badly traced chunks
are left out (`filter`); a small bidirectional encoder learns the labels (`tagger`). To compress
is then to keep the words with the highest probability, so the result is always made of the
input's own words.

With labels :math:`y_i \in \{0, 1\}` of the tokens :math:`x_i` the loss is the mean of
:math:`-\log p(y_i \mid x)` over real tokens (section 4 of the paper).

Deviations from the released code, each with a setting that restores it:
words are trained in the form they have in the text and are read by offsets from the running
text, as in use (`train_words: lemma` trains lemmas, tokenised one by one); special tokens and
padding carry no label (`official_loss`); the closing special's label does not shift the last
one (`label_slip`); a chunk never exceeds the limit (`inclusive_chunks`); a long text is cut to
rows in place of losing its end (`cut_rows`); percentiles that would drop everything keep the
tie (`drop_ties`); compression works on offsets (`released_inference`).
The instruction is worded anew after the five rules of the released one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Shuffled, TensorSource
from stillhouse.clock import Clock
from stillhouse.engine.job import Best, Last
from stillhouse.errors import DataError, ModelError
from stillhouse.losses.sequence import IGNORED, token_cross_entropy
from stillhouse.method import Card, Claim, Method, MethodConfig, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.prompt_compression import Compression, cut_reading
from stillhouse.parts.text_reader import TextReader
from stillhouse.parts.text_spans import lemma, spread_labels, word_of_pieces
from stillhouse.stages.label import dry_run
from stillhouse.stages.prompt_compressor import PromptCompressor, reader_of
from stillhouse.stages.word_labels import (
    Commas,
    Labelled,
    Shortening,
    align_words,
    ask_to_shorten,
    asked,
    cut_texts,
    filter_words,
    judge_scores,
    judged_words,
    question,
    texts_of,
)
from stillhouse.teacher import Knowledge


class TaggerObjective(Objective):
    """Cross-entropy of keep and drop over labelled tokens.

    Args:
        student: gives logits (B, L, 2).
        official_loss: unlabelled tokens count as "drop", as in the released training.
    """

    def __init__(self, student: Net, official_loss: bool = False) -> None:
        super().__init__(student)
        self.official_loss = official_loss

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `task`."""
        out = self.student(batch.view("x"))
        ignored_as = 0 if self.official_loss else None
        loss = token_cross_entropy(out["logits"], batch["target"], ignored_as=ignored_as)
        return {"task": loss}

    def count(self, batch: Batch) -> int:
        """Labelled tokens; with `official_loss` all there are."""
        target = batch["target"]
        return int(target.numel() if self.official_loss else (target != IGNORED).sum())


class LLMLingua2(Method):
    """Labels by a large model, a filter, a token classifier: a prompt compressor."""

    card = Card(
        id="llmlingua2",
        title=(
            "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt "
            "Compression"
        ),
        summary="A small encoder learns from a large model which words of a prompt can go.",
        paper="Findings of ACL 2024; arXiv 2403.12968",
        year=2024,
        authors=(
            "Zhuoshi Pan",
            "Qianhui Wu",
            "Huiqiang Jiang",
            "Menglin Xia",
            "Xufang Luo",
            "Jue Zhang",
            "Qingwei Lin",
            "Victor Rühle",
            "Yuqing Yang",
            "Chin-Yew Lin",
            "H. Vicky Zhao",
            "Lili Qiu",
            "Dongmei Zhang",
        ),
        links=("https://arxiv.org/abs/2403.12968", "https://github.com/microsoft/LLMLingua"),
        room="language",
        task="token-classification",
        needs=("text",),
        yields="model",
        stages=(
            ("compress", "label"),
            ("align", "closed"),
            ("filter", "closed"),
            ("tagger", "train"),
        ),
    )

    class Config(MethodConfig):
        """Settings of `llmlingua2`."""

        chunk: int = Field(
            512,
            ge=8,
            description="most tokens of a chunk sent to the teacher; long ones are over-compressed",
            json_schema_extra={"source": "released collect_data.sh"},
        )
        inclusive_chunks: bool = Field(
            False,
            description="chunks may hold one token more, as released",
            json_schema_extra={"source": "released compress.py"},
        )
        temperature: float = Field(
            0.3, ge=0, description="of the teacher", json_schema_extra={"source": "released"}
        )
        top_p: float = Field(
            1.0, gt=0, le=1, description="of the teacher", json_schema_extra={"source": "released"}
        )
        max_tokens: int = Field(
            4000, ge=1, description="longest answer", json_schema_extra={"source": "released"}
        )
        request_seed: int | None = Field(
            None,
            description="seed asked of the server; none: not sent",
            json_schema_extra={"source": "our choice"},
        )
        limit: int | None = Field(
            None,
            ge=1,
            description="ask for at most so many chunks",
            json_schema_extra={"source": "our choice"},
        )
        shard: str | None = Field(
            None,
            pattern=r"^\d+/\d+$",
            description="i/n: ask for part i of n only",
            json_schema_extra={"source": "our choice"},
        )
        window: int = Field(
            400,
            ge=1,
            description="how far the alignment looks for a word",
            json_schema_extra={"source": "released collect_data.sh; label_word.py has 150"},
        )
        commas: Commas = Field(
            "inherit",
            description="a comma has the label of the word before it (inherit), none (drop), or "
            "is aligned like a word (align)",
            json_schema_extra={"source": "sheet; released: dropped"},
        )
        lemma_match: bool = Field(
            False,
            description="words are equal when their lemmas are (by spelling rules)",
            json_schema_extra={"source": "sheet; released: spaCy lemmas"},
        )
        filter: bool = Field(
            True,
            description="leave out chunks that vary much or align badly",
            json_schema_extra={"source": "paper, section 3.3"},
        )
        variation_percentile: float = Field(
            90.0,
            ge=0,
            le=100,
            description="chunks at or above this percentile of the variation rate go",
            json_schema_extra={"source": "released filter.py; the paper's text: 95"},
        )
        gap_percentile: float = Field(
            90.0,
            ge=0,
            le=100,
            description="of the rest, chunks at or above this percentile of the alignment gap go",
            json_schema_extra={"source": "released filter.py and paper"},
        )
        drop_ties: bool = Field(
            False,
            description="a percentile equal to the smallest value drops all chunks that have it, "
            "as released (which may drop everything)",
            json_schema_extra={"source": "released filter.py"},
        )
        length: int = Field(
            512,
            ge=8,
            description="pieces of a training row and of a window in use, specials included; a "
            "model with a length of its own keeps that",
            json_schema_extra={"source": "released train.sh and init_llmlingua2"},
        )
        train_words: Literal["surface", "lemma"] = Field(
            "surface",
            description="words as they stand, or their lemmas, tokenised one by one, as released",
            json_schema_extra={"source": "sheet; released: lemma"},
        )
        cut_rows: bool = Field(
            False,
            description="cut a chunk that is longer than a row, as released; else it becomes "
            "several rows",
            json_schema_extra={"source": "released utils.py"},
        )
        official_loss: bool = Field(
            False,
            description="specials and padding count as 'drop' in the loss, as released",
            json_schema_extra={"source": "released train_roberta.py"},
        )
        label_slip: bool = Field(
            False,
            description="the closing special's label stands before the last piece, as released",
            json_schema_extra={"source": "released utils.py"},
        )
        left_to_right: bool = Field(
            False,
            description="words see only what is to their left (an ablation)",
            json_schema_extra={"source": "sheet"},
        )
        rate: float = Field(
            0.5,
            gt=0,
            description="share of tokens the compressor keeps unless told otherwise",
            json_schema_extra={"source": "released"},
        )
        released_inference: bool = Field(
            False,
            description="the compressor takes the released way unless told otherwise",
            json_schema_extra={"source": "released prompt_compressor.py"},
        )
        batch: int = Field(
            50,
            ge=1,
            description="windows at a time in use",
            json_schema_extra={"source": "released init_llmlingua2"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "official": Variant(
            set={
                "inclusive_chunks": True,
                "commas": "drop",
                "lemma_match": True,
                "drop_ties": True,
                "train_words": "lemma",
                "cut_rows": True,
                "official_loss": True,
                "label_slip": True,
                "released_inference": True,
            },
            about="what the released code does",
        ),
        "no-filter": Variant(set={"filter": False}, about="all chunks are trained on"),
        "left-to-right": Variant(
            set={"left_to_right": True}, about="the same net sees only the left context"
        ),
        "lemma-inputs": Variant(
            set={"train_words": "lemma"}, about="trained on lemmas, used on running text"
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim(
            "tells kept from dropped words far better than a causal model's surprisal",
            "auc",
            "llmlingua2",
            "surprisal-deletion",
            margin=0.1,
        ),
        Claim("better than TF-IDF deletion", "auc", "llmlingua2", "tfidf-deletion", margin=0.05),
        Claim(
            "better than random deletion at the same rate",
            "f1",
            "llmlingua2",
            "random-deletion",
            margin=0.05,
        ),
        Claim(
            "both sides of a word help: better than the same net with a left-to-right mask",
            "auc",
            "llmlingua2",
            "llmlingua2/left-to-right",
        ),
        Claim("the filter helps", "auc", "llmlingua2", "llmlingua2/no-filter"),
        Claim(
            "training on the words of the text beats training on lemmas",
            "auc",
            "llmlingua2",
            "llmlingua2/lemma-inputs",
        ),
        Claim(
            "keeps more answerable questions than surprisal at the same rate",
            "cloze",
            "llmlingua2",
            "surprisal-deletion",
        ),
        Claim(
            "keeps more names than random deletion at the same rate",
            "entities",
            "llmlingua2",
            "random-deletion",
        ),
    ]

    def run(self, job: Any) -> Artifact:
        """Ask, trace back, filter, train; the artifact is the compressor with its labels."""
        student = self._student(job)
        reader = reader_of(student.module, _model_name(job.recipe), self.config.length)
        how = self.shortening()
        texts = texts_of(job.splits["train"])[0]
        held = texts_of(job.splits["val"])[0] if "val" in job.splits else []
        chunks = asked(cut_texts(texts + held, how), how)
        ask_to_shorten(job, "compress", chunks, how)
        labelled = align_words(job, "align", chunks, how)
        kept = self._filter(job, labelled)
        ours = [one for one in kept if one.chunk.document < len(texts)]
        theirs = [one for one in kept if one.chunk.document >= len(texts)]
        self._train(job, student, reader, ours, theirs)
        return self._artifact(job, student, labelled, {one.chunk for one in kept})

    def shortening(self) -> Shortening:
        """How texts are shortened and traced back."""
        c = self.config
        return Shortening(
            chunk=c.chunk,
            inclusive=c.inclusive_chunks,
            temperature=c.temperature,
            top_p=c.top_p,
            max_tokens=c.max_tokens,
            seed=c.request_seed,
            window=c.window,
            commas=c.commas,
            lemmas=c.lemma_match,
            limit=c.limit,
            shard=c.shard,
        )

    def _student(self, job: Any) -> Net:
        student: Net = job.student()
        if self.config.left_to_right:
            if not hasattr(student.module, "causal"):
                raise ModelError(
                    f"{type(student.module).__name__} cannot be masked from left to right; "
                    "left_to_right needs a student with a switch 'causal', such as "
                    "stillhouse:word-tagger"
                )
            student.module.causal = True  # type: ignore[assignment]
        return student

    def _filter(self, job: Any, labelled: list[Labelled]) -> list[Labelled]:
        config = self.config

        def choose() -> dict[str, Any]:
            if not config.filter:
                return {"kept": torch.arange(len(labelled)), "variation": 1.0, "gap": 1.0}
            found = filter_words(
                labelled,
                variation_percentile=config.variation_percentile,
                gap_percentile=config.gap_percentile,
                keep_ties=not config.drop_ties,
            )
            return {
                "kept": torch.tensor(found.kept),
                "variation": found.variation,
                "gap": found.gap,
            }

        kept = job.once("filter", choose)["kept"].tolist()
        if not kept:
            raise DataError(
                f"the filter dropped all {len(labelled)} chunks (many have equal rates); set "
                "settings.drop_ties: false or raise settings.variation_percentile"
            )
        return [labelled[i] for i in kept]

    def _train(
        self,
        job: Any,
        student: Net,
        reader: TextReader,
        ours: Sequence[Labelled],
        theirs: Sequence[Labelled],
    ) -> None:
        budget, config = job.budget, self.config
        train = self.rows(ours, reader, "train")
        held = self.rows(theirs, reader, "val") if theirs else None
        job.task.row = train.views["x"][:1]
        best = budget.select == "best" and held is not None
        job.fit(
            "tagger",
            TaggerObjective(student, config.official_loss),
            Shuffled(train, budget.batch),
            validate=None if held is None else lambda: job.evaluate(student, held),
            keep=Best(budget.metric or "accuracy") if best else Last(),
        )

    def rows(self, labelled: Sequence[Labelled], reader: TextReader, split: str) -> TensorSource:
        """Training rows: "x" (N, L, ...) and `target` (N, L), -100 for no label."""
        make = lemma_rows if self.config.train_words == "lemma" else surface_rows
        pairs = [
            pair
            for one in labelled
            for pair in make(one, reader, cut=self.config.cut_rows, slip=self.config.label_slip)
        ]
        if not pairs:
            raise DataError(f"no {split} text is left to train on")
        length = max(len(codes) for codes, _ in pairs)
        target = torch.full((len(pairs), length), IGNORED)
        for row, (_, labels) in enumerate(pairs):
            target[row, : len(labels)] = torch.tensor(labels)
        x = reader.join([codes for codes, _ in pairs], length)
        return TensorSource({"x": x, "target": target}, name=f"words kept/{split}")

    def _artifact(
        self, job: Any, student: Net, labelled: Sequence[Labelled], kept: set[Any]
    ) -> Artifact:
        artifact: Artifact = Artifact(
            "model",
            predictor=PromptCompressor(
                student,
                {
                    "tokenizer": _model_name(job.recipe),
                    "length": self.config.length,
                    "rate": self.config.rate,
                    "released": self.config.released_inference,
                    "batch": self.config.batch,
                    "causal": self.config.left_to_right,
                },
            ),
            model=_model_of(job.recipe),
            meta={"about": {}, "task": job.task.name, "data": job.splits.edition},
        )
        records = (
            {
                "document": one.chunk.document,
                "text": one.chunk.text,
                "compressed": one.shortened,
                "labels": one.labels,
                "used": one.chunk in kept,
                **one.rates,
            }
            for one in labelled
        )
        artifact.attachments["labels"] = Artifact("labels", records=list(records))
        return artifact

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """Agreement with the teacher on test texts, information kept, words per second."""
        from time import perf_counter

        compressor = artifact.predictor
        assert isinstance(compressor, PromptCompressor)
        labelled, entities = judged_words(job, self.shortening())
        began = perf_counter()
        figures = judge_scores(labelled, entities, compressor.word_scores)
        words = sum(len(one.words) for one in labelled)
        figures["words_per_second"] = words / (perf_counter() - began)
        return figures

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Labels in figures, and texts with what the compressor keeps of them."""
        labels = artifact.attachments["labels"].records
        rows = list(labels)
        used = [row for row in rows if row["used"]]
        table = [
            [name, *(f"{_mean(row[name] for row in part):.4f}" for part in (rows, used))]
            for name in ("variation", "gap", "matching", "compression")
        ]
        shown = rows[:: max(1, len(rows) // 3)][:3]
        rate = float(artifact.predictor.settings["rate"]) if artifact.predictor else 0.5
        results = artifact.predict([row["text"] for row in shown], select="exact")
        texts = [
            f"Source: {row['text'][:600]}\nTeacher: {row['compressed'][:600]}\n"
            f"Compressor at rate {rate:g}: {result['compressed_prompt'][:600]}"
            for row, result in zip(shown, results)
        ]
        return {
            "tables": [
                {
                    "title": f"Rates of {len(rows)} labelled chunks, {len(used)} of them used",
                    "columns": ["rate", "all", "used"],
                    "rows": table,
                }
            ],
            "texts": [{"title": f"Example {n}", "text": t} for n, t in enumerate(texts, 1)],
        }

    def forecast(self, job: Any) -> dict[str, Any]:
        """What labelling would come to: requests, tokens, money; nothing is sent."""
        how = self.shortening()
        texts = [
            text
            for split in ("train", "val")
            if split in job.splits
            for text in texts_of(job.splits[split])[0]
        ]
        chunks = cut_texts(texts, how)
        asks = (question(part.text, how) for part in chunks)
        plan = dry_run(job, asks, limit=how.limit, shard=how.shard)
        return {"labelling": {"texts": len(texts), "chunks": len(chunks), **vars(plan)}}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny word tagger on generated sentences, labelled by the deleting rules."""
        return {
            "method": "llmlingua2",
            "data": {"name": "generated_prose"},
            "teacher": {
                "endpoint": {
                    "model": "rules",
                    "serve": {"rule": "stillhouse.teachers.delete_rules:compress"},
                }
            },
            "student": {
                "model": "stillhouse:word-tagger",
                "options": {"width": 16, "heads": 2, "buckets": 64, "layers": 1, "length": 32},
            },
            "budget": {"steps": 4, "batch": 8, "lr": 0.01},
            "seed": seed,
        }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


# Rows --------------------------------------------------------------------------------------


Row = tuple[Tensor, list[int]]


def surface_rows(
    one: Labelled, reader: TextReader, *, cut: bool = False, slip: bool = False
) -> list[Row]:
    """Rows of a chunk as it stands, its labels given to pieces by offsets.

    Args:
        one: the chunk.
        reader: of the model.
        cut: only what fits the first row; else as many rows as it takes.
        slip: see `spread_labels`.
    """
    reading = reader.read(one.chunk.text)
    owners = word_of_pieces(one.words, reading.offsets)
    spans = cut_reading(one.chunk.text, reading, owners, reader.room, Compression())
    if cut:
        spans = [(0, min(reader.room, len(owners)))] if owners else []
    rows = []
    for start, stop in spans:
        labels = [one.labels[o] if o >= 0 else IGNORED for o in owners[start:stop]]
        rows.append(_framed(reading.codes[start:stop], labels, reader, slip))
    return rows


def lemma_rows(
    one: Labelled, reader: TextReader, *, cut: bool = False, slip: bool = False
) -> list[Row]:
    """Rows of a chunk's lemmas, each tokenised on its own; words without label are left out."""
    marked = [(word, y) for word, y in zip(one.words, one.labels) if y != IGNORED]
    codes = [reader.read_word(lemma(word.text)) for word, _ in marked]
    rows: list[Row] = []
    part: list[Tensor] = []
    labels: list[int] = []
    for own, (_, y) in zip(codes, marked):
        if len(labels) + len(own) > reader.room and labels and not cut:
            rows.append(_framed(torch.cat(part), labels, reader, slip))
            part, labels = [], []
        part.append(own)
        labels += [y] * len(own)
    if labels:
        rows.append(_framed(torch.cat(part), labels, reader, slip))
    return rows


def _framed(codes: Tensor, labels: list[int], reader: TextReader, slip: bool) -> Row:
    row = reader.row(codes)
    if not reader.lead:
        return row, labels[: len(row)]
    framed = spread_labels([["piece"] for _ in labels], labels, length=len(row), official=slip)
    if not slip:
        return row, framed.labels
    # Specials carry no label of ours; the slip is that one stands among the pieces.
    return row, [IGNORED, *framed.labels[1:]]


# The artifact ------------------------------------------------------------------------------


def _model_name(recipe: Any) -> str:
    """Hub id or folder of the student, for its tokenizer."""
    spec = recipe.student
    return str(spec.model).removeprefix("hf:") if spec is not None else ""


def _model_of(recipe: Any) -> dict[str, Any]:
    spec = recipe.student
    if spec is None:
        return {}
    return {"id": spec.model, "options": spec.options, "taps": spec.taps}
