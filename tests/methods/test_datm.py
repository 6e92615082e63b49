from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.log import RunLog
from stillhouse.engine.step import Training
from stillhouse.errors import DataError, ModelError, RecipeError, TrainingError
from stillhouse.launch import open_job, run
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.methods.datasets.datm import averaged_labels, picked_correctly
from stillhouse.models.convnet import ConvNet
from stillhouse.opening import open_artifact
from stillhouse.parts.augment import DSA
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.schedule import constant, window
from stillhouse.parts.trajectory_matching import TrajectoryMatching
from stillhouse.parts.unroll import FlatNet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given as Handed
from stillhouse.recipe_models import open_method
from stillhouse.stages.set_distillation import distilled_of
from stillhouse.stages.trajectory_distillation import sgd

DATM: Any = catalogue.load("datm")
CLOSE = {"rtol": 1e-8, "atol": 1e-11}


def doubles(case):
    return {k: torch.from_numpy(v) if v.dtype.kind == "i" else torch.from_numpy(v).double()
            for k, v in case.items()}  # fmt: skip


class Given:
    """Trajectories of one expert whose weights are given."""

    fingerprint = "given"

    def __init__(self, net, *weights):
        self.net, self.weights, self.epochs = FlatNet(net), weights, len(weights) - 1

    def __len__(self):
        return 1

    def read(self, rows, views):
        return Batch(id=rows, draw=0)

    def segment(self, expert, start, span):
        return self.weights[start].clone(), self.weights[start + span].clone()


class Chunked(TrajectoryMatching):
    """Matching whose chunks are given, step by step."""

    given: Any = None

    def chunks(self, row, clock):
        return self.given[clock.step]


# ----------------------------------------------------------------------------- reference
def test_the_loss_of_soft_labels_is_the_released_one(golden):
    for slug in ("datm", "dd_common"):
        case = doubles(golden(slug).case("soft_ce"))
        z, labels = case["z"].requires_grad_(), case["label_logits"].requires_grad_()
        loss = soft_cross_entropy(z, labels, from_logits=True)
        loss.backward()
        torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(z.grad, case["grad_z"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(labels.grad, case["grad_label_logits"], rtol=1e-10, atol=1e-12)


def test_the_upper_bound_is_the_released_one(golden):
    for sequential, start, end, until, step, expected in golden("datm").case("window")["rows"]:
        settings = {"grow_from": start, "max_start": end, "grow_until": until}
        method = DATM(DATM.Config(sequential=bool(sequential), **settings))
        assert int(method.window(1).upper(Clock(step=int(step)))) == expected


def test_first_labels_are_the_released_ones(golden):
    case = doubles(golden("datm").case("label_init"))
    found = averaged_labels(case["expert_logits"], case["labels"])
    expected = case["labels_official"]
    right = case["correct"].sum(0) > 0
    torch.testing.assert_close(found[right], expected[right], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1:], case["labels_corrected_rows1plus"], **CLOSE)
    assert not torch.isfinite(expected[~right]).any()
    nobody = found[0]
    assert torch.isfinite(nobody).all()
    assert nobody.argmax() == case["labels"][0]
    others = torch.arange(3) != case["labels"][0]
    torch.testing.assert_close(nobody[others], case["plain_mean_row0"][others])


def test_the_selection_is_the_released_one(golden):
    case = golden("datm").case("select_correct")
    correct = torch.from_numpy(case["expert_logits"]).argmax(-1) == 1
    assert set(picked_correctly(correct, 5).tolist()) == set(case["picked"].tolist())
    assert picked_correctly(correct, 3).tolist() == case["by_expert0"].tolist()


def released(golden, name, lr, threshold, momenta=(0.5, 0.9, 0.5), rates=(20.0, 2.0, 1e-3)):
    """The engine's iterations on the stored case, one by one."""
    vectors = golden("datm")
    shared, case = doubles(vectors.case("unroll")), doubles(vectors.case(name))
    begin = torch.cat([shared[k].flatten() for k in sorted(shared) if k.startswith("start.")])
    start = DistilledSet(
        shared["images0"], torch.tensor([0, 0, 1, 1, 2, 2]), ("a", "b", "c"),
        label_logits=shared["label_logits0"], lr=lr,
    )  # fmt: skip
    net = ConvNet(3, 3, 8, width=4, depth=2).double()
    objective = Chunked(
        start, Given(net, begin, shared["target"]), span=1, steps=4, lowest=0, upper=constant(1),
        augment=DSA("none"), batch_syn=4, threshold=threshold,
    )  # fmt: skip
    iterations = sum(k.startswith("loss.") for k in case)
    objective.given = [[case[f"chunk.{q}.{n}"] for n in range(4)] for q in range(iterations)]
    optim = {
        name: sgd(rate, momentum)
        for name, rate, momentum in zip(
            ("pixels", "label_logits", "lr"), rates, momenta, strict=True
        )
    }
    grads = {}
    after = objective.after_backward

    def kept(terms, clock):
        grads.update({n: p.grad.clone() for n, p in objective.named_parameters()})
        return after(terms, clock)

    objective.after_backward = kept
    clock = Clock(total=iterations)
    training = Training(
        objective, objective.order, teacher=None, optim=optim, hardware=Hardware(),
        log=RunLog(None), stage="match", clock=clock, log_every=1,
    )  # fmt: skip
    for q in range(iterations):
        clock.step = q
        training(None, clock)
        yield q, case, objective, training, grads


def test_iterations_are_the_released_ones(golden):
    for q, case, objective, training, grads in released(golden, "unroll", 0.01, 1.5):
        assert training.last["match"] == pytest.approx(float(case[f"loss.{q}"]), rel=1e-8)
        torch.testing.assert_close(grads["pixels"], case[f"grad_images.{q}"], **CLOSE)
        torch.testing.assert_close(grads["label_logits"], case[f"grad_label_logits.{q}"], **CLOSE)
        torch.testing.assert_close(grads["lr"], case[f"grad_lr.{q}"], **CLOSE)
        torch.testing.assert_close(objective.pixels.detach(), case[f"images.{q}"], **CLOSE)
        torch.testing.assert_close(
            objective.label_logits.detach(), case[f"label_logits.{q}"], **CLOSE
        )
        torch.testing.assert_close(objective.lr.detach(), case[f"lr.{q}"], **CLOSE)
    assert q == 1


def test_a_skipped_iteration_changes_nothing(golden):
    for q, case, objective, training, grads in released(golden, "skip", 3.0, 1.0):
        assert training.last["match"] == pytest.approx(float(case[f"loss.{q}"]), rel=1e-8)
        torch.testing.assert_close(grads["lr"], case["grad_lr.0"], **CLOSE)
        torch.testing.assert_close(grads["label_logits"], case["grad_label_logits.0"], **CLOSE)
        start = objective.start
        assert torch.equal(objective.pixels.detach(), start.images)
        assert torch.equal(objective.label_logits.detach(), start.label_logits)
        assert float(objective.lr.detach()) == 3.0
        assert all(not g.optimizer.state for g in training.groups)
        assert (int(objective.seen), int(objective.skipped)) == (1, 1)


PRESETS = {
    "CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "TinyImageNet": "tiny",
}  # fmt: skip


def test_presets_are_the_released_configurations(golden):
    vectors = golden("datm")
    found = vectors.json["presets"]
    found = found.get("presets", found)
    vectors.count("presets")
    names = {
        "syn_steps": "inner_steps", "expert_epochs": "span", "min_start_epoch": "min_start",
        "current_max_start_epoch": "grow_from", "max_start_epoch": "max_start",
        "expansion_end_epoch": "grow_until", "Sequential_Generation": "sequential",
        "lr_img": "lr_img", "lr_y": "lr_y", "Momentum_y": "momentum_y", "lr_lr": "lr_lr",
        "lr_teacher": "lr_init", "batch_syn": "batch_syn", "threshold": "threshold",
        "batch_train": "judge_batch",
    }  # fmt: skip
    for key, preset in found.items():
        data, _, size = key.partition("/IPC")
        name = f"{PRESETS[data]}-ipc{size}"
        variant = DATM.variants["official" if name == "cifar10-ipc10" else name]
        config = DATM.Config(**variant.set)
        assert config.ipc == int(size)
        for theirs, ours in names.items():
            if preset[theirs] is not None:
                assert getattr(config, ours) == preset[theirs], (key, theirs)
        assert config.init == {"samples_predicted_correctly": "correct"}.get(
            preset["pix_init"], preset["pix_init"]
        )
        assert (config.space == "zca") == preset["zca"]
        assert variant.budget["steps"] == preset["Iteration"]
        assert DATM.Config().judge_epochs == 1000


def test_every_released_setting_is_a_variant():
    sizes = {"cifar10": (1, 50, 500, 1000), "cifar100": (1, 10, 50, 100), "tiny": (1, 10, 50)}
    for data, counts in sizes.items():
        for count in counts:
            DATM.Config(**DATM.variants[f"{data}-ipc{count}"].set)
    official = DATM.Config(**DATM.variants["official"].set)
    assert official.lr_least is None
    assert (official.experts, official.expert_epochs, official.expert_batch) == (100, 100, 256)


# ----------------------------------------------------------------------------- properties
def tiny(seed=0, soft=True, **settings):
    """Three classes of 8x8, two images each, one expert of three epochs, float64."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvNet(3, 3, 8, width=4, depth=1).double()
    flat = FlatNet(net).flatten(dict(net.named_parameters()))
    weights = [flat + 0.1 * t * torch.randn(flat.shape, generator=rng) for t in range(4)]
    start = DistilledSet(
        torch.randn(6, 3, 8, 8, generator=rng).double(), torch.tensor([0, 0, 1, 1, 2, 2]),
        ("a", "b", "c"), lr=settings.pop("lr", 0.05),
        label_logits=torch.randn(6, 3, generator=rng).double() if soft else None,
    )  # fmt: skip
    settings = {
        "span": 1, "steps": 3, "lowest": 0, "upper": constant(3), "augment": DSA(), "batch_syn": 4,
        **settings,
    }  # fmt: skip
    return TrajectoryMatching(start, Given(net, *weights), **settings)


def match(objective, step=0):
    objective.scratch = {}
    return objective.terms(Batch(id=torch.tensor([0])), None, Clock(step=step))["match"]


def test_upper_bound_of_the_sheet():
    upper = window(10, 20, 1000)
    steps = (0, 500, 999, 1000, 5000)
    assert [upper(Clock(step=s)) for s in steps] == [10, 15, 19, 20, 20]


def test_students_begin_inside_the_window_and_arrive_inside_the_trajectory():
    objective = tiny(span=1, lowest=1, upper=window(2, 3, 50))
    starts = []
    for step in range(120):
        batch = objective.prepare(Batch(id=torch.tensor([0])), Clock(step=step))
        (epoch,) = batch["epoch"].tolist()
        assert 1 <= epoch < (2 if step < 50 else 3)
        assert epoch + objective.span <= objective.trajectories.epochs
        begin, target = objective.trajectories.segment(0, epoch, 1)
        assert torch.equal(batch["begin"][0], begin)
        assert torch.equal(batch["target"][0], target)
        starts.append(epoch)
    assert set(starts[:50]) == {1}
    assert set(starts[50:]) == {1, 2}


def test_soft_labels_become_hard_and_vanish_where_the_student_agrees():
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 1, 4])
    large = 200.0 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(
        soft_cross_entropy(z, large, from_logits=True), F.cross_entropy(z, labels)
    )
    own = soft_cross_entropy(z, z.detach(), from_logits=True)
    own.backward()
    torch.testing.assert_close(own.detach(), torch.special.entr(z.softmax(1)).sum(1).mean())
    assert z.grad.abs().max() < 1e-12
    even = soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), from_logits=True)
    assert float(even) == pytest.approx(math.log(2))


def test_labels_are_the_mean_of_those_who_are_right():
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[4.0, 0.0]]])
    assert averaged_labels(logits, torch.tensor([0])).tolist() == [[3.0, 0.0]]
    nobody = averaged_labels(logits[:1], torch.tensor([1]))
    assert nobody.tolist() == [[2.0, 3.0]]


def test_the_walk_goes_on_with_the_next_expert_and_ends():
    flags = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    asked = []

    def lazily():
        for row in flags:
            asked.append(1)
            yield row

    assert picked_correctly(lazily(), 1).tolist() == [1]
    assert len(asked) == 1
    assert picked_correctly(flags, 2).tolist() == [0, 1]
    assert picked_correctly(flags, 3).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="4 real images; 5"):
        picked_correctly(flags, 5)


def test_a_rate_of_zero_gives_one_and_is_not_skipped():
    objective = tiny(lr=0.0, threshold=1.0)
    loss = match(objective)
    assert loss == 1
    assert objective.after_backward({"match": loss}, Clock())
    objective = tiny(lr=0.0, threshold=0.999)
    assert not objective.after_backward({"match": loss}, Clock())


@pytest.mark.parametrize("memory", ["whole", "constant"])
def test_gradient_reaches_pixels_labels_and_rate_only(memory):
    objective = tiny(memory=memory)
    match(objective).backward()
    for name in ("pixels", "label_logits", "lr"):
        assert getattr(objective, name).grad.abs().sum() > 0
    assert {n for n, _ in objective.named_parameters()} == {"pixels", "label_logits", "lr"}
    assert all(not w.requires_grad for w in objective.trajectories.weights)
    assert all(p.grad is None for p in objective.trajectories.net.net.parameters())


def test_constant_memory_is_exact_for_one_step_and_near_for_few():
    found = {}
    for steps in (1, 3):
        for memory in ("whole", "constant"):
            objective = tiny(memory=memory, steps=steps)
            loss = match(objective)
            loss.backward()
            found[steps, memory] = (
                loss.detach(), objective.pixels.grad, objective.label_logits.grad,
                objective.lr.grad,
            )  # fmt: skip
    for ours, theirs in zip(found[1, "constant"], found[1, "whole"], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found[3, "constant"][0], found[3, "whole"][0])
    for ours, theirs in zip(found[3, "constant"][1:3], found[3, "whole"][1:3], strict=True):
        assert not torch.allclose(ours, theirs, rtol=1e-6)
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.95


def test_hard_labels_leave_no_logits():
    objective = tiny(soft=False)
    match(objective).backward()
    assert {n for n, _ in objective.named_parameters()} == {"pixels", "lr"}
    assert objective.distilled().label_logits is None


def test_a_runaway_student_is_skipped_and_many_of_them_end_the_run():
    objective = tiny(lr=1e200, threshold=1.0)
    loss = match(objective)
    assert torch.isfinite(loss)
    for _ in range(99):
        assert not objective.after_backward({"match": loss}, Clock())
    with pytest.raises(TrainingError, match="100 of 100 iterations"):
        objective.after_backward({"match": loss}, Clock())
    free = tiny(lr=1e200)
    assert not torch.isfinite(match(free))


def test_the_rate_is_kept_above_its_least():
    objective = tiny(lr=0.05, lr_least=0.2)
    objective.after_step(Clock())
    assert objective.lr == 0.2
    assert int(objective.clamped) == 1
    assert objective.distilled().lr == pytest.approx(0.2)
    free = tiny(lr=0.05)
    free.after_step(Clock())
    assert float(free.lr.detach()) == pytest.approx(0.05)


def test_several_experts_in_a_step_are_averaged_and_drawn_apart():
    objective = tiny()
    clock = Clock()
    both = Batch(id=torch.tensor([0, 0]), rows=slice(0, 2), of=2)
    whole = objective.terms(both, None, clock)["match"]
    parts = [objective.terms(b, None, Clock())["match"] for b in both.split(2)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert parts[0] != parts[1]
    empty = Batch(id=torch.zeros(0, dtype=torch.int64), rows=slice(1, 1), of=1)
    assert objective.terms(empty, None, Clock()) == {}


def test_forward_twice_gives_the_same_and_other_steps_something_else():
    objective = tiny()
    assert torch.equal(match(objective), match(objective))
    assert not torch.equal(match(objective), match(objective, step=1))
    state = {k: v.clone() for k, v in objective.state_dict().items()}
    match(objective)
    assert all(torch.equal(state[k], v) for k, v in objective.state_dict().items())


# -------------------------------------------------------------------------------- runs
def example(**changes: Any) -> dict[str, Any]:
    found = DATM.example(0)
    found["settings"] = {**found["settings"], **changes.pop("settings", {})}
    return {**found, "compare": [], **changes}


def made(folder, **changes: Any) -> DistilledSet:
    recipe = load_recipe(example(**changes))
    return distilled_of(open_method(recipe).run(open_job(recipe, folder)))


def test_first_images_are_distinct_and_correct_by_an_expert(tmp_path):
    recipe = load_recipe(example(settings={"ipc": 3, "expert_lr": 0.1, "expert_epochs": 8}))
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    real, trajectories = method.opened(job)
    start = method.start_set(job, real, trajectories)
    right = torch.stack(
        [method._expert_logits(e, start.images).argmax(1) == start.labels for e in range(2)]
    )
    assert right.any(0).all()
    flat = start.images.flatten(1)
    assert len(torch.unique(flat, dim=0)) == 12
    assert torch.equal(start.label_logits.argmax(1), start.labels)
    pixels = torch.cat([real.take(rows) for rows in real.rows])
    assert all((pixels == image).flatten(1).all(1).any() for image in start.images)


def test_random_first_images_get_the_labels_of_the_first_expert(tmp_path):
    recipe = load_recipe(example(settings={"init": "real"}))
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    start = method.start_set(job, *method.opened(job))
    assert torch.equal(start.label_logits, method._expert_logits(0, start.images))


def test_matching_lowers_the_loss_and_moves_everything(tmp_path):
    recipe = load_recipe(
        example(
            settings={
                "lr_img": 5.0, "lr_y": 1.0, "lr_lr": 1e-4, "augment": "none", "inner_steps": 4,
                "sequential": False, "max_start": 1, "experts": 1, "ipc": 2, "threshold": None,
                "expert_lr": 0.05,
            },
            budget={"steps": 60}, output={"log_every": 1},
        )
    )  # fmt: skip
    job = open_job(recipe, tmp_path)
    found = distilled_of(open_method(recipe).run(job))
    job.log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if x["event"] == "step" and x["stage"] == "match"]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert found.lr != 0.01
    start = made(tmp_path / "start", settings={"matching": False, "ipc": 2, "experts": 1})
    assert not torch.equal(found.label_logits, start.label_logits)


def test_without_matching_the_start_is_the_result(tmp_path):
    found = made(tmp_path, settings={"matching": False})
    assert found.lr == 0.01
    assert "iterations" not in found.provenance
    assert not (tmp_path / "stages" / "match").exists()


def test_the_artifact_reopens_with_labels_rate_and_experts(tmp_path):
    result = run(load_recipe(example()), folder=tmp_path / "run", progress=False)
    found = distilled_of(open_artifact(tmp_path / "run"))
    assert torch.equal(found.images, distilled_of(result.artifact).images)
    assert found.label_logits.shape == (4, 4)
    assert found.lr > 0
    assert type(found.preprocessing).__name__ == "ZCA"
    experts = found.provenance["experts"]
    assert (experts["count"], experts["epochs"]) == (2, 3)
    assert experts["bytes"] > 0
    assert experts["seconds"] > 0
    assert len(experts["steps"]) == 3
    assert len(experts["accuracy"]) == 4
    figures = result.sides["distilled"]["0"]
    wanted = {
        "accuracy", "accuracy_hard", "random_real", "lrs", "expert_accuracy", "expert_bytes",
        "student_lr", "skipped", "label_entropy", "label_agreement",
    }  # fmt: skip
    assert wanted <= set(figures)
    told = (tmp_path / "run" / "report.html").read_text()
    assert "What the experts cost" in told
    assert "The experts, mean by epoch" in told


def test_experts_are_shared_between_runs_and_with_other_windows(tmp_path):
    recipes = [
        load_recipe(example()), load_recipe(example(settings={"labels": "hard", "ipc": 2})),
    ]  # fmt: skip
    stamps = []
    for number, recipe in enumerate(recipes):
        job = open_job(recipe, tmp_path / str(number))
        method = open_method(recipe)
        _, trajectories = method.opened(job)
        stamps.append([f.stat().st_mtime_ns for files in trajectories.files for f in files])
    assert stamps[0] == stamps[1]
    plain = load_recipe(example(settings={"rho": 0.0}))
    _, other = open_method(plain).opened(open_job(plain, tmp_path / "plain"))
    assert other.files != trajectories.files


def test_experts_that_exist_are_read_from_their_folder(tmp_path):
    recipe = load_recipe(example())
    method = open_method(recipe)
    _, trajectories = method.opened(open_job(recipe, tmp_path / "a"))
    folder = tmp_path / "mine"
    for number, files in enumerate(trajectories.files):
        for file in files:
            place = folder / f"expert-{number}" / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    job = open_job(load_recipe(example(settings={"experts_from": str(folder)})), tmp_path / "b")
    found = distilled_of(open_method(job.recipe).run(job))
    assert torch.equal(found.images, made(tmp_path / "c").images)
    assert not [s for s in job.stages if s["name"].startswith("experts/")]
    with pytest.raises(DataError, match="no experts"):
        made(tmp_path / "d", settings={"experts_from": str(tmp_path / "nowhere")})
    with pytest.raises(RecipeError, match="max_start may be 3 at most"):
        made(tmp_path / "e", settings={"experts_from": str(folder), "max_start": 5})


def test_the_window_is_chosen_on_validation_data(tmp_path):
    windows = [[0, 1], [1, 2], [2, 3]]
    found = made(
        tmp_path,
        settings={
            "window": "auto", "windows": windows, "scan_steps": 2, "scan_nets": 1,
            "sequential": False,
        },
    )  # fmt: skip
    table = found.provenance["windows"]
    assert [row["window"] for row in table] == windows
    assert all(row["step"] > 0 for row in table)
    best = max(table, key=lambda row: row["measure"])["window"]
    assert found.provenance["chosen"] == best


def test_evaluations_in_between_are_on_validation_data(tmp_path):
    budget = {"steps": 4, "validate_every": 2}
    recipe = load_recipe(example(budget=budget))
    job = open_job(recipe, tmp_path)
    open_method(recipe).run(job)
    job.log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [x for x in lines if x["event"] == "validation" and x["stage"] == "match"]
    assert [x["step"] for x in found] == [2, 4]


def test_bad_settings_are_told_before_anything_runs(tmp_path):
    for settings, told in (
        ({"grow_from": 0}, "grow_from"),
        ({"min_start": 2, "grow_from": 2}, "must exceed min_start"),
        ({"max_start": 4}, "max_start may be 3 at most"),
        ({"windows": [[3, 1]]}, "pairs"),
        ({"labels": "sofd"}, "labels"),
    ):
        with pytest.raises(RecipeError, match=told):
            open_method(load_recipe(example(settings=settings)))
    with pytest.raises(RecipeError, match=r"budget\.ema"):
        made(tmp_path / "a", budget={"steps": 2, "ema": 0.9})
    with pytest.raises(RecipeError, match="add student"):
        made(tmp_path / "b", student=None)
    batch = {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 1, "norm": "batch"}}
    with pytest.raises(ModelError, match="running statistics"):
        made(tmp_path / "c", student=batch)
    with pytest.raises(DataError, match="per class"):
        made(tmp_path / "d", settings={"ipc": 500})


def resnet_with_group_norm(classes: int):
    """torchvision's ResNet with group norm in place of its running statistics."""
    from torchvision.models.resnet import BasicBlock, ResNet

    def norm(width):
        return torch.nn.GroupNorm(4, width)

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes, norm_layer=norm)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("given", {}),
        ("timm:convnext_atto", {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}),
        (
            "timm:vit_tiny_patch16_224",
            {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        ),
    ],
)
def test_networks_of_other_libraries_can_be_matched_on(model, options, tmp_path):
    pytest.importorskip("torchvision" if model == "given" else "timm")
    given = Handed(student=resnet_with_group_norm(4)) if model == "given" else None
    recipe = load_recipe(
        example(
            data={
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 32, 32], "rows": 16},
            },
            student={"model": model, "options": options},
            settings={
                "space": "mean_std",
                "experts": 1,
                "max_start": 2,
                "expert_epochs": 2,
                "sequential": False,
                "expert_store": "float16",
                "threshold": None,
            },
            budget={"steps": 1},
        )
    )
    found = distilled_of(open_method(recipe).run(open_job(recipe, tmp_path, given=given)))
    assert found.images.shape == (4, 3, 32, 32)
    assert torch.isfinite(found.images).all()


@pytest.mark.slow
def test_two_processes_equal_one(one_and_two_processes):
    """Experts are trained, and matched, by both; the result is one's."""
    found = one_and_two_processes("datm")
    for name in ("images", "label_logits", "lr"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-5)
    for name in ("accuracy", "skipped"):
        assert found[0][name] == found[1][name]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            example(
                budget={"steps": 120},
                settings={"ipc": 2, "expert_epochs": 30, "judge_epochs": 20, "judge_nets": 2},
                output={"checkpoint_minutes": 0.0, "log_every": 5},
            )
        )
    )

    def begin(folder):
        command = [sys.executable, "-m", "stillhouse", "run", str(recipe), "--folder", str(folder)]
        # Each run has its own cache: experts must be killed and resumed too.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "STILLHOUSE_CACHE": f"{folder}-cache"}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(process):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()[-3000:]

    finish(begin(tmp_path / "whole"))
    rng, kills = random.Random(1), 0
    folder = tmp_path / "killed"
    deadline = time.monotonic() + 150
    while kills < 4 and time.monotonic() < deadline:
        process = begin(folder)
        # First in an expert, then in the matching.
        place, pattern = (
            (tmp_path / "killed-cache" / "shared", "*/step-*")
            if kills < 2
            else (folder / "stages" / "match", "step-*")
        )
        while process.poll() is None and not list(place.glob(pattern)):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.05, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if (folder / "run.json").exists():
            break
    finish(begin(folder))
    assert kills
    whole, killed = (distilled_of(open_artifact(tmp_path / n)) for n in ("whole", "killed"))
    assert torch.equal(whole.images, killed.images)
    assert torch.equal(whole.label_logits, killed.label_logits)
    assert whole.lr == killed.lr
    figures = [
        json.loads((tmp_path / n / "side.json").read_text())["figures"] for n in ("whole", "killed")
    ]
    for name in ("accuracy", "random_real", "full_data", "expert_accuracy"):
        assert figures[0][name] == figures[1][name]
