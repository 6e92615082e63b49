"""InfoNCE between modalities, and the encoder that was never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillhouse.artifact import plain_state
from stillhouse.baselines.infonce import InfoNCE, InfoNCEObjective
from stillhouse.baselines.random_encoder import RandomEncoder
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import DataError, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.contrastive import infonce
from stillhouse.net import Net
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge


def recipe(**changes: Any):
    return load_recipe({**InfoNCE.example(0), "compare": [], **changes})


@pytest.mark.parametrize("symmetric", [False, True])
def test_its_loss_is_that_of_the_pairs(symmetric):
    student = Net(nn.Identity(), answer="embedding")
    objective = InfoNCEObjective(student, nn.Identity(), InfoNCE.Config(symmetric=symmetric))
    ours, theirs = torch.randn(6, 4), torch.randn(6, 4)
    found = objective(Batch(x=ours), Knowledge({"embedding": theirs}), Clock())["contrast"]
    assert found == infonce(ours, theirs, temperature=0.1, symmetric=symmetric)


def test_the_head_leaves_and_is_as_wide_as_the_teacher(tmp_path):
    job = open_job(recipe(), tmp_path)
    method = open_method(recipe())
    objective = method.objective(job, job.student(), job.teacher())
    assert objective.head.net.weight.shape == (12, 12)
    exported = objective.export()
    assert not any("head" in name for name, _ in exported.named_parameters())


def test_a_batch_is_not_cut(tmp_path):
    chosen = recipe(budget={"steps": 2, "batch": 16, "lr": 0.01, "accumulate": 2})
    job = open_job(chosen, tmp_path)
    with pytest.raises(RecipeError, match="whole batch"):
        open_method(chosen).run(job)


def test_pairs_are_learned(tmp_path):
    chosen = recipe(budget={"epochs": 40, "batch": 16, "lr": 0.01}, output={"log_every": 1})
    job = open_job(chosen, tmp_path)
    open_method(chosen).run(job)
    job.log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_the_untrained_encoder_is_the_student_of_the_seed(tmp_path):
    spec = {**RandomEncoder.example(0), "compare": []}
    job = open_job(load_recipe(spec), tmp_path / "a")
    found = plain_state(open_method(job.recipe).run(job).module)
    start = plain_state(job.student())
    assert all(torch.equal(found[k], start[k]) for k in start)
    result = run(load_recipe(spec), folder=tmp_path / "run", progress=False)
    assert result.sides["distilled"]["0"]["seconds"] < 5
    assert not list(Path(tmp_path / "run" / "stages").glob("student*"))


@pytest.mark.parametrize("labels", [0, 4])
def test_an_encoder_with_and_without_a_head_has_a_supervised_side(labels, tmp_path):
    spec = RandomEncoder.example(0)
    spec["method"], spec["task"] = "supervised", "representation"
    spec["student"]["options"]["labels"] = labels
    spec["budget"] = {"epochs": 10, "batch": 16, "lr": 0.01}
    spec["output"] = {"log_every": 4}
    result = run(load_recipe({**spec, "compare": []}), folder=tmp_path / "s", progress=False)
    assert result.sides["distilled"]["0"]["accuracy"] > 0.8
    lines = (tmp_path / "s" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"step"' in line and '"loss"' in line]
    assert losses[-1] < losses[0]


def test_rows_without_labels_cannot_be_supervised(tmp_path):
    job = open_job(load_recipe({**RandomEncoder.example(0), "compare": []}), tmp_path)
    with pytest.raises(DataError, match="no labels"):
        job.task.loss({"embedding": torch.zeros(2, 3)}, Batch(x=torch.zeros(2, 3)))
    one = job.task.loss(
        {"embedding": torch.ones(1, 3, requires_grad=True)},
        Batch(x=torch.zeros(1, 3), target=torch.tensor([1])),
    )
    assert one["task"] == 0
