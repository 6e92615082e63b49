from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD

from stillhouse.batch import TensorSource
from stillhouse.engine.loop import Stage
from stillhouse.errors import CheckpointError, Interrupted, ModelError
from stillhouse.launch import open_job
from stillhouse.parts.gradient import Sharpness
from stillhouse.parts.unroll import FlatNet
from stillhouse.recipe import load_recipe
from stillhouse.stages.experts import (
    ExpertTraining,
    Training,
    expert_accuracies,
    open_trajectories,
    train_experts,
    training_rows,
)
from stillhouse.stages.initial_set import RealImages
from stillhouse.stages.judge_distilled_set import Protocol
from stillhouse.stages.trajectory_distillation import expert_net, sgd


def opened(folder, norm="instance", **changes: Any):
    recipe = load_recipe(
        {
            "method": "random-real",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {
                "model": "stillhouse:convnet",
                "options": {"width": 4, "depth": 1, "norm": norm},
            },
            "settings": {"ipc": 1},
            **changes,
        }
    )
    return open_job(recipe, folder)


def trained(job, training, share=None, store="float32"):
    real = RealImages(job.splits["train"], 4, None)
    rows, rest = training_rows(job, real)
    return train_experts(
        job,
        lambda number: expert_net(job, number),
        rows,
        lambda net, first: ExpertTraining(net, Protocol(), rest, store),
        training,
        share,
    )


def read(job, files):
    return open_trajectories(files, FlatNet(expert_net(job, 0)))


def every(found):
    return torch.stack([found.at(e, t) for e in range(len(found)) for t in range(found.epochs + 1)])


TWO = Training(2, [(3, sgd(0.05, 0.0))], batch=8)


def test_snapshots_begin_at_the_start_and_differ(tmp_path):
    job = opened(tmp_path)
    found = read(job, trained(job, TWO))
    assert (len(found), found.epochs) == (2, 3)
    fresh = dict(expert_net(job, 1).module.named_parameters())
    assert torch.equal(found.at(1, 0), found.net.flatten(fresh))
    ends = every(found)
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])


def test_shared_experts_are_trained_once_and_one_more_is_added(tmp_path):
    first = opened(tmp_path / "a")
    made = trained(first, TWO, share={"x": 1})
    assert all("shared" in str(path) for files in made for path in files)
    second = opened(tmp_path / "b")
    again = trained(second, Training(3, TWO.phases, batch=8), share={"x": 1})
    assert again[:2] == made
    assert len(again) == 3
    names = [s["name"] for s in second.stages]
    assert names == ["experts/expert-0", "experts/expert-1", "experts/expert-2"]
    other = trained(opened(tmp_path / "c"), TWO, share={"x": 2})
    assert other[0] != made[0]
    made[0][1].unlink()
    with pytest.raises(CheckpointError, match="was removed"):
        trained(opened(tmp_path / "d"), TWO, share={"x": 1})


@pytest.mark.parametrize("share", [None, {"shared": True}])
def test_stopped_in_the_second_expert_it_ends_the_same(tmp_path, monkeypatch, share):
    training = Training(2, [(3, sgd(0.05, 0.0))], batch=8, gradient=Sharpness())
    job = opened(tmp_path / "whole")
    whole = every(read(job, trained(job, training)))
    calls = {"n": 0}
    due = Stage.due

    def ask(self, now):
        calls["n"] += 1
        if calls["n"] == 17:
            self.stop.asked = 15
        return due(self, now)

    monkeypatch.setattr(Stage, "due", ask)
    with pytest.raises(Interrupted, match="experts/expert-1"):
        trained(opened(tmp_path / "cut"), training, share)
    monkeypatch.setattr(Stage, "due", due)
    job = opened(tmp_path / "cut")
    found = every(read(job, trained(job, training, share)))
    assert torch.equal(whole, found)


def test_parts_of_a_training_make_one_trajectory(tmp_path):
    phases = [(2, sgd(0.05, 0.9)), (1, sgd(0.03, 0.9))]
    seen = []

    def objective(net, first):
        seen.append(first)
        return ExpertTraining(net, Protocol())

    job = opened(tmp_path)
    rows = TensorSource({"x": torch.rand(16, 3, 8, 8), "target": torch.arange(16) % 4})
    files = train_experts(
        job, lambda n: expert_net(job, n), rows, objective, Training(1, phases, batch=8), None
    )
    found = read(job, files)
    assert found.epochs == 3
    assert seen == [0, 2]
    assert not torch.equal(found.at(0, 2), found.at(0, 3))


def test_half_precision_snapshots_of_the_same_training(tmp_path):
    job, other = opened(tmp_path / "a"), opened(tmp_path / "b")
    whole, half = read(job, trained(job, TWO)), read(other, trained(other, TWO, store="float16"))
    torch.testing.assert_close(half.at(1, 3), whole.at(1, 3), rtol=1e-3, atol=1e-4)
    assert torch.equal(half.at(1, 3), whole.at(1, 3).half().float())
    assert half.bytes < whole.bytes


def test_flat_experts_move_elsewhere(tmp_path):
    job, other = opened(tmp_path / "a"), opened(tmp_path / "b")
    flat = Training(2, TWO.phases, batch=8, gradient=Sharpness(0.1))
    plain, found = read(job, trained(job, TWO)), read(other, trained(other, flat))
    assert torch.equal(plain.at(0, 0), found.at(0, 0))
    assert not torch.allclose(plain.at(0, 3), found.at(0, 3), atol=1e-5)


def test_accuracy_is_that_of_the_snapshot(tmp_path):
    job = opened(tmp_path)
    found = read(job, trained(job, Training(1, [(8, lambda p: SGD(p, lr=0.1))], batch=4)))
    net = expert_net(job, 0)
    first, last = expert_accuracies(job, net, found, None, "train", [0, 8])[0]
    weights = found.net.named(found.at(0, 8))
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    assert last == job.evaluate(net, "train")["accuracy"]
    assert last > first


def test_networks_with_running_statistics_are_refused_before_training(tmp_path):
    job = opened(tmp_path, norm="batch")
    with pytest.raises(ModelError, match="running statistics"):
        trained(job, TWO)
    assert not (tmp_path / "stages").exists()
