"""The task embedding: pairs, their figures, models that do not fit, vectors out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.data import open_data
from stillhouse.data.stsb import pair_source, read_pairs
from stillhouse.errors import DataError, ModelError
from stillhouse.metrics.similarity import PairSimilarity
from stillhouse.tasks import open_task


def pairs(count: int = 30) -> tuple[torch.Tensor, Batch]:
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(2 * count, 8, generator=rng)
    rows = torch.arange(2 * count)
    places = torch.stack([rows // 2, rows % 2, torch.full_like(rows, count)], 1)
    # scores of a coarse scale: many ties
    score = torch.randint(0, 6, (count,), generator=rng).float()
    return vectors, Batch(id=rows, pair=places, target=score.repeat_interleave(2))


def test_figures_are_those_of_scipy_whatever_the_order_and_the_batches():
    vectors, batch = pairs()
    metric = PairSimilarity()
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        metric.update({"embedding": vectors[rows]}, batch.select(rows))
    cosine = torch.cosine_similarity(vectors[0::2], vectors[1::2]).numpy()
    score = batch["target"][0::2].numpy()
    found = metric.compute()
    assert found["spearman"] == pytest.approx(spearmanr(cosine, score).statistic, abs=1e-6)
    assert found["pearson"] == pytest.approx(pearsonr(cosine, score).statistic, abs=1e-6)


def test_rows_of_several_processes_add_up():
    vectors, batch = pairs()
    whole, parts = PairSimilarity(), [PairSimilarity(), PairSimilarity()]
    whole.update({"embedding": vectors}, batch)
    for number, part in enumerate(parts):
        rows = torch.arange(number, 60, 2)  # one process has all first sides
        part.update({"embedding": vectors[rows]}, batch.select(rows))
    with pytest.raises(DataError, match="30 rows of 30 pairs"):
        parts[0].compute()
    parts[0].take(parts[0].totals() + parts[1].totals())
    assert parts[0].compute() == whole.compute()


def test_constant_vectors_have_no_correlation():
    _, batch = pairs()
    metric = PairSimilarity()
    metric.update({"embedding": torch.ones(60, 4)}, batch)
    assert metric.compute() == {"spearman": 0.0, "pearson": 0.0}


def test_data_without_pairs_is_told():
    with pytest.raises(DataError, match="no pairs with scores"):
        PairSimilarity().update({"embedding": torch.ones(2, 4)}, Batch(x=torch.ones(2, 3)))
    task = open_task("embedding", Splits({"train": TensorSource({"x": torch.ones(4, 3)})}, "mine"))
    with pytest.raises(DataError, match="'mine' have no scores"):
        task.loss({"embedding": torch.ones(2, 4)}, Batch(x=torch.ones(2, 3)))


def test_the_loss_compares_the_pairs_that_are_in_the_batch():
    vectors, batch = pairs()
    task = open_task("embedding", Splits({}, "mine"))
    rows = torch.tensor([0, 5, 1, 2, 4])  # pairs 0 and 2 whole, one side of pair 1
    x = vectors[rows].clone().requires_grad_()
    loss = task.loss({"embedding": x}, batch.select(rows))["task"]
    cosine = torch.cosine_similarity(vectors[[0, 4]], vectors[[1, 5]])
    assert loss.item() == pytest.approx(((cosine - batch["target"][[0, 4]]) ** 2).mean().item())
    loss.backward()
    assert x.grad[3].abs().max() == 0
    alone = task.loss({"embedding": vectors[[0, 2]]}, batch.select(torch.tensor([0, 2])))["task"]
    assert alone.item() == 0


def test_models_that_give_no_vector_per_row_are_told():
    splits = Splits({"train": TensorSource({"x": torch.ones(4, 3, 5)})}, "mine")
    task = open_task("embedding", splits)
    task.check(task.net(nn.Sequential(nn.Flatten(), nn.Linear(15, 2))), None)
    with pytest.raises(ModelError, match=r"the student Linear gives \(2, 3, 2\).*per row"):
        task.check(task.net(nn.Linear(5, 2)), None)
    with pytest.raises(ModelError, match="the teacher Linear cannot read the data 'mine'"):
        task.check(None, task.net(nn.Linear(4, 2)))


def test_vectors_are_written(tmp_path: Path):
    task = open_task("embedding", Splits({}, "mine"))
    layer = nn.Linear(3, 2)
    predictor = task.predictor(task.net(layer))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "in.npy", x)
    said = predictor.infer([tmp_path / "in.npy"], tmp_path / "out.npy", {"batch": 2})
    assert said["shape"] == [5, 2]
    expected = layer(torch.from_numpy(x)).detach().numpy()
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    predictor.infer([tmp_path / "in.npy"], tmp_path / "out.jsonl", {})
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[4]["vector"] == pytest.approx(expected[4].tolist(), abs=1e-6)


def test_stsb_as_its_readme_says(data_root):
    splits = open_data("stsb", seed=0).judging()
    assert splits.edition == "stsb (en, stsb-multi-mt)"
    assert (splits.peek("val"), splits.peek("test")) == (3000, 2758)
    texts = splits["train"].views["text"]
    assert len(texts) == len(set(texts)) > 10_000
    test = splits["test"].views
    first = read_pairs(data_root / "stsb" / "stsb_en_test.jsonl.gz")[1]
    assert (test["text"][2], test["text"][3], float(test["target"][3])) == pytest.approx(first)
    assert test["pair"][3].tolist() == [1, 1, 1379]
    assert 0 <= float(test["target"].min()) <= float(test["target"].max()) <= 5
    few = open_data("stsb", seed=0, options={"language": "de", "sentences": 50})
    assert few.peek("train") == 50
    assert few.edition == "stsb (de, own copy)"


def test_damaged_pairs_are_told(tmp_path: Path):
    import gzip

    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"sentence1": "a", "score": 1}\n'))
    with pytest.raises(DataError, match="sentence1, sentence2 and score: KeyError"):
        read_pairs(path)
    path.write_bytes(gzip.compress(b'{"sentence1": "a", "sentence2": "b", "score": 1}\n'))
    with pytest.raises(DataError, match="at least two"):
        read_pairs(path)
    assert len(pair_source([("a", "b", 1.0), ("c", "d", 0.5)], "two")) == 4


def test_a_bare_encoder_on_texts_is_told_what_it_lacks():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bare = transformers.BertModel(config)
    task = open_task("embedding", Splits({"train": TensorSource({"text": ["a", "b"]})}, "mine"))
    with pytest.raises(ModelError, match=r"BertModel reads word pieces.*sentence_embedder"):
        task.net(bare)


class Letters(nn.Module):
    """Texts to the numbers of two letters in them."""

    reads = "text"

    def forward(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(t.count("q")), float(t.count("a"))] for t in texts])


def test_vectors_of_texts_as_files_hold_them(tmp_path: Path):
    prefixes = {"query": "q: ", "document": "qq: "}
    task = open_task("embedding", Splits({}, "mine", {"prefixes": prefixes}))
    predictor = task.predictor(task.net(Letters()))
    (tmp_path / "in.txt").write_bytes("\ufeffa\r\n\r\naa\u2028a\r\n".encode())
    (tmp_path / "in.jsonl").write_text('{"body": "aaaa"}\n')
    both = [tmp_path / "in.txt", tmp_path / "in.jsonl"]
    predictor.infer(both, tmp_path / "out.jsonl", {"text": "body", "kind": "query"})
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["input"].rpartition("/")[2] for row in rows] == [
        "in.txt:1",
        "in.txt:3",
        "in.jsonl:1",
    ]
    assert [row["vector"] for row in rows] == [[1, 1], [1, 3], [1, 4]]
    assert predictor.predict(["a"], kind="document")[0].tolist() == [2, 1]
    assert predictor.predict(["a"], prefix="qqq ")[0].tolist() == [3, 1]
    assert predictor.predict(["a"])[0].tolist() == [0, 1]
    with pytest.raises(DataError, match="query or document, not 'querry'; did you mean 'query'"):
        predictor.predict(["a"], kind="querry")
    np.save(tmp_path / "in.npy", np.zeros((2, 3)))
    with pytest.raises(DataError, match="this model reads texts"):
        predictor.infer([tmp_path / "in.npy"], None, {})
