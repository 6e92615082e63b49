"""A teacher that is asked once: what it keeps, when it forgets, what it hands on."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.errors import TeacherError
from stillhouse.net import Net
from stillhouse.teacher import Want
from stillhouse.teachers.live import Live
from stillhouse.teachers.once import Once


def test_it_asks_once_until_it_is_bound_again():
    live = Live(Net(torch.nn.Linear(3, 2)))
    once = Once(live)
    once.bind((Want("logits"),), None)
    batch = Batch(x=torch.randn(4, 3))
    first = once.knowledge(batch)
    assert once.knowledge(batch) is first
    assert torch.equal(first.tensor("logits"), live.knowledge(batch).tensor("logits"))
    with pytest.raises(TeacherError, match="4 rows once and for all"):
        once.knowledge(Batch(x=torch.randn(5, 3)))
    once.bind((Want("logits"),), None)
    assert once.knowledge(Batch(x=torch.randn(5, 3))).tensor("logits").shape == (5, 2)


def test_whatever_else_is_the_teachers():
    live = Live(Net(torch.nn.Linear(3, 2)))
    once = Once(live)
    assert once.fingerprint == live.fingerprint
    assert once.provides == live.provides
    assert once.guest() is live.guest()
    with pytest.raises(AttributeError):
        once.nothing  # noqa: B018
