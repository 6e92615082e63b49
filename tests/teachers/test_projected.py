"""Vectors behind a fixed projector, and rows that bring a teacher's answers along."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch, TensorSource, read_rows
from stillhouse.clock import Views
from stillhouse.errors import TeacherError
from stillhouse.parts.projector import Projector
from stillhouse.teacher import Want
from stillhouse.teachers.function import Callable
from stillhouse.teachers.projected import Answered, Projected


def flat(calls: list[int] | None = None) -> Callable:
    def answer(batch: Batch) -> dict[str, torch.Tensor]:
        if calls is not None:
            calls.append(batch.size)
        return {"embedding": batch.view("x").flatten(1)}

    return Callable(answer, fields=["embedding"], fingerprint="flat")


def frozen(seed: int) -> Projector:
    return Projector(6, 4, "mlp", hidden=8, trainable=False, seed=seed)


def test_its_vectors_have_unit_length_and_no_gradient():
    teacher = Projected(flat(), frozen(1))
    teacher.bind([Want("embedding")], None)
    x = torch.randn(5, 6, requires_grad=True)
    found = teacher.knowledge(Batch(x=x)).tensor("embedding")
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    wanted = torch.nn.functional.normalize(frozen(1)(x), dim=1)
    torch.testing.assert_close(found, wanted.detach())
    double = teacher.knowledge(Batch(x=x.double())).tensor("embedding")  # of a double teacher
    torch.testing.assert_close(double, wanted.detach())
    plain = Projected(flat(), None)
    plain.bind([Want("embedding")], None)
    found = plain.knowledge(Batch(x=x)).tensor("embedding")
    torch.testing.assert_close(found.detach(), torch.nn.functional.normalize(x, dim=1).detach())


def test_its_fingerprint_is_that_of_teacher_and_weights():
    prints = [Projected(flat(), p).fingerprint for p in (frozen(1), frozen(1), frozen(2), None)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_only_vectors_are_given():
    teacher = Projected(flat(), frozen(1))
    assert teacher.provides == {"vector"}
    with pytest.raises(TeacherError, match="logits"):
        teacher.bind([Want("logits")], None)
    with pytest.raises(TeacherError):
        teacher.guest()
    wrong = Projected(flat(), Projector(5, 4, trainable=False))
    wrong.bind([Want("embedding")], None)
    with pytest.raises(TeacherError, match="width 5"):
        wrong.knowledge(Batch(x=torch.randn(2, 6)))


def test_rows_bring_answers_along():
    source = TensorSource({"x": torch.randn(10, 6), "target": torch.arange(10)})
    calls: list[int] = []
    teacher = Projected(flat(calls), frozen(1))
    teacher.bind([Want("embedding")], None)
    data = Answered(source, teacher, "anchor")
    calls.clear()
    rows = torch.tensor([7, 2, 4])
    batch = read_rows(data, rows, Views(0))
    assert calls == [3]
    assert batch["target"].tolist() == [7, 2, 4]
    assert batch["id"].tolist() == [7, 2, 4]
    expected = teacher.knowledge(source.read(rows, None)).tensor("embedding")
    assert torch.equal(batch["anchor"], expected)
    assert len(data) == 10
    assert data.id_of(3) == 3
    sample = data[7, None]
    torch.testing.assert_close(sample["anchor"], expected[0])
    cut = batch.split(2)
    assert torch.equal(torch.cat([part["anchor"] for part in cut]), expected)
    other = Answered(source, Projected(flat(), frozen(2)), "anchor")
    assert len({source.fingerprint, data.fingerprint, other.fingerprint}) == 3


def test_a_silent_teacher_is_told():
    from stillhouse.teacher import Knowledge

    class Silent:
        provides = frozenset({"vector"})
        fingerprint = "silent"

        def bind(self, wants, task):
            pass

        def knowledge(self, batch):
            spoken = batch["id"] != 2
            return Knowledge({"embedding": torch.zeros(batch.size, 4)}, spoken)

        def guest(self):
            raise TeacherError("none")

    data = Answered(TensorSource({"x": torch.randn(4, 6)}), Silent(), "anchor")
    data.read(torch.tensor([0, 1]), None)
    with pytest.raises(TeacherError, match=r"rows \[2\]"):
        data.read(torch.tensor([1, 2]), None)
