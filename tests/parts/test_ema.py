"""Averages of networks: when they move, what of them, and that they are saved."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.objective import Objective
from stillhouse.parts.ema import EMA, average_into


def net(value: float = 0.0) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def filled(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def test_two_epochs_from_nothing_to_one():
    source = net(0.0)
    average = EMA(source, 0.75, when="epoch")
    filled(source, 1.0)
    source[1].num_batches_tracked += 7
    for wanted in (0.25, 0.4375):
        average.after_step(Clock(ends_epoch=True))
        assert all(torch.all(p == wanted) for p in average.module.parameters())
    assert average.module[1].num_batches_tracked == 7


@pytest.mark.parametrize(
    ("when", "moves"), [("before", (1, 0, 0)), ("step", (0, 1, 1)), ("epoch", (0, 0, 1))]
)
def test_it_moves_when_it_is_told(when, moves):
    source = net(0.0)
    average = EMA(source, 0.0, when=when)
    for value, (hook, ends), moved in zip(
        (1.0, 2.0, 3.0),
        (("before_step", False), ("after_step", False), ("after_step", True)),
        moves,
        strict=True,
    ):
        before = average.module[0].bias.clone()
        filled(source, value)
        getattr(average, hook)(Clock(ends_epoch=ends))
        assert torch.equal(average.module[0].bias, before) != bool(moved)


def test_a_decay_of_one_keeps_and_of_nothing_copies():
    source = net(0.0)
    kept, copied = EMA(source, 1.0), EMA(source, 0.0)
    filled(source, 5.0)
    for average in (kept, copied):
        average.after_step(Clock())
    assert kept.module[0].weight.eq(0).all()
    assert copied.module[0].weight.eq(5).all()


def test_a_schedule_gives_the_decay():
    source = net(0.0)
    average = EMA(source, lambda clock: 1 - 0.5 * math.cos(math.pi * clock.progress))
    filled(source, 1.0)
    average.after_step(Clock(step=0, total=10))
    assert average.module[0].weight.eq(0.5).all()
    average.after_step(Clock(step=5, total=10))  # cos(pi / 2): nothing moves
    torch.testing.assert_close(average.module[0].weight, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(("rule", "mean"), [("mean", 0.5), ("copy", 2.0), ("keep", 0.0)])
def test_running_statistics_by_rule(rule, mean):
    source = net(0.0)
    average = EMA(source, 0.75, buffers=rule)
    source[1].running_mean.fill_(2.0)
    source[1].num_batches_tracked.fill_(9)
    average.after_step(Clock())
    assert average.module[1].running_mean.eq(mean).all()
    assert average.module[1].num_batches_tracked == (0 if rule == "keep" else 9)


def test_it_is_saved_with_the_objective_and_learns_nothing():
    class Own(Objective):
        def __init__(self) -> None:
            super().__init__(net(1.0))
            self.average = EMA(self.student, 0.9)

    objective = Own().train()
    assert not objective.average.module.training  # eval mode stays
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    assert trainable == {n for n in trainable if n.startswith("student.")}
    names = objective.state_dict()
    assert "average.module.0.weight" in names
    assert not any("_source" in name for name in names)
    other = copy.deepcopy(objective)
    filled(other.student, 3.0)
    other.average.update()
    # a copy follows its own student, not the original's
    torch.testing.assert_close(other.average.module[0].weight, torch.full((2, 3), 1.2))
    assert objective.average.module[0].weight.eq(1).all()
    objective.load_state_dict(other.state_dict())
    assert objective.average.module[0].weight.allclose(other.average.module[0].weight)


def test_some_parts_of_a_model_alone():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    average = EMA(nn.ModuleDict({"a": model["a"]}), 0.0, when="before")
    filled(model, 4.0)
    average.before_step(Clock())
    assert average.module["a"].weight.eq(4).all()
    assert "b" not in average.module


def test_what_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"\[0, 1\], not 1.5"):
        EMA(net(), 1.5)
    with pytest.raises(ModelError, match="epoch, not 'daily'"):
        EMA(net(), 0.5, when="daily")
    with pytest.raises(ModelError, match=r"\(2,\), its source \(3,\)"):
        average_into({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, 0.5)
    with pytest.raises(ModelError, match="differ in 'a'"):
        average_into({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, 0.5)
