"""A ring keeps the newest rows in order, whatever the pieces they came in."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.ring import Ring


def numbers(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 1, 5, 7), (12,), (2, 0, 4), (7, 7, 7, 7)])
def test_the_last_rows_of_all_that_came(sizes):
    ring, seen = Ring(7, {"v": (1,)}), 0
    for size in sizes:
        ring.push(v=numbers(seen, size))
        seen += size
        held = min(seen, 7)
        assert len(ring) == held
        assert torch.equal(ring.last(), numbers(seen - held, held))
        assert torch.equal(ring.last(min(2, held)), numbers(seen - min(2, held), min(2, held)))
        assert int(ring.place) == seen % 7


def test_nothing_moves_before_the_end_of_the_step():
    ring = Ring(4, {"v": numbers(0, 4)})
    before = {k: v.clone() for k, v in ring.state_dict().items()}
    ring.begin_slot(0)
    ring.propose(v=numbers(10, 2))
    ring.propose(v=numbers(20, 2))  # a second forward of the same micro-batch is not heard
    assert all(torch.equal(before[k], v) for k, v in ring.state_dict().items())
    ring.begin_slot(1)
    ring.propose(v=numbers(12, 1))
    ring.settle(True)
    assert torch.equal(ring.last(), torch.tensor([[3.0], [10.0], [11.0], [12.0]]))


def test_a_refused_step_leaves_it_but_for_what_prepare_proposed():
    ring = Ring(4, {"v": numbers(0, 4)})
    ring.begin_slot(0)
    ring.propose(v=numbers(9, 1))
    ring.settle(False)
    assert torch.equal(ring.last(), numbers(0, 4))
    ring.propose(v=numbers(9, 1))  # in prepare
    ring.settle(False)
    assert ring.last()[-1] == 9


def test_several_fields_move_together_and_resume_where_they_were():
    ring = Ring(5, {"vector": torch.randn(3, 2), "id": torch.tensor([-100, -100, -100])})
    ring.push(vector=torch.ones(4, 2), id=torch.arange(4))
    assert ring.last(field="id").tolist() == [-100, 0, 1, 2, 3]
    other = Ring(5, {"vector": torch.zeros(0, 2), "id": torch.zeros(0, dtype=torch.int64)})
    other.load_state_dict(ring.state_dict())
    for one in (ring, other):
        one.push(vector=torch.full((2, 2), 7.0), id=torch.tensor([8, 9]))
    assert torch.equal(ring.last(field="vector"), other.last(field="vector"))
    assert ring.last(field="id").tolist() == [1, 2, 3, 8, 9]
    assert ring.slots("id").dtype == torch.int64


def test_rows_are_replaced_in_their_slots():
    ring = Ring(4, {"pose": torch.arange(4), "quality": torch.zeros(4)})
    ring.replace(torch.tensor([2, 0]), quality=torch.tensor([5.0, 6.0]))
    ring.settle(True)
    assert ring.slots("quality").tolist() == [6.0, 0.0, 5.0, 0.0]
    assert ring.last(field="pose").tolist() == [0, 1, 2, 3]
    assert int(ring.place) == 0


def test_samples_are_a_function_of_the_chance_and_only_of_what_is_held():
    ring = Ring(10, {"v": (1,)})
    ring.push(v=numbers(1, 3))
    drawn = [ring.sample(50, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(drawn[0]["v"], drawn[1]["v"])
    assert set(drawn[0]["v"][:, 0].tolist()) == {1.0, 2.0, 3.0}
    assert torch.equal(ring.slots()[drawn[0]["slots"]], drawn[0]["v"])
    all_of_it = ring.sample(3, torch.Generator().manual_seed(1), replacement=False)
    assert sorted(all_of_it["slots"].tolist()) == [0, 1, 2]


def test_no_gradient_is_kept():
    ring = Ring(3, {"v": (2,)})
    ring.push(v=torch.randn(2, 2, requires_grad=True))
    assert not ring.last().requires_grad


def test_what_does_not_fit_is_told():
    with pytest.raises(RecipeError):
        Ring(0, {"v": (1,)})
    with pytest.raises(RecipeError):
        Ring(3, {"place": (1,)})
    with pytest.raises(ModelError, match="at most 3"):
        Ring(3, {"v": torch.zeros(4, 1)})
    ring = Ring(3, {"v": (2,), "id": ()})
    with pytest.raises(ModelError, match="'v' have the shape"):
        ring.propose(v=torch.zeros(1, 3), id=torch.zeros(1))
    with pytest.raises(ModelError, match="has the fields"):
        ring.propose(v=torch.zeros(1, 2))
    with pytest.raises(ModelError, match="equally many"):
        ring.propose(v=torch.zeros(1, 2), id=torch.zeros(2))
    with pytest.raises(ModelError, match="no field 'vv'"):
        ring.slots("vv")
    with pytest.raises(ModelError, match="several fields"):
        ring.last()
    with pytest.raises(ModelError, match="holds 0"):
        ring.last(1, "v")
    with pytest.raises(ModelError, match="holds 0"):
        ring.sample(1, torch.Generator())
    with pytest.raises(ModelError, match="2 slots"):
        ring.replace(torch.tensor([0, 1]), id=torch.zeros(1))
