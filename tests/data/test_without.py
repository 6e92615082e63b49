"""Orders that leave rows out in some epochs."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Shuffled, TensorSource, Without
from stillhouse.clock import Views, generator
from stillhouse.engine.fitting import steps_of
from stillhouse.errors import DataError

SOURCE = TensorSource({"x": torch.arange(50.0)[:, None]}, ids=torch.arange(100, 150))
HELD = torch.tensor([3, 7, 8, 20, 21, 40, 48, 49])


def rows_of(order, epoch):
    return order.epoch(epoch, lambda: generator("order", epoch))


@pytest.mark.parametrize("drop_last", [False, True])
def test_they_wait_in_their_epochs_and_are_read_in_the_others(drop_last):
    order = Without(Shuffled(SOURCE, 7, drop_last=drop_last), {0: HELD, 2: HELD[:1]})
    for epoch, left_out in ((0, HELD), (1, HELD[:0]), (2, HELD[:1]), (3, HELD[:0])):
        steps = rows_of(order, epoch)
        seen = torch.cat(list(steps))
        assert len(seen.unique()) == len(seen)
        assert not torch.isin(seen, left_out).any()
        if not drop_last:
            assert len(seen) == 50 - len(left_out)
        assert all(len(rows) == 7 for rows in steps[:-1])


def test_its_steps_are_counted_epoch_by_epoch():
    order = Without(Shuffled(SOURCE, 7), {0: HELD})
    assert len(rows_of(order, 0)) == 6
    assert len(rows_of(order, 1)) == len(order) == 8
    assert order.steps_in(1) == 6
    assert order.steps_in(4) == 6 + 3 * 8
    assert order.steps_in(0.5) == 3
    assert order.steps_in(1.5) == 6 + 4
    assert steps_of(order, None, 4, None) == 30
    assert steps_of(Shuffled(SOURCE, 7), None, 4, None) == 32


def test_it_reads_the_rows_it_names():
    order = Without(Shuffled(SOURCE, 7), {0: HELD})
    rows = rows_of(order, 0)[2]
    batch = order.read(rows, Views(0))
    assert torch.equal(batch["id"], rows + 100)
    assert torch.equal(batch["x"][:, 0], rows.float())


def test_an_epoch_is_a_function_of_its_number():
    order = Without(Shuffled(SOURCE, 7), {0: HELD})
    for epoch in (0, 1):
        one, other = rows_of(order, epoch), rows_of(order, epoch)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_leaves_nothing_is_told():
    with pytest.raises(DataError, match="no batch of 7"):
        Without(Shuffled(SOURCE, 7), {0: torch.arange(50)})
    with pytest.raises(DataError, match="no batch of 7"):
        Without(Shuffled(SOURCE, 7, drop_last=True), {0: torch.arange(45)})
    with pytest.raises(DataError, match="beyond the 50"):
        Without(Shuffled(SOURCE, 7), {1: torch.tensor([50])})
