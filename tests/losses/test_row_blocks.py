"""Blocks of rows: the same values and derivatives as the whole, in less memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stillhouse.losses import logits as L
from stillhouse.losses import row_blocks
from stillhouse.losses.row_blocks import by_rows
from stillhouse.teacher import TopK

CLASSES = 12
LOSSES = {
    **{
        direction: lambda s, t, d=direction, **k: L.kl(
            s, t, direction=d, beta=0.3, skew=0.2, temperature=2.0, **k
        )
        for direction in L.DIRECTIONS
    },
    "jsd": lambda s, t, **k: L.jsd(s, t, beta=0.4, **k),
    "total variation": lambda s, t, **k: L.total_variation(s, t, temperature=1.5, **k),
    **{
        f"topk {tail}": lambda s, t, tail=tail, **k: L.topk_kl(s, kept(t), tail=tail, **k)
        for tail in L.TAILS
    },
}


def kept(logits: Tensor) -> TopK:
    log_p = logits.log_softmax(-1)
    top = log_p.topk(4, dim=-1)
    rest = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    return TopK(top.indices, top.values, rest, 1.0, torch.softmax(top.values, -1))


def pair(*lead: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    made = [torch.randn(*lead, CLASSES, generator=rng, dtype=torch.float64) * 3 for _ in "st"]
    return made[0].requires_grad_(), made[1].requires_grad_()


@pytest.fixture(params=[1, 3, 100])
def rows_at_once(request, monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", request.param * CLASSES)
    return request.param


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_values_and_gradients_are_those_of_the_whole(name, reduction, rows_at_once, monkeypatch):
    student, teacher = pair(2, 5)
    mask = torch.arange(10).reshape(2, 5) % 3 != 0
    weight = torch.rand(2, 5, dtype=torch.float64) if reduction == "none" else torch.tensor(3.0)

    def found() -> list[Tensor]:
        value = LOSSES[name](student, teacher, mask=mask, reduction=reduction)
        return [value, *torch.autograd.grad((value * weight).sum(), [student, teacher])]

    ours = found()
    monkeypatch.setattr(row_blocks, "_CPU", 1 << 30)
    for one, other in zip(ours, found(), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        monkeypatch.setattr(row_blocks, "_CPU", rows_at_once * CLASSES)
        value = LOSSES[name](student, teacher, mask=mask, reduction=reduction)
        assert torch.allclose(value, ours[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["forward", "js", "skewed_reverse", "topk tail"])
def test_second_derivatives_are_there(name, monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", CLASSES)
    student, teacher = pair(3)
    teacher = teacher.detach()
    assert torch.autograd.gradgradcheck(lambda s: LOSSES[name](s, teacher), [student])


@pytest.mark.parametrize("name", [n for n in LOSSES if not n.startswith("topk")])
def test_identical_models_give_exactly_0_and_no_gradient(name, rows_at_once):
    student, _ = pair(7)
    value = LOSSES[name](student, student.detach().clone())
    value.backward()
    assert value.item() == 0
    assert student.grad.abs().max() < 1e-15


def test_ruled_out_classes_and_masked_nan_do_no_harm(monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", 2 * CLASSES)
    for name in ("forward", "reverse", "js", "skewed_forward", "skewed_reverse", "total variation"):
        student, teacher = (x.detach().clone() for x in pair(6))
        narrow = LOSSES[name](student[:, :9], teacher[:, :9]).item()
        student[:, 9:], teacher[:, 9:] = -math.inf, -math.inf
        mask = torch.ones(7, dtype=torch.bool)
        mask[6] = False
        row = torch.full((1, CLASSES), math.nan, dtype=torch.float64)
        student = torch.cat([student, row]).requires_grad_()
        value = LOSSES[name](student, torch.cat([teacher, row]), mask=mask)
        assert value.item() == pytest.approx(narrow, rel=1e-12)
        value.backward()
        assert torch.isfinite(student.grad).all()
        assert student.grad[6].abs().max() == 0


def test_backward_as_often_as_the_graph_is_kept(monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", CLASSES)
    student, teacher = pair(4)
    teacher = teacher.detach()
    expected = torch.autograd.grad(L.jsd(student, teacher), student)[0]
    value = L.jsd(student, teacher)
    value.backward(retain_graph=True)
    student.grad.mul_(0)
    value.backward()
    assert torch.allclose(student.grad, expected, rtol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_transforms_of_functions_see_the_whole(monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", CLASSES)
    student, teacher = (x.detach() for x in pair(4, 3))
    found = torch.func.vmap(torch.func.grad(lambda s, t: L.kl(s, t)))(student, teacher)
    for i in range(4):
        row = student[i].clone().requires_grad_()
        assert torch.allclose(found[i], torch.autograd.grad(L.kl(row, teacher[i]), row)[0])


def test_half_precision_is_widened_in_the_block(monkeypatch):
    monkeypatch.setattr(row_blocks, "_CPU", CLASSES)
    student, teacher = (x.detach().to(torch.bfloat16) for x in pair(5))
    student.requires_grad_()
    value = L.kl(student, teacher, direction="js")
    assert value.dtype == torch.float32
    value.backward()
    wide = student.detach().float().requires_grad_()
    L.kl(wide, teacher.float(), direction="js").backward()
    assert student.grad.dtype == torch.bfloat16
    assert torch.allclose(student.grad, wide.grad.to(torch.bfloat16), atol=1e-4)


def test_an_unused_input_gets_zeros():
    rows = [torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
    value = row_blocks._Blocks.apply(lambda a, b: a.sum(-1), 3, *rows).sum()
    value.backward()
    assert torch.equal(rows[1].grad, torch.zeros(4, 2))
    assert by_rows(lambda a, b: a.sum(-1), *rows).shape == (4,)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_closed_form_of_js_is_that_of_its_definition(beta):
    rng = torch.Generator().manual_seed(0)
    # from nearly equal to farther apart than float32 tells
    for spread in (1e-6, 1.0, 30.0, 400.0):
        base = torch.randn(6, 9, generator=rng, dtype=torch.float64)
        other = base + spread * torch.randn(6, 9, generator=rng, dtype=torch.float64)
        logs = [x.log_softmax(-1).requires_grad_() for x in (base, other)]
        found, expected = L._JensenShannon.apply(*logs, beta), L._mixed_js(*logs, beta)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-22)
        grads = [torch.autograd.grad(x.sum(), logs) for x in (found, expected)]
        for one, two in zip(*grads, strict=True):
            assert torch.allclose(one, two, rtol=1e-6, atol=1e-14)
        low = [x.detach().float() for x in logs]
        assert torch.allclose(
            L._JensenShannon.apply(*low, beta).double(), found, rtol=1e-4, atol=1e-6
        )


MEMORY = """
import resource, torch
from stillhouse.losses.logits import jsd
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
student = torch.randn(512, 16_000, requires_grad=True)
teacher = torch.randn(512, 16_000)
jsd(student[:8], teacher[:8]).backward()
student.grad = None
before = peak()
jsd(student, teacher).backward()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB here")
def test_a_divergence_of_wide_rows_takes_little_more_than_its_gradient():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    # the gradient takes 31 MiB; the graph of the whole took some 400
    assert float(done.stdout) < 90
