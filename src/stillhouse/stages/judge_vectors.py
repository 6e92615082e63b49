"""What a student of a teacher's vector space is worth: alone, beside its teacher, made shorter.

Modes of comparing a query with documents:

- standard: both by the student;
- asymmetric: documents by the teacher, queries by the student, which only works where both
  mean the same by each coordinate;
- teacher: both by the teacher.

Each is judged in full and in the forms of `parts/vector_codes.py`, both sides alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.batch import Batch, read_rows
from stillhouse.clock import generator
from stillhouse.engine.job import Job
from stillhouse.errors import ModelError
from stillhouse.metrics.ranking import grades_of, ranking_figures
from stillhouse.metrics.similarity import correlation
from stillhouse.net import Net, Output
from stillhouse.parts.vector_codes import ByteRange, hamming, rescored, signs, truncate
from stillhouse.recipe import StoreSpec
from stillhouse.stages.capture import Captured, captured, ids_of
from stillhouse.teacher import Teacher, Want
from stillhouse.teachers.stored import Stored

AT = 10
CODES = ("int8", "binary", "rescored")
MODES = ("standard", "asymmetric", "teacher")
_BLOCK = 256
_ORDERS = 5


@dataclass(frozen=True)
class Judged:
    """What a split asks: a collection, scored pairs, or both.

    Attributes:
        documents: (N,) rows of documents.
        queries: (Q,) rows of queries.
        grades: (Q, N).
        first: (P,) rows of the one side of each pair.
        second: (P,) rows of the other.
        scores: (P,).
        count: rows of the split.
    """

    documents: Tensor
    queries: Tensor
    grades: Tensor
    first: Tensor
    second: Tensor
    scores: Tensor
    count: int

    @classmethod
    def of(cls, batch: Batch) -> Judged:
        """From all rows of a split, in order."""
        count, none = batch.size, torch.zeros(0, dtype=torch.int64)
        documents = queries = first = second = none
        grades, scores = torch.zeros(0, 0), torch.zeros(0)
        if "place" in batch:
            place = batch["place"]
            documents, queries = (_sorted(place[:, 0] == kind, place[:, 1]) for kind in (0, 1))
            grades = grades_of(batch["relevant"][queries], len(documents))
        if "pair" in batch:
            pair = batch["pair"]
            first, second = (
                _sorted((pair[:, 0] >= 0) & (pair[:, 1] == side), pair[:, 0]) for side in (0, 1)
            )
            scores = batch["target"][first].float()
        return cls(documents, queries, grades, first, second, scores, count)

    @property
    def main(self) -> str:
        """The figure by which forms are compared."""
        return f"ndcg@{AT}" if len(self.queries) else "spearman"

    def held_out(self) -> Tensor:
        """Rows whose texts are in no collection that is searched: queries and pairs."""
        rows = torch.cat([self.queries, self.first, self.second])
        return rows if len(rows) else torch.arange(self.count)

    @property
    def scored(self) -> bool:
        """Whether there is anything to judge by: a collection, or pairs."""
        return len(self.queries) > 0 or len(self.first) > 0

    def sides(self) -> tuple[Tensor, Tensor]:
        """Rows of what asks and of what is found; of the pairs where there is no collection."""
        if len(self.queries):
            return self.queries, self.documents
        return self.first, self.second

    def figure(self, similarity: Tensor) -> float:
        """The main figure of (queries, documents), or of the pairs' own (P, P)."""
        if len(self.queries):
            return ranking_figures(similarity, self.grades, AT)[self.main]
        return spearman(similarity.diagonal(), self.scores)


def _sorted(chosen: Tensor, number: Tensor) -> Tensor:
    rows = chosen.nonzero()[:, 0]
    return rows[number[rows].argsort()]


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks, ties by their mean rank."""
    return correlation(*(rankdata(v.double().numpy()) for v in (one, other)))


def judge_vectors(
    job: Job,
    net: nn.Module,
    teacher: Teacher | None,
    *,
    split: str = "test",
    widths: Sequence[int] = (),
    width: int | None = None,
) -> dict[str, float]:
    """Figures of a student's vectors, and of its teacher's on the same texts.

    Args:
        job: with the split open.
        net: the student: gives "embedding".
        teacher: asked once about every row of the split, and remembered in the cache; None, or a
            store of other texts, leaves out what needs it.
        split: what is judged.
        widths: of the curves over the number of coordinates; those the vectors have not are left
            out.
        width: coordinates of the teacher that the student has learnt; None: all.

    Returns:
        Of the student "ndcg@10", "mrr@10", "map" where the split holds a collection, "spearman",
        "pearson" where it holds pairs; the same with "asymmetric_" and "teacher_"; "cosine" with
        the teacher's vectors of held-out texts; "retention" and "asymmetric_retention", shares
        of the teacher's main figure; the main figure with "chance_" (documents in random order),
        with "compressed_teacher_" (the teacher's vectors in the best linear space as wide as the
        student's own states), and "full_teacher_" where `width` cuts it; the main figure with
        "_16" ... for first coordinates, "_int8", "_binary" (Hamming distance) and "_rescored"
        (whole queries, documents' signs);
        "curve_agreement", the rank correlation of the student's forms with the teacher's. Of
        plain texts, without a collection and without pairs, "cosine" alone.

    Raises:
        ModelError: student and teacher have vectors of different width.
    """
    source = job.splits[split]
    judged = Judged.of(read_rows(source, torch.arange(len(source)), None, job.task.collate))
    own = student_vectors(job, net, split)
    if not judged.scored:
        return _nearness(judged, own, teacher_vectors(job, teacher, split), width)
    figures = {**plain_figures(judged, own, own), f"chance_{judged.main}": chance(judged)}
    curves = {"standard": forms(judged, own, own, widths)}
    other = teacher_vectors(job, teacher, split)
    if other is not None:
        if width is not None:
            whole = plain_figures(judged, other, other)[judged.main]
            figures[f"full_teacher_{judged.main}"] = whole
            other = truncate(other, width)
        _same_width(own, other)
        figures |= beside(judged, own, other)
        inner = _inner_width(net)
        if inner is not None and inner < other.shape[1]:
            figures[f"compressed_teacher_{judged.main}"] = compressed(judged, other, inner)
        curves["asymmetric"] = forms(judged, own, other, widths)
        curves["teacher"] = forms(judged, other, other, widths)
        pairs = [(curves["standard"][k], curves["teacher"][k]) for k in curves["teacher"]]
        if len(pairs) > 1:
            one, two = torch.tensor(pairs, dtype=torch.float64).unbind(1)
            figures["curve_agreement"] = spearman(one, two)
    for mode, found in curves.items():
        start = "" if mode == "standard" else f"{mode}_"
        figures |= {f"{start}{judged.main}_{form}": value for form, value in found.items()}
    return figures


def _inner_width(net: nn.Module) -> int | None:
    """Width of what the student's last linear layer reads, where it has one."""
    try:
        return net.head_layer().in_features if isinstance(net, Net) else None
    except ModelError:
        return None


def _same_width(own: Tensor, other: Tensor) -> None:
    if own.shape[1] != other.shape[1]:
        raise ModelError(
            f"the student's vectors have {own.shape[1]} coordinates, the teacher's "
            f"{other.shape[1]}: they cannot be compared"
        )


def plain_figures(judged: Judged, asks: Tensor, answers: Tensor) -> dict[str, float]:
    """Figures of whole vectors.

    Args:
        judged: what the split asks.
        asks: (rows, D) vectors of queries and of the pairs' first sides.
        answers: (rows, D) vectors of documents and of the pairs' second sides.
    """
    asks, answers = F.normalize(asks, dim=-1), F.normalize(answers, dim=-1)
    figures: dict[str, float] = {}
    if len(judged.queries):
        scores = asks[judged.queries] @ answers[judged.documents].T
        figures |= ranking_figures(scores, judged.grades, AT)
    if len(judged.first):
        cosine = (asks[judged.first] * answers[judged.second]).sum(-1)
        figures["spearman"] = spearman(cosine, judged.scores)
        figures["pearson"] = correlation(cosine.double().numpy(), judged.scores.double().numpy())
    return figures


def beside(judged: Judged, own: Tensor, other: Tensor) -> dict[str, float]:
    """Figures of the modes that need the teacher, and how near the student is to it."""
    asymmetric, teacher = (plain_figures(judged, asks, other) for asks in (own, other))
    figures = {f"asymmetric_{name}": value for name, value in asymmetric.items()}
    figures |= {f"teacher_{name}": value for name, value in teacher.items()}
    figures |= _nearness(judged, own, other)
    best = teacher[judged.main]
    if best > 0:
        alone = plain_figures(judged, own, own)[judged.main]
        figures["retention"] = alone / best
        figures["asymmetric_retention"] = asymmetric[judged.main] / best
    return figures


def _nearness(
    judged: Judged, own: Tensor, other: Tensor | None, width: int | None = None
) -> dict[str, float]:
    """The mean cosine with the teacher's vectors on held-out texts; all there is without scores."""
    if other is None:
        return {}
    other = other if width is None else truncate(other, width)
    _same_width(own, other)
    rows = judged.held_out()
    return {"cosine": float(F.cosine_similarity(own[rows], other[rows], dim=-1).mean())}


def forms(judged: Judged, asks: Tensor, answers: Tensor, widths: Sequence[int]) -> dict[str, float]:
    """The main figure of vectors made shorter, by the form's name.

    Args:
        judged: what the split asks.
        asks: (rows, D) vectors of what asks.
        answers: (rows, D) vectors of what is found; bytes are calibrated on them.
        widths: numbers of first coordinates.
    """
    rows, found = judged.sides()
    queries, documents = F.normalize(asks[rows], dim=-1), F.normalize(answers[found], dim=-1)
    figures: dict[str, float] = {}
    for width in widths:
        if width <= queries.shape[1]:
            similarity = truncate(queries, width) @ truncate(documents, width).T
            figures[str(width)] = judged.figure(similarity)
    figures |= {form: judged.figure(coded(queries, documents, form)) for form in CODES}
    return figures


def coded(queries: Tensor, documents: Tensor, form: str) -> Tensor:
    """(Q, N) similarities of vectors in a short form, see `CODES`."""
    if form == "int8":
        span = ByteRange.of(documents)
        ours, theirs = (span.values(span.codes(v)) for v in (queries, documents))
        return F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).T
    if form == "binary":
        return -hamming(signs(queries), signs(documents)).float()
    return rescored(queries, signs(documents))


# ---- vectors of a split -------------------------------------------------------------------


def student_vectors(job: Job, net: nn.Module, split: str) -> Tensor:
    """(rows, D) float32 on the CPU, in the order of the split."""
    ids = ids_of(job.splits[split])
    place = {int(number): row for row, number in enumerate(ids.tolist())}
    found: dict[str, Tensor] = {}

    def take(out: Output, batch: Batch) -> None:
        vectors = out["embedding"].float().cpu()
        table = found.setdefault("rows", torch.zeros(len(ids), vectors.shape[1]))
        table[[place[int(i)] for i in batch["id"].tolist()]] = vectors

    job.walk(net, split, take)
    table = found["rows"]
    if job.hardware.world > 1:
        table = job.hardware.total(table.to(job.device)).cpu()
    return table


def teacher_vectors(job: Job, teacher: Teacher | None, split: str) -> Tensor | None:
    """(rows, D) of the teacher, asked once for all runs; None where it cannot say."""
    if teacher is None or isinstance(teacher, Stored):
        return None
    asked = teacher.teacher if isinstance(teacher, Captured) else teacher
    spec = StoreSpec(dtype="float32", batch=_BLOCK)
    kept = captured(job.child("teacher-vectors"), asked, spec, split, kind="judge")
    want = Want("embedding")
    kept.bind((want,), job.task)
    source = job.splits[split]
    blocks = torch.split(torch.arange(len(source)), _BLOCK)
    parts = [kept.knowledge(read_rows(source, rows, None, job.task.collate)) for rows in blocks]
    return torch.cat([part.tensor(want.key).float().cpu() for part in parts])


def compressed(judged: Judged, vectors: Tensor, width: int) -> float:
    """The main figure of vectors in the best linear space of a width.

    That of the first principal directions of what is searched, not centred, so that inner
    products are kept as well as they can be.
    """
    _, answers = judged.sides()
    unit = F.normalize(vectors, dim=-1)
    directions = torch.linalg.svd(unit[answers], full_matrices=False).Vh[:width]
    small = unit @ directions.T
    return plain_figures(judged, small, small)[judged.main]


def chance(judged: Judged) -> float:
    """The main figure of documents in random order, the mean of some orders."""
    asks, answers = judged.sides()
    rng = generator("chance", len(asks), len(answers))
    found = [
        judged.figure(torch.rand(len(asks), len(answers), generator=rng)) for _ in range(_ORDERS)
    ]
    return sum(found) / len(found)


def tables(figures: Mapping[str, Any], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Tables of a report from the figures that `judge_vectors` has given.

    Args:
        figures: by name.
        widths: see `judge_vectors`.
    """
    main = f"ndcg@{AT}" if f"ndcg@{AT}" in figures else "spearman"
    if main not in figures:
        return []
    names = [n for n in (f"ndcg@{AT}", f"mrr@{AT}", "map", "spearman", "pearson") if n in figures]
    starts = {"standard": "", "asymmetric": "asymmetric_", "teacher": "teacher_"}
    shown = {m: s for m, s in starts.items() if f"{s}{main}" in figures}
    about = {
        "standard": "student for queries and documents",
        "asymmetric": "student for queries, teacher for documents",
        "teacher": "teacher for both",
    }
    modes = [[about[m], *(figures.get(s + n, "") for n in names)] for m, s in shown.items()]
    labels = {str(w): f"first {w} coordinates" for w in widths}
    labels |= {
        "int8": "a byte per coordinate",
        "binary": "a bit per coordinate, Hamming distance",
        "rescored": "a bit per coordinate of documents, whole queries",
    }
    curves = [
        [text, *(figures[f"{s}{main}_{form}"] for s in shown.values())]
        for form, text in labels.items()
        if f"{main}_{form}" in figures
    ]
    return [
        {"title": "Modes of use", "columns": ["mode", *names], "rows": modes},
        {"title": f"{main} of shorter vectors", "columns": ["form", *shown], "rows": curves},
    ]
