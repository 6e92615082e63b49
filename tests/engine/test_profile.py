"""Where a step's time goes, and what is advised."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse import launch
from stillhouse.engine import probe
from stillhouse.engine.profile import PHASES, StepProfile, advice, shares
from stillhouse.net import Net
from stillhouse.recipe import load_recipe


def figures(**ms: float) -> dict:
    found = {**dict.fromkeys(PHASES, 0.0), **{k.replace("_", " "): v for k, v in ms.items()}}
    return {"steps": 10, "ms": found, "step_ms": sum(found.values())}


def test_time_is_booked_where_it_was_said(monkeypatch):
    now = iter([1.0, 1.5, 3.5, 10.0, 10.25, 10.5])
    profile = StepProfile(torch.device("cpu"))
    monkeypatch.setattr(profile, "_now", lambda: next(now))
    for _ in range(3):  # these warm up
        profile.begin()
        profile.lap("data")
    profile.begin()
    profile.lap("data")
    profile.lap("teacher")
    profile.begin()
    profile.lap("data")
    profile.lap("teacher")
    found = profile.figures()
    assert found["steps"] == 2
    assert found["ms"]["data"] == pytest.approx((0.5 + 0.25) / 2 * 1e3)
    assert found["ms"]["teacher"] == pytest.approx((2.0 + 0.25) / 2 * 1e3)
    assert found["step_ms"] == pytest.approx(1500.0)


def test_the_largest_lever_is_named_first():
    told = advice(
        figures(data=2.0, teacher=6.0, student_forward=1.0, backward=1.0), store_saving=0.55
    )
    assert "store" in told[0]
    assert "55%" in told[0]
    assert "workers" in told[1]


def test_nothing_is_advised_where_nothing_stands_out():
    told = advice(figures(student_forward=4.0, backward=5.0, optimiser=1.0))
    assert told == ["nothing stands out: the step is the student's own forward and backward"]


def test_a_setting_that_lost_its_probe_is_not_advised():
    plain = figures(student_forward=4.0, backward=5.0)
    lost = advice(plain, layout={"ratio": 1.2}, compiled={"ratio": 1.0, "seconds": 20.0})
    won = advice(plain, layout={"ratio": 0.7}, compiled={"ratio": 0.5, "seconds": 20.0})
    assert len(lost) == 1
    assert "nothing" in lost[0]
    assert [("compile" in w, "channels_last" in w) for w in won] == [(True, False), (False, True)]


def test_shares_sum_to_one():
    assert sum(shares(figures(data=1.0, teacher=3.0)).values()) == pytest.approx(1.0)


def test_the_probe_leaves_the_net_alone():
    net = Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert probe.channels_last(net, torch.rand(2, 3, 8, 8))["ratio"] > 0
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert probe.channels_last(net, torch.rand(2, 8)) is None


class Slow(nn.Module):
    """Takes 4 ms for up to four rows and then 4 ms a row."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, x):
        assert torch.is_inference_mode_enabled()
        self.asked.append(len(x))
        time.sleep(0.004 * max(1, len(x) - 3))
        return {"logits": x}


def test_the_quickest_labelling_batch_is_found_and_advised():
    net = Net(Slow()).train()
    found = probe.labelling(net, torch.rand(16, 2), 1)
    assert found is not None
    assert found["batch"] == 4
    assert found["ratio"] < 0.5
    assert net.training
    assert set(net.module.asked) == {1, 2, 4}
    assert probe.labelling(net, torch.rand(2, 2), 8) is None
    plain = figures(student_forward=4.0, backward=5.0)
    assert any("teacher.store.batch=4" in told for told in advice(plain, labelling=found))
    assert "nothing" in advice(plain, labelling={"batch": 8, "ratio": 1.0})[0]


def kd(**more) -> dict:
    return {
        "method": "kd",
        "data": {"name": "generated", "options": {"kind": "vectors"}},
        "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
        "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
        "budget": {"steps": 12, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
        **more,
    }


def test_a_profiled_run_books_every_phase_and_changes_no_weight(tmp_path: Path):
    plain = launch.run(load_recipe(kd()), folder=tmp_path / "a", progress=False)
    timed = launch.run(load_recipe(kd()), folder=tmp_path / "b", progress=False, profiled=True)
    (found,) = timed.summary["profile"]
    assert plain.summary["profile"] == []
    assert found["stage"] == "student"
    assert found["steps"] == 9
    for phase in ("data", "teacher", "student forward", "backward", "optimiser", "log", "engine"):
        assert found["ms"][phase] > 0, phase
    assert found["advice"]
    one, other = (r.artifact.module.state_dict() for r in (plain, timed))
    assert all(torch.equal(one[k], other[k]) for k in one)
    saved = json.loads((tmp_path / "b" / "run.json").read_text())
    assert saved["profile"][0]["step_ms"] == found["step_ms"]


def test_channels_last_reaches_both_nets_and_changes_little(tmp_path: Path):
    images = {
        "data": {"name": "generated", "options": {"kind": "images"}},
        "teacher": {"model": "stillhouse:convnet", "options": {"width": 8}},
        "student": {"model": "stillhouse:convnet", "options": {"width": 4}},
    }
    plain = launch.run(load_recipe(kd(**images)), folder=tmp_path / "a", progress=False)
    laid = {"hardware": {"channels_last": True}}
    turned = launch.run(load_recipe(kd(**images, **laid)), folder=tmp_path / "b", progress=False)
    weights = [p for p in turned.artifact.module.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    one, other = (r.artifact.module.state_dict() for r in (plain, turned))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_nets_train_to_the_same_weights(tmp_path: Path):
    recipe = {"method": "dhkd", "settings": {}}
    plain = launch.run(load_recipe(kd(**recipe)), folder=tmp_path / "a", progress=False)
    laid = {"hardware": {"compile": True}}
    faster = launch.run(load_recipe(kd(**recipe, **laid)), folder=tmp_path / "b", progress=False)
    one, other = (r.artifact.module.state_dict() for r in (plain, faster))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=1e-4)
