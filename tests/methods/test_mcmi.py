from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.baselines.kd import KD, KDObjective
from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError, TeacherError
from stillhouse.launch import open_job, run
from stillhouse.losses.mutual_information import cmi
from stillhouse.methods.images.mcmi import (
    MCMI,
    StudentObjective,
    TeacherObjective,
    class_centroids,
    per_epoch_cosine,
)
from stillhouse.metrics.mutual_information import CMI
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Knowledge
from stillhouse.teachers.live import Live

TEACHER = MCMI.example(0)["teacher"]
STUDENT = MCMI.example(0)["student"]
SETTINGS = MCMI.example(0)["settings"]
# The example's own data have too few validation rows for a floor that says something.
EASY = {"floor": 0.9}


def recipe(**changes: Any):
    spec = {**MCMI.example(0), "compare": [], **changes}
    if "settings" in changes:
        spec["settings"] = {**SETTINGS, **changes["settings"]}
    return load_recipe({k: v for k, v in spec.items() if v is not None})


def trained(chosen: Any, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job), job
    finally:
        job.log.close()


def stages(job: Any) -> list[str]:
    return [stage["name"] for stage in job.stages]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Fixed(nn.Module):
    """A net whose logits are its parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def fixed(logits: Tensor, target: Tensor, **settings: Any) -> tuple[TeacherObjective, dict]:
    made = TeacherObjective(Net(Fixed(logits)), **settings)
    batch = Batch(x=torch.zeros(len(logits), 1), target=target)
    return made, made(batch, Knowledge.none, Clock())


# ---- class means -----------------------------------------------------------------------------


def golden_net(g: dict[str, Any]) -> nn.Sequential:
    """Linear - (BatchNorm1d) - ReLU - Linear, as the vectors describe it."""
    own = {k[2:]: torch.as_tensor(v) for k, v in g.items() if k.startswith("w_")}
    weights = {k.replace("_", ".", 1): v for k, v in own.items()}
    norm = "1.running_mean" in weights
    hidden, width = weights["0.weight"].shape
    last = nn.Linear(hidden, len(weights["3.weight" if norm else "2.weight"]))
    layers = [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if norm else []), nn.ReLU()]
    net = nn.Sequential(*layers, last)
    net.load_state_dict({**net.state_dict(), **weights})
    return net


@pytest.mark.parametrize("case", ["centroids", "centroids_missing_class", "centroids_bn"])
def test_official_class_means(golden, case):
    """Property 8 as well: rows sum to 1, whatever the batches."""
    g = golden("mcmi").case(case)
    x, y = torch.as_tensor(g["x"]), torch.as_tensor(g["y"])
    sizes, classes = g["batch_sizes"].tolist(), g["q"].shape[0]

    def found(sizes: list[int], dtype: torch.dtype, mode: str = "train"):
        net = Net(golden_net(g).to(dtype))
        batches = [
            {"x": a.to(dtype), "target": b}
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        return *class_centroids(net, batches, classes, mode=mode), net

    means, empty, net = found(sizes, torch.float32)
    official = torch.as_tensor(g["q"])
    seen = ~official.isnan().any(1)
    assert empty == (~seen).nonzero()[:, 0].tolist()
    assert (means - official)[seen].abs().max() <= 1e-6
    assert means[~seen].eq(1 / classes).all()
    if "q_f64" in g:
        wide = found(sizes, torch.float64)[0]
        assert (wide - torch.as_tensor(g["q_f64"]))[seen].abs().max() <= 1e-12
    assert not means.requires_grad
    gathered = torch.as_tensor(g["gathered"])
    own = means[torch.as_tensor(g["gather_target"])]
    assert (own - gathered)[~gathered.isnan().any(1)].abs().max() <= 1e-6
    if case == "centroids_bn":
        norm = net.module[1]
        for name in ("running_mean", "running_var"):
            assert torch.allclose(getattr(norm, name), torch.as_tensor(g[f"{name}_after"]))
        still, _, kept = found(sizes, torch.float64, "eval")
        assert (still - torch.as_tensor(g["q_eval_mode"])).abs().max() <= 1e-12
        assert torch.equal(kept.module[1].running_mean, golden_net(g)[1].running_mean.double())
    else:
        for cut in ([19], [1] * 19, [3, 16]):
            other = found(cut, torch.float32)[0]
            assert (other - means).abs().max() <= 1e-6
            assert (other.sum(1) - 1).abs().max() <= 1e-6


def test_the_net_is_left_in_the_mode_it_was_in():
    net = Net(nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    batches = [{"x": torch.ones(4, 2), "target": torch.tensor([0, 1, 0, 1])}]
    for training in (True, False):
        net.train(training)
        for mode in ("train", "eval"):
            class_centroids(net, batches, 2, mode=mode)
            assert net.training is training
    with pytest.raises(ModelError, match=r"2 outputs.*3 classes"):
        class_centroids(net, batches, 3)


# ---- the tuning's loss -----------------------------------------------------------------------


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(10, 4, generator=rng)
    target = torch.randint(4, (10,), generator=rng)
    return logits, target, torch.rand(4, 4, generator=rng).softmax(-1)


@pytest.mark.parametrize("case", ["loss0", "loss1"])
def test_the_official_total_through_the_objective(golden, case):
    g = golden("mcmi").case(case)
    logits, target = torch.as_tensor(g["output"]), torch.as_tensor(g["target"])
    made, terms = fixed(logits, target, weight=0.15, centroids=torch.as_tensor(g["centroids"]))
    assert set(terms) == {"task", "cmi"}
    total = sum(terms.values())
    assert total.item() == pytest.approx(float(g["total_f32"]), rel=1e-6)
    total.backward()
    reference = torch.as_tensor(g["grad_total_f32"])
    grad = made.student.module.logits.grad
    assert (grad - reference).abs().max() <= 1e-6 * reference.abs().max()
    assert made.bank.value.grad is None


def test_without_a_weight_it_is_the_cross_entropy():
    """Property 4: value and gradient, to the bit."""
    logits, target, means = numbers()
    made, terms = fixed(logits, target, weight=0.0, centroids=means)
    assert set(terms) == {"task"}
    own = logits.clone().requires_grad_(True)
    expected = F.cross_entropy(own, target)
    assert torch.equal(terms["task"], expected)
    terms["task"].backward()
    expected.backward()
    assert torch.equal(made.student.module.logits.grad, own.grad)


def test_a_step_raises_the_information_and_a_step_of_the_other_sign_does_not():
    logits, target, means = numbers()
    made, terms = fixed(logits, target, weight=5.0, centroids=means)
    (grad,) = torch.autograd.grad(terms["cmi"], made.student.module.logits)
    moved = logits - 0.5 * grad
    assert cmi(moved, means, target) > cmi(logits, means, target)


def test_means_stay_frozen_unless_they_are_to_run():
    logits, target, means = numbers()
    still, _ = fixed(logits, target, centroids=means)
    still.settle(True)
    assert torch.equal(still.bank.value, means)
    made, _ = fixed(logits, target, centroids=means, decay=0.9)
    assert torch.equal(made.bank.value, means)
    made.bank.settle(True)
    p = logits.softmax(-1)
    for k in range(4):
        own = target == k
        expected = 0.9 * means[k] + 0.1 * p[own].mean(0) if own.any() else means[k]
        torch.testing.assert_close(made.bank.value[k], expected)
    torch.testing.assert_close(made.bank.value.sum(1), torch.ones(4))


def test_entropy_and_smoothing_are_what_they_are_called():
    logits, target, _ = numbers()
    p = logits.softmax(-1)
    _, terms = fixed(logits, target, weight=0.2, regulariser="entropy")
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(terms["entropy"], -0.2 * entropy)
    _, terms = fixed(logits, target, weight=0.0, smoothing=0.1)
    torch.testing.assert_close(terms["task"], F.cross_entropy(logits, target, label_smoothing=0.1))


def test_the_rate_moves_once_an_epoch_and_ends_at_nothing():
    rate = per_epoch_cosine(4)
    assert rate(Clock(epoch=0, step=3)) == 1.0
    assert rate(Clock(epoch=2)) == pytest.approx(0.5)
    assert rate(Clock(epoch=4)) == pytest.approx(0.0)


# ---- the student's loss ----------------------------------------------------------------------


def distilled(s: Tensor, batch: Batch, teacher: Tensor, **settings: Any):
    task = Classification(Splits({}, "vectors", {"classes": list(range(s.shape[1]))}))
    made = StudentObjective(Net(Fixed(s)), task, **settings)
    return made, made(batch, Knowledge({"logits": teacher}), Clock())


def test_official_student_loss(golden):
    g = golden("mcmi").case("kd_T4")
    for kind, suffix, rel in ((torch.float64, "", 1e-12), (torch.float32, "_f32", 1e-5)):
        s, t = (torch.as_tensor(g[k]).to(kind) for k in ("logits_s", "logits_t"))
        batch = Batch(x=torch.zeros(len(s), 1), target=torch.as_tensor(g["target"]))
        made, terms = distilled(s, batch, t)
        assert terms["task"].item() == pytest.approx(0.1 * float(g["ce" + suffix]), rel=rel)
        assert terms["logits"].item() == pytest.approx(0.9 * float(g["kd" + suffix]), rel=rel)
        total = sum(terms.values())
        assert total.item() == pytest.approx(float(g["total" + suffix]), rel=rel)
        total.backward()
        reference = torch.as_tensor(g["grad_total" + suffix])
        grad = made.student.module.logits.grad
        assert (grad - reference).abs().max() <= rel * reference.abs().max()
        hinton = KDObjective(Net(Fixed(s)), made_task(s), KD.Config())
        same_terms = hinton(batch, Knowledge({"logits": t}), Clock())
        torch.testing.assert_close(sum(same_terms.values()), total)


def made_task(s: Tensor) -> Classification:
    return Classification(Splits({}, "vectors", {"classes": list(range(s.shape[1]))}))


def test_official_step_without_a_dropped_class(golden):
    g = golden("mcmi").case("dropped_class")
    keep = torch.as_tensor(g["keep"])
    s, t = (torch.as_tensor(g[k]).double() for k in ("logits_s", "logits_t"))
    leaf = s.clone().requires_grad_(True)
    target = torch.as_tensor(g["target"])
    kept = Batch(x=torch.zeros(len(s), 1), target=target).select(keep)
    task = made_task(s)
    made = StudentObjective(Net(nn.Identity()), task)
    kept["x"] = leaf[keep]
    terms = made(kept, Knowledge({"logits": t[keep]}), Clock())
    assert terms["task"].item() == pytest.approx(0.1 * float(g["ce"]), rel=1e-12)
    assert terms["logits"].item() == pytest.approx(0.9 * float(g["kd"]), rel=1e-12)
    total = sum(terms.values())
    assert total.item() == pytest.approx(float(g["total"]), rel=1e-12)
    total.backward()
    torch.testing.assert_close(leaf.grad, torch.as_tensor(g["grad_total"]), rtol=1e-12, atol=1e-14)
    assert not leaf.grad[~keep].any()


def test_every_case_of_the_vectors_is_known(golden):
    assert set(golden("mcmi").cases()) == {
        "loss0", "loss1", "loss_zero_entry", "centroids", "centroids_missing_class",
        "centroids_bn", "kd_T4", "dropped_class", "meter",
    }  # fmt: skip


# ---- a run -----------------------------------------------------------------------------------


def test_the_student_is_what_comes_out_and_the_teacher_comes_along(tmp_path):
    result = run(recipe(settings=EASY), folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    assert {"accuracy", "teacher_accuracy", "teacher_nll", "cmi", "cmi_t4"} <= set(figures)
    assert {"log_likelihood", "cmi_frozen", "mean_shift"} <= set(figures)
    assert figures["cmi_frozen"] == pytest.approx(figures["cmi"] + figures["mean_shift"])
    assert result.sides["teacher"]["0"]["accuracy"] == figures["teacher_accuracy"]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Mean output of the teacher by class" in page
    assert "before tuning" in page
    taught = open_artifact(tmp_path / "run" / "artifact" / "attachments" / "teacher")
    assert sum(p.numel() for p in taught.module.parameters()) > sum(
        p.numel() for p in result.artifact.module.parameters()
    )
    assert same(
        plain_state(taught.module), plain_state(result.artifact.attachments["teacher"].module)
    )
    means = torch.tensor(result.artifact.meta["mcmi"]["means"])
    torch.testing.assert_close(means.sum(1), torch.ones(4))


def test_the_figures_are_those_of_the_teacher_that_is_handed_on(tmp_path):
    artifact, job = trained(recipe(settings=EASY), tmp_path)
    meter = CMI(4, (1.0, 4.0))
    job.walk(artifact.attachments["teacher"].module, "train", meter.update)
    told = artifact.meta["mcmi"]["figures"]
    for name, value in meter.compute().items():
        assert told[name] == pytest.approx(value, rel=1e-6)


def noisy(rows: int = 256) -> Splits:
    """Classes that overlap: what the labels leave open is there to be told."""
    rng = torch.Generator().manual_seed(3)

    def part(name: str) -> TensorSource:
        x = torch.randn(rows, 6, generator=rng)
        drawn = (2 * x[:, :4] - torch.log(-torch.log(torch.rand(rows, 4, generator=rng)))).argmax(1)
        return TensorSource({"x": x, "target": drawn}, name=name)

    parts = {name: part(name) for name in ("train", "val", "test")}
    return Splits(parts, "noisy", {"classes": list("abcd"), "input": [6]})


def test_tuning_for_information_raises_it(tmp_path):
    train = {"steps": 100, "batch": 32, "lr": 0.1, "optimizer": "sgd"}
    settings = {**EASY, "tune_epochs": 10, "tune_batch": 32, "tune_lr": 0.05}
    found = {}
    for weight in (0.0, 0.15, 0.4):
        chosen = recipe(
            data={"name": "stillhouse.api:given"},
            teacher={**TEACHER, "train": train},
            student=None,
            settings={**settings, "cmi_weight": weight},
        )
        artifact, _ = trained(chosen, tmp_path / str(weight), Given(splits=noisy()))
        found[weight] = artifact.meta["mcmi"]["figures"]
    assert found[0.4]["cmi"] > 1.05 * found[0.15]["cmi"] > 1.1 * found[0.0]["cmi"]
    assert found[0.4]["log_likelihood"] < found[0.0]["log_likelihood"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"student": None}, ["teacher", "before", "centroids", "tune", "meter"]),
        ({"teacher": None}, ["teacher", "before", "centroids", "tune", "meter"]),
        ({}, ["teacher", "before", "centroids", "tune", "meter", "student"]),
    ],
)
def test_it_tunes_the_teacher_or_the_only_net_there_is(form, expected, tmp_path):
    changes = {**form, "settings": EASY}
    spec = {**MCMI.example(0), **{k: v for k, v in changes.items() if v is not None}}
    for name, value in form.items():
        if value is None:
            spec.pop(name)
    artifact, job = trained(load_recipe({**spec, "compare": []}), tmp_path)
    assert stages(job) == expected
    assert ("teacher" in artifact.attachments) == (not form)
    width = 8 if "teacher" in form or not form else 16
    assert next(artifact.module.parameters()).shape[0] == width
    artifact.save(tmp_path / "artifact")
    again = open_artifact(tmp_path / "artifact")
    assert same(plain_state(artifact.module), plain_state(again.module))


@pytest.mark.parametrize("student_method", ["kd", "dhkd"])
@pytest.mark.parametrize("form", ["teacher", "student"])
def test_another_method_is_taught_by_it_without_knowing(student_method, form, tmp_path):
    inner: dict[str, Any] = {"method": "mcmi", "settings": {**SETTINGS, **EASY}}
    if form == "teacher":
        inner["teacher"] = TEACHER
    else:
        inner["student"] = {k: v for k, v in TEACHER.items() if k != "train"}
        inner["budget"] = TEACHER["train"]
    spec = {**catalogue.load(student_method).example(0), "teacher": inner, "compare": []}
    spec["data"] = {"name": "generated", "options": {"kind": "vectors"}}
    chosen = load_recipe(spec)
    artifact, job = trained(chosen, tmp_path / "run")
    ran = stages(job)
    assert ran == [
        "teacher/teacher", "teacher/before", "teacher/centroids", "teacher/tune",
        "teacher/meter", "student",
    ]  # fmt: skip
    teacher = job.teacher()
    assert isinstance(teacher, Live)
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert all(torch.isfinite(v).all() for v in plain_state(artifact.module).values())
    # The teacher is the tuned one: it is what mcmi alone leaves of the same net and seed.
    plain = {**spec, "teacher": TEACHER}
    _, other = trained(load_recipe(plain), tmp_path / "plain")
    assert not same(plain_state(teacher.net), plain_state(other.teacher().net))


def test_its_artifact_teaches_too(tmp_path):
    run(recipe(student=None, settings=EASY), folder=tmp_path / "teacher", progress=False)
    spec = {**KD.example(0), "teacher": {"artifact": str(tmp_path / "teacher")}, "compare": []}
    _, job = trained(load_recipe(spec), tmp_path / "kd")
    told = open_artifact(tmp_path / "teacher")
    assert same(plain_state(job.teacher().net), plain_state(told.module))
    # And can be tuned again.
    again, _ = trained(
        recipe(teacher={"artifact": str(tmp_path / "teacher")}, student=None, settings=EASY),
        tmp_path / "again",
    )
    assert again.model["id"] == "stillhouse:mlp"
    assert not same(plain_state(again.module), plain_state(told.module))


def test_the_teacher_before_tuning_makes_the_student_of_kd(tmp_path):
    ours, _ = trained(recipe(variant="mll", settings={}), tmp_path / "ours")
    spec = {**MCMI.example(0), "method": "kd", "settings": {}, "compare": []}
    theirs, _ = trained(load_recipe(spec), tmp_path / "kd")
    assert same(plain_state(ours.module), plain_state(theirs.module))


def test_a_store_keeps_what_the_tuned_teacher_says(tmp_path):
    kept = {**TEACHER, "store": {"dtype": "float32"}}
    settings = {**EASY, "students": {"few": {"few_shot": 4}}}
    live, _ = trained(recipe(settings=settings), tmp_path / "live")
    stored, job = trained(recipe(teacher=kept, settings=settings), tmp_path / "stored")
    assert {"capture", "students/few/capture"} <= set(stages(job))
    pairs = [
        (a.module, b.module)
        for a, b in ((live, stored), (live.attachments["few"], stored.attachments["few"]))
    ]
    for pair in pairs:
        one, other = (plain_state(module) for module in pair)
        assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-5


def test_what_is_handed_in_stays_as_it_is(tmp_path):
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    parts = {k: TensorSource({"x": x, "target": y}, name=k) for k in ("train", "val", "test")}
    splits = Splits(parts, "vectors", {"classes": list("abcd")})
    module = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    given = Given(student=nn.Linear(6, 4), teacher=module, splits=splits)
    chosen = recipe(
        data={"name": "stillhouse.api:given"}, teacher=None, student={"model": "given"},
        settings=EASY,
    )  # fmt: skip
    artifact, job = trained(chosen, tmp_path, given)
    assert "teacher" not in stages(job)
    assert same(before, dict(module.state_dict()))
    assert all(p.requires_grad for p in module.parameters())
    tuned = artifact.attachments["teacher"].module.module.state_dict()
    assert not same(before, dict(tuned))


def test_means_taken_in_train_mode_move_batch_norm_and_in_eval_mode_do_not(tmp_path):
    small = {"model": "stillhouse:small_cnn", "options": {"widths": [4, 4]}}
    images = {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8]}}
    base = {"data": images, "teacher": small, "student": None}
    moved = {}
    for mode in ("train", "eval"):
        chosen = recipe(**base, settings={**EASY, "centroid_mode": mode})
        job = open_job(chosen, tmp_path / mode)
        method = open_method(chosen)
        net = job.trainable_teacher()
        before = {k: v.clone() for k, v in net.named_buffers()}
        method._centroids(job, net)
        moved[mode] = any(not torch.equal(before[k], v) for k, v in net.named_buffers())
        fresh = open_job(chosen, tmp_path / mode)
        again = fresh.trainable_teacher()
        open_method(chosen)._centroids(fresh, again)
        assert all(torch.equal(v, dict(again.named_buffers())[k]) for k, v in net.named_buffers())
    assert moved == {"train": True, "eval": False}


# ---- the floor, the weight, the temperature --------------------------------------------------


def test_a_weight_that_runs_away_is_caught_and_undone(tmp_path):
    wild = {"cmi_weight": 50.0, "tune_lr": 0.5, "tune_epochs": 6, "floor": 0.05}
    long = {"train": {"steps": 60, "batch": 16, "lr": 0.1, "optimizer": "sgd"}}
    chosen = recipe(teacher={**TEACHER, **long}, settings=wild)
    artifact, job = trained(chosen, tmp_path / "wild")
    told = artifact.meta["mcmi"]
    assert "beyond the floor" in told["stopped"]
    assert "beyond the floor" in (tmp_path / "wild" / "log.jsonl").read_text()
    tune = next(s for s in job.stages if s["name"] == "tune")
    assert tune["steps"] >= 1
    teacher = artifact.attachments["teacher"].module
    before, _ = trained(
        recipe(variant="mll", teacher={**TEACHER, **long}, settings={}), tmp_path / "mll"
    )
    plain = job.evaluate(before.attachments["teacher"].module, "val")["accuracy"]
    assert job.evaluate(teacher, "val")["accuracy"] >= plain - 0.05
    free, _ = trained(
        recipe(teacher={**TEACHER, **long}, settings={**wild, "floor": None}), tmp_path / "free"
    )
    fallen = job.evaluate(free.attachments["teacher"].module, "val")["accuracy"]
    assert fallen < plain - 0.05
    assert "stopped" not in free.meta["mcmi"]


def test_what_needs_validation_data_says_so(tmp_path):
    x, y = torch.randn(32, 6), torch.arange(32) % 4
    parts = {k: TensorSource({"x": x, "target": y}, name=k) for k in ("train", "test")}
    given = Given(splits=Splits(parts, "vectors", {"classes": list("abcd"), "input": [6]}))
    for settings, words in (
        ({}, r"floor needs a validation split.*floor: null"),
        ({"keep": "best"}, "keep: best needs"),
        ({"cmi_weight": "auto", "floor": None}, "cmi_weight: auto needs"),
        ({"temperature": "best", "floor": None}, "temperature: best needs"),
    ):
        chosen = recipe(data={"name": "stillhouse.api:given"}, settings=settings)
        with pytest.raises(RecipeError, match=words):
            trained(chosen, tmp_path / "bad", given)
    assert not list(tmp_path.rglob("stamp.state"))
    chosen = recipe(data={"name": "stillhouse.api:given"}, settings={"floor": None})
    trained(chosen, tmp_path / "good", given)


def test_a_weight_by_budget_is_the_largest_that_keeps_the_likelihood(tmp_path):
    grid = {"cmi_weight": "auto", "auto_weights": [0.1, 1.0, 40.0], "auto_budget": 0.3, **EASY}
    artifact, job = trained(recipe(settings=grid, student=None), tmp_path / "auto")
    told = artifact.meta["mcmi"]
    tried = told["auto"]
    assert [row["weight"] for row in tried][:2] == [0.0, 0.1]
    kept = [r for r in tried if tried[0]["log_likelihood"] - r["log_likelihood"] <= 0.3]
    assert told["weight"] == max(r["weight"] for r in kept)
    found = -job.evaluate(artifact.module, "val")["nll"]
    own = next(r for r in tried if r["weight"] == told["weight"])
    assert found == pytest.approx(own["log_likelihood"], abs=1e-6)
    again, _ = trained(recipe(settings=grid, student=None), tmp_path / "auto")
    assert same(plain_state(artifact.module), plain_state(again.module))


def test_the_best_temperature_is_chosen_on_validation_data(tmp_path):
    settings = {**EASY, "temperature": "best", "temperatures": [1.0, 8.0]}
    artifact, job = trained(recipe(settings=settings), tmp_path)
    chosen = artifact.meta["mcmi"]["temperature"]
    assert chosen in {1.0, 8.0}
    plain, _ = trained(recipe(settings={**EASY, "temperature": chosen}), tmp_path / "plain")
    assert same(plain_state(artifact.module), plain_state(plain.module))
    scan = [s for s in stages(job) if s.startswith("temperature/")]
    assert len([s for s in scan if s.endswith("/student")]) == 2


def test_the_early_stopped_teacher_is_the_nearest_in_accuracy(tmp_path):
    train = {"epochs": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"}
    teacher = {**TEACHER, "train": train}
    artifact, _ = trained(recipe(variant="early-stopped", teacher=teacher, settings=EASY), tmp_path)
    told = artifact.meta["mcmi"]["early_stop"]
    assert 1 <= told["epoch"] <= 4
    assert "cmi_frozen" not in artifact.meta["mcmi"]["figures"]
    for variant in ("early-stopped", "label-smoothing"):
        brought = {k: v for k, v in TEACHER.items() if k != "train"}
        with pytest.raises(RecipeError, match=r"add teacher: \{train"):
            trained(recipe(variant=variant, teacher=brought, settings={}), tmp_path / variant)


@pytest.mark.parametrize("variant", MCMI.variants)
def test_every_variant_runs(variant, tmp_path):
    quick = {"tune_epochs": 1, "tune_batch": 32, "tune_lr": 0.01}
    chosen = recipe(variant=variant, settings=quick)
    chosen.settings["auto_weights"] = [0.1, 0.2]
    artifact, _ = trained(chosen, tmp_path)
    for made in (artifact, artifact.attachments["teacher"]):
        assert all(torch.isfinite(v).all() for v in plain_state(made.module).values())
    teaches = MCMI.variants[variant].set.get("teaches", "mcmi")
    assert artifact.meta["mcmi"]["teaches"] == teaches


# ---- what students see -----------------------------------------------------------------------


def test_the_teacher_sees_all_and_the_student_few(tmp_path):
    data = {"name": "generated", "options": {"kind": "vectors", "rows": 80}}
    chosen = recipe(
        data=data, settings={**EASY, "students": {"full": {}, "gone": {"drop_classes": [2]}}}
    )
    job = open_job(chosen, tmp_path)
    from stillhouse.data.splitting import narrowed

    job.task = Classification(narrowed(job.splits, few_shot=4, seed=0, name="generated"))
    artifact = open_method(chosen).run(job)
    assert len(job.splits["train"]) == 16
    assert job.teacher_split == "full"
    assert len(job.splits["full"]) == 80
    assert {"full", "gone", "teacher"} == set(artifact.attachments)
    rows = {s["name"]: s for s in job.stages}
    assert rows["tune"]["steps"] == 2 * 5
    assert "students/gone/student" in rows
    head = artifact.attachments["gone"].module.head_layer()
    assert head.out_features == 4  # property 9
    figures = open_method(chosen).judge(job.judging(), artifact)
    assert {"full_accuracy", "gone_accuracy", "gone_unseen_accuracy"} <= set(figures)
    assert figures["few_shot_loss"] == pytest.approx(figures["full_accuracy"] - figures["accuracy"])
    assert "unseen_accuracy" not in figures


def test_a_nested_teacher_sees_all_too(tmp_path, data_root):
    inner = {
        "method": "mcmi",
        "teacher": {
            "model": "stillhouse:small_cnn", "options": {"widths": [4]}, "train": {"steps": 2},
        },
        "settings": {"tune_epochs": 1, "tune_batch": 100, "floor": None},
    }  # fmt: skip
    options = {"per_class": {"train": 40, "test": 10}, "few_shot": 0.05, "drop_classes": ["3", 5]}
    spec = {
        "method": "kd",
        "data": {"name": "mnist5k", "options": options},
        "teacher": inner,
        "student": {"model": "stillhouse:small_cnn", "options": {"widths": [4]}},
        "budget": {"steps": 3, "batch": 16},
        "compare": [],
    }
    result = run(load_recipe(spec), folder=tmp_path / "run", progress=False)
    steps = {s["name"]: s.get("steps") for s in result.summary["stages"]}
    assert steps["teacher/tune"] == 4  # 360 rows, of which students see 18
    figures = result.sides["distilled"]["0"]
    assert {"unseen_accuracy", "seen_accuracy"} <= set(figures)
    assert result.artifact.module.head_layer().out_features == 10


# ---- resume ----------------------------------------------------------------------------------


def test_killed_with_sigkill_it_ends_bit_for_bit_the_same(tmp_path, kill_and_resume, monkeypatch):
    chosen = recipe(
        teacher={**TEACHER, "options": {"widths": [16], "dropout": 0.2}},
        settings={**EASY, "tune_epochs": 3, "tune_batch": 8, "centroid_decay": 0.99},
        budget={"steps": 20, "batch": 16, "lr": 0.05},
        output={"checkpoint_minutes": 0},
    )

    def at(place: str):
        # Stages of the teacher are shared by way of the cache: each side has its own.
        monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / f"cache-{place}"))
        return trained(chosen, tmp_path / place)[0]

    whole = at("whole")
    kills = kill_and_resume(lambda: at("cut"), tmp_path, kills=4)
    assert kills >= 1
    again = at("cut")
    assert same(plain_state(whole.module), plain_state(again.module))
    ours, theirs = (a.attachments["teacher"].module for a in (whole, again))
    assert same(plain_state(ours), plain_state(theirs))
    assert whole.meta["mcmi"] == again.meta["mcmi"]


def test_sides_share_what_they_have_in_common(tmp_path):
    _, first = trained(recipe(settings=EASY), tmp_path / "one")
    seconds = {s["name"]: s["seconds"] for s in first.stages}
    _, second = trained(recipe(settings={**EASY, "temperature": 2.0}), tmp_path / "two")
    for stage in second.stages:
        if stage["name"] in {"teacher", "centroids", "tune"}:
            assert stage["seconds"] == seconds[stage["name"]]
    log = (tmp_path / "two" / "log.jsonl").read_text()
    assert log.count('"reloaded"') == 3


# ---- bad input -------------------------------------------------------------------------------


def test_bad_settings_are_told():
    for settings, words in (
        ({"cmi_weight": -0.1}, "cmi_weight must be at least 0"),
        ({"cmi_weight": "automatic"}, "cmi_weight"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"auto_weights": [0.2, 0.1]}, "rising order"),
        ({"label_weight": 0, "logit_weight": 0}, "nothing to learn"),
        ({"teaches": "mlle"}, "mll"),
        ({"students": {"a b": {}}}, "'a b' is no name"),
        ({"students": {"a": {"few": 3}}}, "students"),
        ({"floor": 0.0}, "floor"),
    ):
        with pytest.raises(RecipeError, match=words):
            open_method(recipe(settings=settings))


def test_a_teacher_that_only_answers_is_refused(tmp_path):
    spec = recipe(teacher={"callable": "torch:relu", "fingerprint": "x"})
    with pytest.raises(TeacherError, match=r"trains the teacher itself.*callable"):
        trained(spec, tmp_path)


def test_a_teacher_of_other_classes_is_told_before_training(tmp_path):
    wide = {"model": "torch.nn:Linear", "options": {"in_features": 6, "out_features": 7}}
    with pytest.raises(ModelError, match=r"7 outputs.*4 classes"):
        trained(recipe(teacher=wide), tmp_path)
    assert not list(tmp_path.rglob("step-*"))


# ---- real classes ----------------------------------------------------------------------------

IMAGES = {"name": "generated", "options": {"kind": "images", "shape": [3, 32, 32], "rows": 16}}
TOKENS = {"name": "generated", "options": {"kind": "tokens", "rows": 16}}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEACHERS = {
    "timm, cnn": (IMAGES, {"model": "timm:resnet10t"}),
    "timm, vit": (IMAGES, {"model": "timm:test_vit", "options": {"img_size": 32}}),
    "torchvision": (IMAGES, {"model": "torchvision:shufflenet_v2_x0_5"}),
    "torchvision, dropout": (IMAGES, {"model": "torchvision:mobilenet_v3_small"}),
    "hf image classifier": (
        IMAGES,
        {
            "model": "hf:vit",
            "options": {
                **TINY, "task": "image-classification", "intermediate_size": 16,
                "image_size": 32, "patch_size": 16,
            },
        },
    ),
    "hf text classifier": (
        TOKENS,
        {
            "model": "hf:bert",
            "options": {
                **TINY, "task": "sequence-classification", "intermediate_size": 16,
                "vocab_size": 64,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("teacher", TEACHERS)
def test_real_classes_are_tuned(teacher, tmp_path):
    data, spec = TEACHERS[teacher]
    student = {"model": "stillhouse:text_cnn" if data is TOKENS else "stillhouse:resnet8"}
    chosen = recipe(
        data=data,
        teacher=spec,
        student=student,
        settings={"tune_epochs": 1, "tune_batch": 8, "tune_lr": 1e-4, **EASY},
        budget={"steps": 1, "batch": 8, "lr": 0.001},
    )
    artifact, job = trained(chosen, tmp_path)
    assert stages(job) == ["before", "centroids", "tune", "meter", "student"]
    assert artifact.meta["mcmi"]["figures"]["cmi"] >= 0
    taught = artifact.attachments["teacher"]
    taught.save(tmp_path / "artifact")
    again = open_artifact(tmp_path / "artifact")
    assert same(plain_state(taught.module), plain_state(again.module))
