"""Products of neighbouring distributions inside spans."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.spans import (
    DISTANCES,
    pair_distance,
    pair_products,
    pairs_of,
    span_product,
    spread,
)
from stillhouse.teacher import TopK

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def written_out(student, teacher, intervals, distance):
    q, p = student.softmax(-1), teacher.softmax(-1)
    found = []
    for row, a, b in intervals.tolist():
        for k in range(a, b):
            ours, theirs = q[row, k] * q[row, k + 1], p[row, k] * p[row, k + 1]
            if distance == "l2":
                found.append(((theirs - ours) ** 2).sum())
            elif distance == "kl_norm":
                ours, theirs = ours / ours.sum(), theirs / theirs.sum()
                found.append((theirs * (theirs / ours).log()).sum())
            else:
                found.append(1 - (ours * theirs).sum() / (ours.norm() * theirs.norm()))
    return torch.stack(found).mean() if found else student.new_zeros(())


def case(rows=3, tokens=7, classes=11, seed=0):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(rows, tokens, classes, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    intervals = torch.tensor([[0, 0, 2], [0, 1, 5], [1, 3, 3], [2, 5, 6], [2, 0, 1]])
    return student.requires_grad_(), teacher, intervals


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("block", [None, 2])
def test_values_and_slopes_are_those_written_out(distance, block, monkeypatch):
    if block:
        monkeypatch.setattr("stillhouse.losses.spans.block_of", lambda first: block)
    student, teacher, intervals = case()
    found = span_product(student, teacher, intervals, distance=distance)
    expected = written_out(student, teacher, intervals, distance)
    torch.testing.assert_close(found, expected, **EXACT)
    (slope,), (wanted,) = (torch.autograd.grad(x, student) for x in (found, expected))
    torch.testing.assert_close(slope, wanted, **EXACT)


def test_values_of_the_sheet():
    p = torch.tensor([[[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]], dtype=torch.float64).log()
    q = torch.tensor([[[0.4, 0.6], [0.3, 0.7], [0.6, 0.4]]], dtype=torch.float64).log()
    found = span_product(q, p, torch.tensor([[0, 0, 2]]))
    assert float(found) == pytest.approx(0.0204, abs=1e-9)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_models_and_no_pairs_give_nothing(distance):
    student, teacher, intervals = case()
    same = span_product(student, student.detach(), intervals, distance=distance)
    assert abs(same.item()) < 1e-12
    none = span_product(student, teacher, torch.tensor([[1, 3, 3]]), distance=distance)
    assert none.item() == 0
    (slope,) = torch.autograd.grad(none, student)
    assert not slope.any()
    empty = torch.zeros(0, 3, dtype=torch.int64)
    assert span_product(student, teacher, empty, distance=distance).item() == 0


def test_both_factors_of_the_student_carry_gradient():
    student, teacher, _ = case()
    (slope,) = torch.autograd.grad(
        span_product(student, teacher, torch.tensor([[1, 2, 3]])), student
    )
    assert slope[1, 2].abs().sum() > 0
    assert slope[1, 3].abs().sum() > 0
    assert int((slope != 0).any(-1).sum()) == 2


def test_pairs_are_taken_interval_by_interval():
    intervals = torch.tensor([[0, 2, 4], [1, 5, 5], [1, 0, 1], [0, 4, 3]])
    assert pairs_of(intervals).tolist() == [[0, 2], [0, 3], [1, 0]]


def test_kept_classes_are_spread_over_the_vocabulary():
    student, teacher, _ = case()
    flat, theirs = student.reshape(-1, 11), teacher.reshape(-1, 11)
    log_p = theirs.log_softmax(-1)
    values, ids = log_p.topk(8, -1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    whole = spread(values, ids, rest, 11)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(21, dtype=torch.float64))
    first = torch.tensor([0, 1, 4, 19])
    stored = pair_products(flat, TopK(ids, values, rest), first)
    dense = pair_products(flat, whole, first)
    torch.testing.assert_close(stored, dense, **EXACT)
    exact = pair_products(flat, theirs, first)
    assert abs(stored.item() - exact.item()) < 0.1 * exact.item()
    none = torch.full_like(rest, -torch.inf)
    everything = TopK(*(x.expand(1, -1, -1)[0] for x in (log_p.sort(-1).indices,)), log_p, none)
    ordered = everything._replace(logp=log_p.gather(-1, everything.ids))
    torch.testing.assert_close(pair_products(flat, ordered, first), exact, **EXACT)


def test_half_precision_is_widened():
    student, teacher, intervals = case()
    found = span_product(student.bfloat16(), teacher.bfloat16(), intervals)
    assert found.dtype == torch.float32
    assert found.isfinite()
    tiny = torch.tensor([[0.0, 200.0, 100.0]])
    assert pair_distance((tiny, tiny.flip(1)), (tiny, tiny.flip(1)), "cos").abs().item() < 1e-6


def test_refusals():
    student, teacher, intervals = case()
    with pytest.raises(RecipeError, match="did you mean 'l2'"):
        span_product(student, teacher, intervals, distance="l1")
    with pytest.raises(ModelError, match="outside"):
        span_product(student, teacher, torch.tensor([[0, 3, 7]]))
    with pytest.raises(ModelError, match="both must be"):
        span_product(student, teacher[..., :5], intervals)
    with pytest.raises(ModelError, match="row, first and last"):
        span_product(student, teacher, intervals[:, :2])
