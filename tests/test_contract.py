"""What holds for every entry of the catalogue, shown on its own smallest example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import catalogue
from stillhouse.artifact import Artifact, plain_state
from stillhouse.batch import read_block
from stillhouse.clock import Views
from stillhouse.engine.loop import Stage
from stillhouse.engine.step import Training
from stillhouse.errors import Interrupted, StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.method import StudentTraining
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge

ENTRIES = sorted(catalogue.entries())
TRAININGS = [e for e in ENTRIES if issubclass(catalogue.load(e), StudentTraining)]


def example(entry: str, **changes: Any):
    return load_recipe({**catalogue.load(entry).example(0), "compare": [], **changes})


def content(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All tensors of an artifact, attachments included."""
    found = dict(artifact.tensors)
    if artifact.predictor is not None:
        found.update(plain_state(artifact.predictor.module))
    for name, attached in artifact.attachments.items():
        found.update({f"{name}/{k}": v for k, v in content(attached).items()})
    return {k: v.clone() for k, v in found.items()}


def execute(entry: str, folder: Path):
    recipe = example(entry)
    job = open_job(recipe, folder)
    method = open_method(recipe)
    try:
        return job, method.run(job)
    finally:
        job.log.close()


def opened(entry: str, folder: Path):
    """A training's job, objective, teacher and a batch."""
    recipe = example(entry)
    job = open_job(recipe, folder)
    method = open_method(recipe)
    teacher = job.teacher() if method.wants_teacher() else None
    objective = method.objective(job, job.student(), teacher)
    if teacher is not None:
        teacher.bind(objective.wants, job.task)
    order = method.order(job)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))[0]
    batch = read_block(order, rows, Views(0))
    return job, objective, teacher, batch


def known(teacher, batch):
    return Knowledge.none if teacher is None else teacher.knowledge(batch)


@pytest.mark.parametrize("entry", ENTRIES)
def test_runs_from_its_example_and_reopens(entry, tmp_path):
    result = run(example(entry), folder=tmp_path / "run", progress=False)
    assert result.sides
    reopened = open_artifact(tmp_path / "run")
    before, after = content(result.artifact), content(reopened)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("entry", ENTRIES)
def test_stages_are_those_of_the_card(entry, tmp_path):
    job, _ = execute(entry, tmp_path)
    card = {name.rstrip("?"): (kind, name.endswith("?")) for name, kind in
            catalogue.load(entry).card.stages}  # fmt: skip
    ran = {}
    for stage in job.stages:
        ran.setdefault(stage["name"].split("/")[0], stage["kind"])
    for name in ran:
        assert name in card, f"the stage '{name}' ran and is not on the card"
    for name, (_, optional) in card.items():
        if not optional and card[name][0] != "judge":
            assert name in ran, f"the card's stage '{name}' did not run"


@pytest.mark.parametrize("entry", ENTRIES)
def test_stopped_anywhere_it_ends_the_same(entry, tmp_path, monkeypatch):
    _, whole = execute(entry, tmp_path / "whole")
    expected = content(whole)
    for stop_at in (1, 3, 6):
        folder = tmp_path / f"cut{stop_at}"
        calls = {"n": 0}
        due = Stage.due

        def ask(self, now, calls=calls, stop_at=stop_at, due=due):
            calls["n"] += 1
            if calls["n"] == stop_at:
                self.stop.asked = 15
            return due(self, now)

        monkeypatch.setattr(Stage, "due", ask)
        stopped = False
        try:
            execute(entry, folder)
        except Interrupted:
            stopped = True
        monkeypatch.setattr(Stage, "due", due)
        if stopped:
            _, again = execute(entry, folder)
            found = content(again)
            assert found.keys() == expected.keys()
            assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("entry", TRAININGS)
def test_terms_are_named_finite_scalars_and_forward_changes_no_state(entry, tmp_path):
    job, objective, teacher, batch = opened(entry, tmp_path)
    objective.eval()
    clock = job.clock("x")
    state = {k: v.clone() for k, v in objective.state_dict().items()}
    with torch.no_grad():
        batch = objective.prepare(batch, clock)
    first = objective(batch, known(teacher, batch), clock)
    second = objective(batch, known(teacher, batch), clock)
    assert first
    for name, value in first.items():
        assert value.ndim == 0
        assert torch.isfinite(value)
        assert torch.equal(value, second[name])
    assert all(torch.equal(state[k], v) for k, v in objective.state_dict().items())


@pytest.mark.parametrize("entry", TRAININGS)
def test_gradient_reaches_the_trainable_parameters_and_no_teacher(entry, tmp_path):
    _, objective, teacher, batch = opened(entry, tmp_path)
    objective.train()
    sum(objective.terms(batch, teacher).values()).backward()
    reached = {n for n, p in objective.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in objective.named_parameters() if p.requires_grad}
    if teacher is not None and "weights" in teacher.provides:
        assert all(p.grad is None for p in teacher.guest().module.parameters())


@pytest.mark.parametrize("entry", TRAININGS)
def test_teacher_stays_and_is_not_in_the_state(entry, tmp_path):
    job, objective, teacher, _ = opened(entry, tmp_path)
    order = open_method(job.recipe).order(job)
    if teacher is None:
        pytest.skip("this entry has no teacher")
    module = teacher.guest().module
    before = {k: v.clone() for k, v in module.state_dict().items()}
    own = sum(p.numel() for p in objective.parameters())
    job.fit("student", objective, order, teacher=teacher)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    held = {id(p) for p in objective.parameters()}
    assert not held & {id(p) for p in module.parameters()}
    assert own == sum(p.numel() for p in objective.parameters())


@pytest.mark.parametrize("entry", TRAININGS)
def test_state_round_trips(entry, tmp_path):
    job, objective, _, _ = opened(entry, tmp_path)
    training = Training(
        objective, job.order("train"), teacher=None, hardware=job.hardware, log=job.log,
        stage="x", clock=job.clock("x"), optim=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    state = training.state_dict()
    training.load_state_dict(state)
    again = training.state_dict()
    before, after = state["objective"], again["objective"]
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("entry", TRAININGS)
def test_a_student_that_does_not_fit_is_told_before_training(entry, tmp_path):
    spec = catalogue.load(entry).example(0)
    spec["student"] = {"model": "torch.nn:Linear", "options": {"in_features": 3, "out_features": 2}}
    with pytest.raises(StillhouseError):
        run(load_recipe({**spec, "compare": []}), folder=tmp_path, progress=False)
    assert not list((tmp_path / "stages").rglob("step-*")) if (tmp_path / "stages").exists() else 1
