"""A model with one way to call it: the modes it is lent in."""

from __future__ import annotations

import pytest
from torch import nn

from stillhouse.net import in_eval_mode


def test_every_part_gets_its_own_mode_back_also_where_something_failed() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    module[1].eval()  # frozen inside of a module that trains
    seen: list[bool] = []

    def fails() -> None:
        with in_eval_mode(module):
            seen.extend(part.training for part in module.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [False] * 3
    assert [part.training for part in (module, *module)] == [True, True, False]
