from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.parts.plateau import Plateau


def test_it_follows_the_rule_of_torch():
    plateau = Plateau(0.5, patience=2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torchs = ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    rng = torch.Generator().manual_seed(0)
    figures = (torch.rand(60, generator=rng) + torch.linspace(1.0, 0.2, 60)).tolist()
    for figure in [*figures, 0.1, 0.1 * (1 - 1e-5), 0.05]:
        plateau.see(figure)
        torchs.step(figure)
        assert plateau(Clock()) == optimizer.param_groups[0]["lr"]
    assert plateau(Clock()) < 0.1


def test_its_state_is_saved():
    first, second = Plateau(0.5, 1), Plateau(0.5, 1)
    for figure in (1.0, 1.0):
        first.see(figure)
    second.load_state_dict(first.state_dict())
    for figure in (1.0, 1.0, 0.5):
        first.see(figure)
        second.see(figure)
        assert first(Clock()) == second(Clock())
    assert first(Clock()) == 0.5


def test_settings_out_of_range_are_told():
    for factor, patience in ((1.0, 1), (0.0, 1), (0.5, -1)):
        with pytest.raises(RecipeError, match="plateau"):
            Plateau(factor, patience)
