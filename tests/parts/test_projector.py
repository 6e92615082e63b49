"""Projectors: shapes, the frozen kind, released values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.projector import Projector


def test_both_sides_of_the_released_head(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("comodo").case("projector").items()}
    weights = {f"net.{k[2:]}": v.double() for k, v in case.items() if k.startswith("w.")}
    hidden, inputs = weights["net.0.weight"].shape
    outputs = len(weights["net.3.bias"])

    def built(trainable: bool) -> Projector:
        made = Projector(inputs, outputs, "mlp", hidden=hidden, trainable=trainable).double()
        made.load_state_dict(weights, strict=False)
        return made

    x = case["x"].double()
    teacher = built(False).train()
    found = F.normalize(teacher(x), dim=-1)
    torch.testing.assert_close(found, case["teacher_embedding"], rtol=1e-9, atol=1e-12)
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(teacher.net[1], name), weights[f"net.1.{name}"])
    student = built(True).train()
    x.requires_grad_()
    out = student(x)
    torch.testing.assert_close(out.detach(), case["student_out"], rtol=1e-9, atol=1e-12)
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, case["grad_x_train"], rtol=1e-8, atol=1e-11)
    for name in ("running_mean", "running_var"):
        wanted = case[f"{name}_after"]
        torch.testing.assert_close(getattr(student.net[1], name), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape", "out"),
    [
        ("linear", (4, 6), (4, 5)),
        ("linear", (4, 3, 6), (4, 3, 5)),
        ("mlp", (4, 6), (4, 5)),
        ("conv1", (4, 6, 3, 2), (4, 5, 3, 2)),
        ("conv3bn", (4, 6, 3, 2), (4, 5, 3, 2)),
    ],
)
def test_shapes(kind, shape, out):
    assert Projector(6, 5, kind, hidden=7)(torch.randn(shape)).shape == out


def test_a_seed_gives_the_same_weights_and_leaves_the_chance_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other, third = (Projector(3, 2, "mlp", hidden=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.net[0].weight, other.net[0].weight)
    assert not torch.equal(one.net[0].weight, third.net[0].weight)


def test_a_frozen_one_stays():
    made = Projector(3, 2, "conv3bn", trainable=False).train()
    assert not made.net[1].training
    assert not any(p.requires_grad for p in made.parameters())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert int(made.net[1].num_batches_tracked) == 0


def test_a_single_row_is_normalised_by_the_running_statistics():
    made = Projector(3, 2, "mlp", hidden=4).train()
    made(torch.randn(8, 3))
    kept = {name: value.clone() for name, value in made.state_dict().items()}
    found = made(torch.randn(1, 3))
    found.sum().backward()
    assert bool((made.net[0].weight.grad != 0).any())
    for name, value in made.state_dict().items():
        assert torch.equal(value, kept[name])
    assert made.net[1].training
    x = torch.randn(1, 3)
    torch.testing.assert_close(made(x), made.eval()(x))


def test_what_does_not_fit_is_told():
    with pytest.raises(RecipeError, match="linear"):
        Projector(3, 2, "linaer")
    with pytest.raises(ModelError):
        Projector(0, 2)
    with pytest.raises(ModelError, match="from width 3"):
        Projector(3, 2)(torch.randn(4, 5))
    with pytest.raises(ModelError, match="'mlp'"):
        Projector(3, 2, "mlp")(torch.randn(4, 2, 3))
