"""How good a ranking is: nDCG, reciprocal rank, average precision, recall, query by query.

Conventions of the scorers of TREC and of matchmaker: the gain is the grade itself, the ideal list
is made of ALL judged documents, average precision and recall divide by all relevant ones, and
means run over the ranked queries that have judgements.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError, RecipeError

MANY = 1000


def order_of(scores: Tensor) -> Tensor:
    """Documents from best to worst; of equal scores the lower number comes first.

    Args:
        scores: (Q, N).

    Returns:
        (Q, N) int64.
    """
    return scores.argsort(dim=1, descending=True, stable=True)


def ndcg(found: Tensor, judged: Tensor, at: int) -> Tensor:
    """Discounted gain of the first `at` places, relative to the best possible one.

    Args:
        found: (Q, K) grades of what was ranked, best first; 0 where nothing is known.
        judged: (Q, R) grades of all judged documents of each query, in any order, 0 as filling.
        at: places that count.

    Returns:
        (Q,) in [0, 1]; 0 for a query without a relevant document.
    """
    ideal = _discounted(judged.sort(1, descending=True).values, at)
    gained = _discounted(found, at)
    return torch.where(ideal > 0, gained / ideal.clamp(min=1e-12), 0.0)


def _discounted(grades: Tensor, at: int) -> Tensor:
    kept = grades[:, :at].double()
    places = torch.arange(kept.shape[1], dtype=torch.float64, device=kept.device)
    return (kept / torch.log2(places + 2)).sum(1)


def reciprocal_rank(found: Tensor, at: int, relevant: float = 1) -> Tensor:
    """1 / place of the first relevant document among the first `at`; 0 where there is none.

    Args:
        found: see `ndcg`.
        at: places that count.
        relevant: least grade of a relevant document.
    """
    first = first_relevant(found, at, relevant)
    return torch.where(first > 0, 1.0 / first.double().clamp(min=1), 0.0)


def first_relevant(found: Tensor, at: int, relevant: float = 1) -> Tensor:
    """(Q,) place of the first relevant document, from 1; 0 where there is none among `at`."""
    hit = found[:, :at] >= relevant
    return torch.where(hit.any(1), hit.to(torch.uint8).argmax(1) + 1, 0)


def average_precision(found: Tensor, judged: Tensor, at: int = MANY, relevant: float = 1) -> Tensor:
    """Mean precision at the places of relevant documents, over all relevant ones.

    Args:
        found: see `ndcg`.
        judged: see `ndcg`.
        at: places that count.
        relevant: least grade of a relevant document.
    """
    hit = (found[:, :at] >= relevant).double()
    places = torch.arange(1, hit.shape[1] + 1, dtype=torch.float64, device=hit.device)
    summed = (hit * hit.cumsum(1) / places).sum(1)
    return summed / (judged >= relevant).sum(1).clamp(min=1)


def recall(found: Tensor, judged: Tensor, at: int, relevant: float = 1) -> Tensor:
    """Share of the relevant documents that stand among the first `at`; see `ndcg`."""
    hit = (found[:, :at] >= relevant).sum(1).double()
    return hit / (judged >= relevant).sum(1).clamp(min=1)


def ranking_figures(scores: Tensor, grades: Tensor, at: int = 10) -> dict[str, float]:
    """The usual figures of scores over a whole collection.

    Args:
        scores: (Q, N) of every query with every document.
        grades: (Q, N), 0 where nothing was judged; queries without a relevant document are
            left out.
        at: places that count for nDCG and the reciprocal rank.

    Returns:
        "ndcg@10", "mrr@10" (by `at`), "map".
    """
    asked = (grades > 0).any(1)
    scores, grades = scores[asked], grades[asked]
    found = grades.gather(1, order_of(scores))
    return {
        f"ndcg@{at}": float(ndcg(found, grades, at).mean()),
        f"mrr@{at}": float(reciprocal_rank(found, at).mean()),
        "map": float(average_precision(found, grades).mean()),
    }


def listed(
    rankings: Mapping[Any, Sequence[Hashable]], judgements: Mapping[Any, Mapping[Any, float]]
) -> tuple[list[Any], Tensor, Tensor]:
    """Lists of documents and grades by document as the matrices that the figures take.

    Args:
        rankings: query to documents, best first.
        judgements: query to documents' grades.

    Returns:
        (queries, found, judged) of the ranked queries that have judgements.
    """
    queries = [query for query in rankings if judgements.get(query)]
    found = [[float(judgements[q].get(d, 0)) for d in rankings[q]] for q in queries]
    judged = [[float(grade) for grade in judgements[q].values()] for q in queries]
    return queries, _filled(found), _filled(judged)


def _filled(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


def grades_of(relevant: Tensor, documents: int) -> Tensor:
    """Judgements as a matrix.

    Args:
        relevant: (Q, M, 2) int64: number of the document and its grade; -1 as filling.
        documents: of the collection.

    Returns:
        (Q, documents) float32, 0 where nothing was judged.
    """
    grades = torch.zeros(len(relevant), documents + 1)
    places = torch.where(relevant[..., 0] >= 0, relevant[..., 0], documents)
    grades.scatter_(1, places, relevant[..., 1].float())
    return grades[:, :documents]


class Retrieval:
    """Figures of a collection whose documents and queries are rows of one split.

    - `ndcg@10`, `mrr@10`, `map`: by the cosine of each query with every document.

    Rows say what they are, so they may lie in different batches and on different processes.

    Args:
        at: places that count.
    """

    higher_is_better = True

    def __init__(self, at: int = 10) -> None:
        if at < 1:
            raise RecipeError(f"a ranking is judged by its first places, not by {at}")
        self.at = at
        self._documents = self._most = 0
        self._rows = torch.zeros(0)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in; rows that are neither document nor query are passed over.

        Args:
            out: `embedding` (B, D).
            batch: `place` (B, 4) int64: 0 for a document, 1 for a query, -1 for neither; its
                number; how many documents and queries there are. `relevant` (B, M, 2): of a
                query, see `grades_of`. Without both nothing is done.
        """
        if "place" not in batch:
            return
        place, relevant = batch["place"].cpu(), batch["relevant"].cpu()
        vectors = torch.nn.functional.normalize(out["embedding"].detach().float().cpu(), dim=-1)
        if not len(self._rows):
            self._documents, self._most = int(place[0, 2]), relevant.shape[1]
            whole = self._documents + int(place[0, 3])
            self._rows = torch.zeros(whole, vectors.shape[1] + 2 * self._most + 1)
        kept = place[:, 0] >= 0
        at = place[kept, 1] + place[kept, 0] * self._documents
        judged = relevant[kept].flatten(1).float()
        self._rows[at] = torch.cat([vectors[kept], judged, torch.ones(len(judged), 1)], dim=1)

    def totals(self) -> Tensor:
        """(rows, D + 2 M + 1): vector, judgements, and 1; zeros where a row was not seen."""
        return self._rows

    def take(self, totals: Tensor) -> None:
        """Replace the rows by those of all processes."""
        self._rows = totals.cpu()

    def compute(self) -> dict[str, float]:
        """The figures; none of a split that holds no collection.

        Raises:
            DataError: a document or query was not seen.
        """
        rows, count = self._rows, self._documents
        if not len(rows):
            return {}
        if not bool((rows[:, -1] == 1).all()):
            raise DataError(
                f"{int(rows[:, -1].sum())} of {len(rows)} documents and queries were seen; all "
                "are needed"
            )
        width = rows.shape[1] - 2 * self._most - 1
        relevant = rows[count:, width:-1].reshape(-1, self._most, 2).long()
        scores = rows[count:, :width] @ rows[:count, :width].T
        return ranking_figures(scores, grades_of(relevant, count), self.at)
