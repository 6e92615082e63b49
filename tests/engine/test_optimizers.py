"""The optimisers that a budget names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stillhouse.engine import fitting
from stillhouse.engine.fitting import optimizer_of


def budget(optimizer: str) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=optimizer, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=False
    )


def moved(optimizer: str) -> tuple[torch.Tensor, bool]:
    parameter = nn.Parameter(torch.linspace(-1, 1, 64))
    made = optimizer_of(budget(optimizer))(iter([parameter]))
    for step in range(5):
        parameter.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        made.step()
    return parameter.detach(), bool(made.param_groups[0].get("fused"))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_large_models_move_as_small_ones_in_one_pass(optimizer, monkeypatch):
    small, fused = moved(optimizer)
    assert not fused
    monkeypatch.setattr(fitting, "_FUSED_FROM", 64)
    large, fused = moved(optimizer)
    assert fused
    assert torch.allclose(small, large, atol=1e-6)


def test_other_numbers_than_plain_float32_are_never_fused(monkeypatch):
    monkeypatch.setattr(fitting, "_FUSED_FROM", 1)
    for parameter in (nn.Parameter(torch.ones(4).double()), nn.Parameter(torch.ones(4).half())):
        assert not optimizer_of(budget("adamw"))([parameter]).param_groups[0].get("fused")
