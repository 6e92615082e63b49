from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import plain_state
from stillhouse.baselines.kd import KD, KDObjective
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError, TeacherError
from stillhouse.launch import open_job
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge, TopK


class Given(nn.Module):
    """A student whose logits are its parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def task_loss(out: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    return {"task": F.cross_entropy(out["logits"], batch["target"])}


def objective(student: Tensor, **settings: Any) -> KDObjective:
    return KDObjective(Net(Given(student)), SimpleNamespace(loss=task_loss), KD.Config(**settings))


def tensors(seed: int = 0, rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Batch]:
    rng = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(rows, classes, generator=rng).double() * 2 for _ in range(2))
    target = torch.randint(classes, (rows,), generator=rng)
    return s, t, Batch(x=torch.zeros(rows, 1), target=target)


def terms(student: Tensor, teacher: Any, batch: Batch, valid: Any = None, **settings: Any):
    made = objective(student, **settings)
    return made, made(batch, Knowledge({"logits": teacher}, valid), Clock())


def recipe(**changes: Any):
    return load_recipe({**KD.example(0), "compare": [], **changes})


def trained(chosen: Any, folder: Path) -> dict[str, Tensor]:
    job = open_job(chosen, folder)
    try:
        return plain_state(open_method(chosen).run(job).module)
    finally:
        job.log.close()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- the loss --------------------------------------------------------------------------------


def test_the_two_terms_are_those_of_the_paper():
    s, t, batch = tensors()
    _, found = terms(s, t, batch, alpha=0.7, temperature=3.0)
    p = (t / 3).softmax(1)
    divergence = (p * (p.log() - (s / 3).log_softmax(1))).sum(1).mean()
    assert set(found) == {"task", "logits"}
    assert torch.allclose(found["task"], 0.3 * F.cross_entropy(s, batch["target"]))
    assert torch.allclose(found["logits"], 0.7 * 9 * divergence)


def test_a_weight_of_zero_is_not_computed():
    s, t, batch = tensors()
    assert set(terms(s, t, batch, alpha=0.0)[1]) == {"task"}
    assert set(terms(s, t, batch, alpha=1.0)[1]) == {"logits"}


@pytest.mark.parametrize("case", ["losses_tau1", "losses_tau2", "losses_tau4"])
def test_official_kd(golden, case):
    g = golden("dhkd").case(case)
    s, t = (torch.as_tensor(g[k]).double() for k in ("f2", "t"))
    batch = Batch(x=torch.zeros(len(s), 1), target=torch.zeros(len(s), dtype=torch.long))
    made, found = terms(s, t, batch, alpha=1.0, temperature=float(case[-1]))
    assert found["logits"].item() == pytest.approx(float(g["kd"]), rel=1e-7)
    found["logits"].backward()
    gradient = made.student.module.logits.grad.numpy()
    assert np.abs(gradient - g["grad_kd"]).max() <= 1e-7 * np.abs(g["grad_kd"]).max()


def test_distiller_has_no_squared_temperature(golden):
    g = golden("distiller").case("kd_ce")
    s, t = (torch.as_tensor(g[k]) for k in ("logits_s", "logits_t"))
    batch = Batch(x=torch.zeros(len(s), 1), target=torch.zeros(len(s), dtype=torch.long))
    made, found = terms(s, t, batch, alpha=1.0, temperature=4.0)
    found["logits"].backward()
    gradient = made.student.module.logits.grad.numpy() / 16
    np.testing.assert_allclose(gradient, g["grad_s"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("direction", "term"),
    [
        ("forward", "forward_kl"),
        ("reverse", "reverse_kl"),
        ("symmetric", "symmetric_kl"),
        ("jsd", "js_distance"),
        ("skewed-forward", "skewed_forward_kl"),
        ("skewed-reverse", "skewed_reverse_kl"),
    ],
)
def test_every_direction(golden, direction, term):
    g = golden("dackl").case("distillm")
    valid = torch.as_tensor(g["labels"]).flatten() != -100
    s, t = (torch.as_tensor(g[k]).flatten(0, 1).double() for k in ("logits_s", "logits_t"))
    batch = Batch(x=torch.zeros(len(s), 1), target=torch.zeros(len(s), dtype=torch.long))
    made, found = terms(
        s, t, batch, valid, alpha=1.0, temperature=1.0, direction=direction, beta=0.1, skew=0.1
    )
    found["logits"].backward()
    gradient = made.student.module.logits.grad.view(*g["logits_s"].shape).numpy()
    reference = g[f"grad_{term}"]
    assert np.abs(gradient - reference).max() <= 1e-5 * np.abs(reference).max()
    if f"{term}_true" in g:
        assert found["logits"].item() == pytest.approx(float(g[f"{term}_true"]), rel=1e-5)


def test_rows_without_an_answer_do_not_count():
    s, t, batch = tensors()
    valid = torch.tensor([True, False, True, True, False, True])
    spoilt = t.clone()
    spoilt[~valid] = float("nan")
    _, some = terms(s, spoilt, batch, valid, alpha=1.0)
    few = Batch(x=torch.zeros(4, 1), target=batch["target"][valid])
    _, alone = terms(s[valid], t[valid], few, alpha=1.0)
    assert torch.allclose(some["logits"], alone["logits"])


# ---- kept classes ----------------------------------------------------------------------------


def kept(t: Tensor, k: int, temperature: float) -> TopK:
    full = (t / temperature).log_softmax(-1)
    top = full.topk(k, -1)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1 - 1e-12))
    return TopK(top.indices, top.values, rest, temperature)


def test_all_classes_kept_is_the_dense_divergence():
    s, t, batch = tensors()
    _, dense = terms(s, t, batch)
    _, found = terms(s, kept(t, 5, 4.0), batch)
    assert torch.allclose(found["logits"], dense["logits"], atol=1e-8)


def test_kept_classes_of_another_temperature_or_for_another_direction_are_refused():
    s, t, batch = tensors()
    with pytest.raises(TeacherError, match=r"temperature 1, the method runs at 4"):
        terms(s, kept(t, 3, 1.0), batch)
    with pytest.raises(TeacherError, match="form: dense"):
        terms(s, kept(t, 3, 4.0), batch, direction="reverse")


def test_a_store_that_cannot_serve_is_refused_before_it_is_made(tmp_path):
    teacher = {**KD.example(0)["teacher"], "store": {"form": "topk", "k": 2}}
    with pytest.raises(TeacherError, match="temperature 1, the method runs at 4"):
        trained(recipe(teacher=teacher), tmp_path)
    assert not list(tmp_path.rglob("capture*"))


def test_the_more_classes_a_store_keeps_the_nearer_the_training(tmp_path):
    data = {"name": "generated", "options": {"classes": 12, "rows": 128}}
    budget = {"steps": 60, "batch": 32, "lr": 0.05, "optimizer": "sgd"}
    plain = KD.example(0)["teacher"]
    whole = trained(recipe(data=data, budget=budget), tmp_path / "live")
    distances = []
    for k in (2, 6, 11):  # of 12: the rest is then the one class left
        store = {"form": "topk", "k": k, "temperature": 4.0, "dtype": "float32"}
        chosen = recipe(data=data, budget=budget, teacher={**plain, "store": store})
        some = trained(chosen, tmp_path / f"top{k}")
        distances.append(max((whole[n] - some[n]).abs().max().item() for n in whole))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-3


# ---- the training ----------------------------------------------------------------------------


def test_alpha_zero_is_the_student_alone(tmp_path):
    alone = trained(recipe(method="supervised", settings={}, teacher=None), tmp_path / "alone")
    assert same(trained(recipe(settings={"alpha": 0.0}), tmp_path / "kd"), alone)


def test_label_smoothing_is_that_of_torch(tmp_path):
    from stillhouse.baselines.label_smoothing import LabelSmoothingObjective

    s, _, batch = tensors()
    made = LabelSmoothingObjective(Net(Given(s)), 0.2)
    found = made(batch, Knowledge.none, Clock())
    assert torch.allclose(found["task"], F.cross_entropy(s, batch["target"], label_smoothing=0.2))


def test_no_smoothing_is_the_student_alone(tmp_path):
    alone = trained(recipe(method="supervised", settings={}, teacher=None), tmp_path / "alone")
    plain = recipe(method="label-smoothing", settings={"smoothing": 0.0}, teacher=None)
    assert same(trained(plain, tmp_path / "smooth"), alone)


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume):
    chosen = recipe(
        budget={"steps": 40, "batch": 16, "lr": 0.05},
        student={"model": "stillhouse:mlp", "options": {"widths": [8], "dropout": 0.3}},
        output={"checkpoint_minutes": 0},
    )
    whole = trained(chosen, tmp_path / "whole")
    kills = kill_and_resume(lambda: trained(chosen, tmp_path / "cut"), tmp_path / "cut")
    assert kills >= 1
    assert same(whole, trained(chosen, tmp_path / "cut"))


def test_the_student_comes_near_a_good_teacher(tmp_path):
    """The point of it: with no labels at all, the teacher's classes are learnt."""
    chosen = recipe(
        settings={"alpha": 1.0},
        teacher={**KD.example(0)["teacher"], "train": {"steps": 200, "batch": 32, "lr": 0.05}},
        budget={"steps": 200, "batch": 32, "lr": 0.02},
    )
    job = open_job(chosen, tmp_path)
    artifact = open_method(chosen).run(job)
    opened = job.judging()
    accuracy = opened.task.judge(opened, artifact.module)["accuracy"]
    job.log.close()
    assert accuracy > 0.9


def test_bad_settings_and_models_are_told_before_training(tmp_path):
    with pytest.raises(RecipeError, match="skewed-forward"):
        open_method(recipe(settings={"direction": "skewed_forward"}))
    with pytest.raises(RecipeError, match="alpha"):
        open_method(recipe(settings={"alpha": 1.5}))
    wide = {"model": "torch.nn:Linear", "options": {"in_features": 6, "out_features": 7}}
    with pytest.raises(ModelError, match=r"teacher.*7 outputs.*4 classes"):
        trained(recipe(teacher=wide), tmp_path)
    assert not list(tmp_path.rglob("step-*"))


# ---- real classes ----------------------------------------------------------------------------

IMAGES = {"name": "generated", "options": {"kind": "images", "shape": [3, 32, 32], "rows": 16}}
TOKENS = {"name": "generated", "options": {"kind": "tokens", "rows": 16}}
TINY_VIT = {
    "model": "hf:vit",
    "options": {
        "task": "image-classification", "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 16,
    },
}  # fmt: skip
TINY_BERT = {
    "model": "hf:bert",
    "options": {
        "task": "sequence-classification", "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 64,
    },
}  # fmt: skip
PAIRS = {
    "timm": (IMAGES, {"model": "timm:resnet10t"}, {"model": "timm:test_vit", "options": {
        "img_size": 32}}),
    "torchvision": (IMAGES, {"model": "torchvision:resnet18"},
                    {"model": "torchvision:shufflenet_v2_x0_5"}),
    "vit to cnn": (IMAGES, TINY_VIT, {"model": "stillhouse:resnet8"}),
    "bert to text cnn": (TOKENS, TINY_BERT, {"model": "stillhouse:text_cnn"}),
    "bert to bert": (TOKENS, TINY_BERT, TINY_BERT),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_real_classes_plug_in(pair, tmp_path):
    data, teacher, student = PAIRS[pair]
    budget = {"steps": 2, "batch": 8, "lr": 0.001}
    chosen = recipe(data=data, teacher=teacher, student=student, budget=budget)
    job = open_job(chosen, tmp_path)
    before = plain_state(job.student().module)
    artifact = open_method(chosen).run(job)
    job.log.close()
    after = plain_state(artifact.module)
    assert any(not torch.equal(before[k], after[k]) for k in after)
    artifact.save(tmp_path / "artifact")
    reopened = plain_state(open_artifact(tmp_path / "artifact").module)
    assert same(after, reopened)
