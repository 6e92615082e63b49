"""Similarities, contrast of pseudo pairs, latent semantics: what embeddings are compared with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse import catalogue
from stillhouse.baselines.pair_contrast import PairContrast, PairContrastObjective, part_of
from stillhouse.baselines.similarity_matrix import SimilarityMatrixObjective
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job
from stillhouse.losses.contrastive import infonce
from stillhouse.losses.relations import similarity_matrix
from stillhouse.models.lsa import LatentSemantics
from stillhouse.net import Net
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge

WORDS = (
    *("wing", "heat", "flow", "shock", "plate", "gas"),
    *("nose", "cone", "jet", "wave", "drag", "lift"),
)


def texts(count: int = 40) -> list[str]:
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (count, 6), generator=rng).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


def test_latent_semantics_are_those_of_scikit_learn():
    learn = pytest.importorskip("sklearn.feature_extraction.text")
    decomposition = pytest.importorskip("sklearn.decomposition")
    corpus = texts()
    weighted = learn.TfidfVectorizer(sublinear_tf=True).fit_transform(corpus)
    theirs = decomposition.TruncatedSVD(5, algorithm="arpack").fit_transform(weighted)
    net = LatentSemantics(5, 4096)
    net.fit(corpus)
    ours = net(corpus)
    assert torch.allclose(ours.norm(dim=1), torch.ones(len(corpus)))
    wanted = F.normalize(torch.from_numpy(theirs).float(), dim=1)
    signs = (ours * wanted).sum(0).sign()
    assert torch.allclose(ours, wanted * signs, atol=1e-4)
    spread = net.directions.T @ net.directions
    assert torch.allclose(spread, torch.eye(5), atol=1e-5)


def test_latent_semantics_of_unknown_words_and_of_few_texts():
    net = LatentSemantics(3, 512)
    with pytest.raises(ModelError, match="3 texts give no 3 directions"):
        net.fit(texts(3))
    net.fit(texts())
    assert torch.equal(net([""]), torch.zeros(1, 3))
    assert torch.allclose(net(["wing HEAT"]), net(["heat wing"]))
    with pytest.raises(ModelError, match="width"):
        LatentSemantics(600, 512)


def test_latent_semantics_fit_their_own_network_only(tmp_path):
    spec = {**catalogue.load("lsa").example(), "compare": []}
    spec["student"] = {"model": "stillhouse:sentence_embedder"}
    spec = {**spec, "student": {"model": "stillhouse:mlp"}}
    job = open_job(load_recipe(spec), tmp_path)
    with pytest.raises(RecipeError, match="not MLP"):
        open_method(load_recipe(spec)).run(job)
    job.log.close()


def test_parts_are_a_function_of_row_and_step():
    corpus, ids = texts(30), torch.arange(30)
    one = part_of(corpus, ids, 5, 0.5)
    assert one == part_of(corpus, ids, 5, 0.5)
    assert one != part_of(corpus, ids, 6, 0.5)
    assert one[10:20] == part_of(corpus[10:20], ids[10:20], 5, 0.5)
    kept = sum(len(part.split()) for part in one) / sum(len(text.split()) for text in corpus)
    assert 0.4 < kept < 0.62
    for part, text in zip(one, corpus, strict=True):
        assert part
        assert set(part.split()) <= set(text.split())
    numbers = torch.ones(30, 8)
    assert 0.3 < part_of(numbers, ids, 5, 0.5).mean() < 0.7


@pytest.mark.parametrize("pairs", ["words", "teacher"])
def test_the_contrast_of_both_kinds_of_pairs(pairs):
    torch.manual_seed(0)
    net = Net(nn.Linear(6, 4), answer="embedding")
    made = PairContrastObjective(net, PairContrast.Config(pairs=pairs, temperature=0.2))
    assert bool(made.wants) == (pairs == "teacher")
    x, target, clock = torch.randn(8, 6), torch.randn(8, 4), Clock(seed=3)
    batch = Batch(x=x, id=torch.arange(8))
    loss = made(batch, Knowledge({"embedding": target}), clock)["contrast"]
    other = net(part_of(x, batch["id"], clock.seed_for("part"), 0.5))["embedding"]
    theirs = other if pairs == "words" else target
    wanted = infonce(net(x)["embedding"], theirs, temperature=0.2)
    assert torch.allclose(loss, wanted)
    with pytest.raises(RecipeError, match="above 0"):
        infonce(x, x, temperature=0.0)
    with pytest.raises(ModelError, match="equal width"):
        infonce(x, target, temperature=0.1)


def test_similarities_of_the_rows_on_which_the_teacher_has_spoken():
    torch.manual_seed(0)
    net = Net(nn.Linear(6, 4), answer="embedding")
    made, x, target = SimilarityMatrixObjective(net), torch.randn(8, 6), torch.randn(8, 9)
    valid = torch.tensor([True, False, True, True, False, True, True, True])
    batch = Batch(x=x, id=torch.arange(8))
    loss = made(batch, Knowledge({"embedding": target}, valid=valid), Clock())["relations"]
    assert torch.allclose(loss, similarity_matrix(net(x[valid])["embedding"], target[valid]))
    none = Knowledge({"embedding": target}, valid=torch.zeros(8, dtype=torch.bool))
    assert made(batch, none, Clock())["relations"].item() == 0
    turn = torch.linalg.qr(torch.randn(9, 9)).Q
    assert torch.allclose(
        similarity_matrix(x, target), similarity_matrix(x, target @ turn), atol=1e-6
    )
