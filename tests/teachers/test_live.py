"""A live teacher: asks, checks, never changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.errors import ModelError, TeacherError
from stillhouse.models.small_cnn import SmallCNN
from stillhouse.net import Net
from stillhouse.tasks.classification import Classification
from stillhouse.teacher import Teacher, Want
from stillhouse.teachers.live import Live, weights_hash


def net(classes: int = 4, mean: list[float] | None = None, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    std = None if mean is None else [0.5] * len(mean)
    return Net(SmallCNN(classes, 3, (4, 8)), mean=mean, std=std)


def task(classes: int = 4) -> Classification:
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    source = TensorSource({"x": images, "target": torch.arange(8) % classes})
    names = [str(c) for c in range(classes)]
    return Classification(Splits({"train": source}, "toys", {"classes": names}))


def batch(rows: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(2)
    x, weak = torch.rand(2, rows, 3, 8, 8, generator=rng)
    return Batch(id=torch.arange(rows), x=x, weak=weak)


def test_it_is_a_teacher_and_no_module():
    teacher = Live(net())
    assert isinstance(teacher, Teacher)
    assert not isinstance(teacher, nn.Module)
    holder = nn.Module()
    holder.teacher = teacher
    assert list(holder.parameters()) == []
    assert holder.state_dict() == {}


def test_it_gives_what_is_wanted_of_each_view():
    teacher = Live(net())
    wants = [
        Want("logits"),
        Want("tap:stage1"),
        Want("logits", view="weak"),
        Want("tap:head:input"),
    ]
    teacher.bind(wants, task())
    known = teacher.knowledge(batch())
    assert set(known) == {"logits", "tap:stage1", "weak:logits", "tap:head:input"}
    assert known.tap["stage1"].shape == (6, 4, 8, 8)
    own = teacher.net
    with torch.no_grad():
        assert torch.equal(known["logits"], own(batch().view("x"))["logits"])
        assert torch.equal(known["weak:logits"], own(batch().view("weak"))["logits"])
        head = own.head_layer()
        again = F.linear(known.tensor("tap:head:input"), head.weight, head.bias)
    assert torch.allclose(again, known.tensor("logits"), atol=1e-6)
    assert not known.tensor("logits").requires_grad


def test_one_forward_per_view():
    teacher = Live(net())
    calls: list[int] = []
    teacher.net.register_forward_hook(lambda *_: calls.append(1))
    teacher.bind([Want("logits"), Want("tap:stage1"), Want("logits", view="weak")], None)
    teacher.knowledge(batch())
    assert len(calls) == 2


def test_its_tensors_enter_a_graph_in_training_and_inference_mode_is_the_callers():
    teacher = Live(net())
    teacher.bind([Want("logits")], task())
    student = nn.Linear(3 * 64, 4)
    F.mse_loss(
        student(batch()["x"].flatten(1)), teacher.knowledge(batch()).tensor("logits")
    ).backward()
    assert student.weight.grad is not None
    assert not teacher.knowledge(batch()).tensor("logits").is_inference()
    with torch.inference_mode():
        assert teacher.knowledge(batch()).tensor("logits").is_inference()


def test_weights_and_statistics_stay_bit_for_bit():
    teacher = Live(net())
    before = copy.deepcopy(teacher.net.state_dict())
    teacher.bind([Want("logits")], task())
    teacher.net.train()  # somebody else's mistake
    first = teacher.knowledge(batch())["logits"]
    assert not teacher.net.training
    assert torch.equal(first, teacher.knowledge(batch())["logits"])
    after = teacher.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in teacher.net.parameters())


def test_pieces_give_what_one_forward_gives():
    whole, pieces = Live(net()), Live(net(), rows=4)
    for teacher in (whole, pieces):
        teacher.bind([Want("logits"), Want("tap:stage1")], task())
    one, other = whole.knowledge(batch()), pieces.knowledge(batch())
    for key in one:
        assert torch.allclose(one.tensor(key), other.tensor(key), atol=1e-6)
    with pytest.raises(TeacherError, match="at least one row"):
        Live(net(), rows=0)


def test_the_fingerprint_follows_weights_preprocessing_and_settings():
    same = Live(net()).fingerprint
    assert Live(net()).fingerprint == same
    others = {
        Live(net(seed=1)).fingerprint,
        Live(net(mean=[0.5, 0.5, 0.5])).fingerprint,
        Live(net(), settings={"resolution": 8}).fingerprint,
        same,
    }
    assert len(others) == 4
    teacher = Live(net())
    assert teacher.fingerprint == same
    with torch.no_grad():
        teacher.net.module.classifier.bias[0] += 1.0
    assert teacher.fingerprint != same


def test_catching_a_tap_does_not_make_another_teacher():
    teacher = Live(net())
    before = teacher.fingerprint
    teacher.bind([Want("tap:stage2")], task())
    assert teacher.fingerprint == before


def test_hashes_of_any_dtype():
    module = nn.Linear(3, 3)
    hashes = {weights_hash(module.to(d)) for d in (torch.float32, torch.bfloat16, torch.float64)}
    assert len(hashes) == 3


def test_missing_fields_and_taps_are_told_with_near_names():
    with pytest.raises(TeacherError, match="does not give 'logit'; did you mean 'logits'"):
        Live(net()).bind([Want("logit")], task())
    with pytest.raises(TeacherError, match=r"tap 'stage9' is not mapped.*did you mean 'stage"):
        Live(net()).bind([Want("tap:stage9")], task())
    broken = net()
    broken.module.taps["low"] = "blocks.9"
    with pytest.raises(TeacherError, match=r"names the module 'blocks\.9'"):
        Live(broken).bind([Want("tap:low")], task())
    teacher = Live(net())
    teacher.bind([Want("logits"), Want("embedding", optional=True)], task())
    assert set(teacher.knowledge(batch())) == {"logits"}
    late = Live(net())
    late.bind([Want("scores")], None)
    with pytest.raises(TeacherError, match="does not give 'scores' on the view 'x'"):
        late.knowledge(batch())


def test_another_number_of_classes_is_refused_with_both():
    with pytest.raises(ModelError, match="7 outputs, the data 'toys' 4 classes"):
        Live(net(classes=7)).bind([Want("logits")], task())
    Live(net(classes=7)).bind([Want("tap:stage1")], task())


def test_a_guest_is_differentiable_in_its_input():
    teacher = Live(net())
    teacher.bind([Want("fresh"), Want("input_grad")], task())
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    teacher.guest()(x)["logits"].sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
