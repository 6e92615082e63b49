"""Rankings: by hand, by the reference of matchmaker, ties, collections over batches."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.errors import DataError, RecipeError
from stillhouse.metrics.ranking import (
    Retrieval,
    average_precision,
    first_relevant,
    grades_of,
    listed,
    ndcg,
    order_of,
    ranking_figures,
    recall,
    reciprocal_rank,
)


def test_figures_of_one_ranking_by_hand():
    found = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    judged = torch.tensor([[1.0, 2.0, 3.0]])
    gained = 2 / math.log2(3) + 1 / math.log2(5)
    best = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(found, judged, 10).item() == pytest.approx(gained / best)
    assert ndcg(found, judged, 2).item() == pytest.approx(
        (2 / math.log2(3)) / (3 + 2 / math.log2(3))
    )
    assert reciprocal_rank(found, 10).item() == 0.5
    assert reciprocal_rank(found, 1).item() == 0
    assert average_precision(found, judged).item() == pytest.approx((1 / 2 + 2 / 4) / 3)
    assert average_precision(found, judged, relevant=2).item() == pytest.approx((1 / 2) / 2)
    assert recall(found, judged, 2).item() == pytest.approx(1 / 3)
    assert ndcg(torch.zeros(1, 3), torch.zeros(1, 2), 10).item() == 0


def test_ties_go_to_the_document_with_the_lower_number():
    assert order_of(torch.tensor([[1.0, 2.0, 2.0, 1.0]])).tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize("least", [1, 2])
def test_the_official_scorer(golden, least):
    vectors = golden("marginmse")
    given = vectors.json["metrics"]
    vectors.count("metrics")
    _, found, judged = listed(given["ranking"], given["qrels"])
    wanted = given["expected"][str(least)]
    figures = {"MAP@1000": average_precision(found, judged, 1000, least).mean()}
    for at in (3, 5, 10, 20, 1000):
        figures[f"nDCG@{at}"] = ndcg(found, judged, at).mean()
    for at in (10, 20, 100, 200, 1000):
        figures[f"MRR@{at}"] = reciprocal_rank(found, at, least).mean()
        figures[f"Recall@{at}"] = recall(found, judged, at, least).mean()
        places = first_relevant(found, at, least)
        figures[f"QueriesWithRelevant@{at}"] = (places > 0).sum()
        figures[f"QueriesWithNoRelevant@{at}"] = len(given["ranking"]) - (places > 0).sum()
        figures[f"AverageRankGoldLabel@{at}"] = places[places > 0].double().mean()
    for name, value in figures.items():
        assert float(value) == pytest.approx(wanted[name], abs=1e-9), name
    assert wanted["QueriesRanked"] == len(found)


def collection() -> tuple[torch.Tensor, Batch]:
    rng = torch.Generator().manual_seed(0)
    documents, queries = 7, 4
    vectors = torch.randn(documents + queries + 2, 5, generator=rng)
    place = torch.tensor(
        [(0, n, documents, queries) for n in range(documents)]
        + [(1, n, documents, queries) for n in range(queries)]
        + [(-1, -1, documents, queries)] * 2
    )
    relevant = torch.tensor([-1, 0]).repeat(len(place), 2, 1)
    relevant[documents] = torch.tensor([[0, 1], [3, 2]])
    relevant[documents + 1, 0] = torch.tensor([6, 1])
    relevant[documents + 2, 0] = torch.tensor([2, 1])
    return vectors, Batch(id=torch.arange(len(place)), place=place, relevant=relevant)


def test_a_collection_whatever_its_order_and_its_batches():
    vectors, batch = collection()
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    grades = grades_of(batch["relevant"][7:11], 7)
    assert grades[0].tolist() == [1, 0, 0, 2, 0, 0, 0]
    wanted = ranking_figures(unit[7:11] @ unit[:7].T, grades)
    metric, parts = Retrieval(), [Retrieval(), Retrieval()]
    for number, rows in enumerate(
        torch.randperm(13, generator=torch.Generator().manual_seed(1)).split(5)
    ):
        for taker in (metric, parts[number % 2]):
            taker.update({"embedding": 3 * vectors[rows]}, batch.select(rows))
    assert metric.compute() == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(DataError, match="of 11 documents and queries were seen"):
        parts[1].compute()
    parts[0].take(parts[0].totals() + parts[1].totals())
    assert parts[0].compute() == metric.compute()
    # the fourth query has no relevant document and does not count
    three = ranking_figures(unit[7:10] @ unit[:7].T, grades[:3])
    assert three == wanted


def test_data_without_a_collection_gives_no_figure():
    metric = Retrieval()
    metric.update({"embedding": torch.ones(2, 3)}, Batch(x=torch.ones(2, 3)))
    assert metric.compute() == {}
    with pytest.raises(RecipeError, match="first places, not by 0"):
        Retrieval(0)
