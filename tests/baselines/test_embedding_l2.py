"""Regression onto vectors: the distances by hand, stores, other teachers, real text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import stillhouse as still
from stillhouse.baselines.embedding_l2 import EmbeddingL2, EmbeddingL2Objective, vector_distance
from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Clock
from stillhouse.engine.store import Store
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import run
from stillhouse.net import Net
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge


def test_distances_of_two_unit_vectors_by_hand():
    student, teacher = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    found = {d: vector_distance(student, teacher, d).item() for d in ("l2sq", "l2", "mse", "cos")}
    expected = {"l2sq": 0.8, "l2": math.sqrt(0.8), "mse": 0.4, "cos": 0.4}
    assert found == pytest.approx(expected, abs=1e-6)


def test_relations_of_the_distances_and_no_gradient_for_the_teacher():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (nn.functional.normalize(torch.randn(7, 24, generator=rng)) for _ in "ab")
    teacher.requires_grad_()
    square = vector_distance(student, teacher, "l2sq")
    assert not square.requires_grad
    assert torch.allclose(square, 2 * vector_distance(student, teacher, "cos"), atol=1e-6)
    assert torch.allclose(square, 24 * vector_distance(student, teacher, "mse"), atol=1e-6)
    assert torch.allclose(square.sqrt(), vector_distance(student, teacher, "l2"), atol=1e-6)


@pytest.mark.parametrize("distance", ["l2sq", "l2", "mse", "cos"])
def test_equal_vectors_are_at_0_with_a_finite_gradient(distance):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    items = vector_distance(x, x.detach().clone(), distance)
    assert torch.allclose(items, torch.zeros(3), atol=1e-6)
    items.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() < 1e-6


def objective(width: int = 4, **settings: object) -> EmbeddingL2Objective:
    torch.manual_seed(0)
    net = Net(nn.Linear(3, width), answer="embedding")
    return EmbeddingL2Objective(net, EmbeddingL2.Config(**settings))


def test_rows_on_which_the_teacher_is_silent_do_not_count():
    made, x = objective(), torch.randn(5, 3)
    target = torch.randn(5, 4)
    spoken = torch.tensor([True, False, True, True, False])
    batch, clock = Batch(x=x, id=torch.arange(5)), Clock()
    part = made(batch, Knowledge({"embedding": target}, valid=spoken), clock)["embedding"]
    kept = Batch(x=x[spoken], id=torch.arange(3))
    whole = made(kept, Knowledge({"embedding": target[spoken]}), clock)["embedding"]
    assert torch.allclose(part, whole)
    nothing = Knowledge({"embedding": target}, valid=torch.zeros(5, dtype=torch.bool))
    assert made(batch, nothing, clock)["embedding"].item() == 0


def test_another_width_is_told():
    batch = Batch(x=torch.randn(2, 3), id=torch.arange(2))
    with pytest.raises(ModelError, match=r"\(2, 4\), the teacher's \(2, 6\).*width: 6"):
        objective()(batch, Knowledge({"embedding": torch.zeros(2, 6)}), Clock())


def test_another_distance_is_refused():
    example = {**EmbeddingL2.example(), "settings": {"distance": "l3"}}
    with pytest.raises(RecipeError, match="distance"):
        open_method(load_recipe(example))


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-6), ("float16", 1e-3), ("int8", 0.02)])
def test_from_a_store_as_from_the_teacher(tmp_path: Path, dtype: str, near: float):
    budget = {"steps": 40, "batch": 16, "lr": 0.02, "optimizer": "adam"}
    spec = {**EmbeddingL2.example(), "budget": budget, "compare": []}
    live = run(load_recipe(spec), folder=tmp_path / "live", progress=False)
    spec["teacher"] = {**spec["teacher"], "store": {"dtype": dtype, "path": str(tmp_path / "s")}}
    kept = run(load_recipe(spec), folder=tmp_path / "kept", progress=False)
    one, other = (r.artifact.module.module.state_dict() for r in (live, kept))
    assert max(float((one[k] - other[k]).abs().max()) for k in one) < near
    assert Store.open(tmp_path / "s").fields["embedding"].dtype == dtype


def test_plain_modules_through_the_front_door(tmp_path: Path):
    torch.manual_seed(0)
    teacher, student = nn.Linear(6, 5), nn.Linear(6, 5)
    x = torch.randn(64, 6)
    count = torch.arange(20)
    places = torch.stack([count // 2, count % 2, torch.full_like(count, 10)], 1)
    score = torch.cosine_similarity(teacher(x[0:20:2]), teacher(x[1:20:2])).detach()
    pairs = {"x": x[:20], "pair": places, "target": score.repeat_interleave(2)}
    result = still.distill(
        teacher, student, TensorSource({"x": x}), test=TensorSource(pairs), method="embedding-l2",
        compare=[], folder=tmp_path, epochs=60, batch=16, lr=0.05, optimizer="adam",
        store={"dtype": "int8"}, progress=False,
    )  # fmt: skip
    assert result.sides["distilled"]["0"]["spearman"] > 0.97
    vectors = torch.stack(result.artifact.predict(list(x[:4])))
    assert (vectors - teacher(x[:4])).abs().max() < 0.1
