"""The clipped divergence: against one written out, on both scales, dense and from a store."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.chunked import chunked
from stillhouse.losses.clipped_kl import (
    SCALES,
    band_features,
    clipped_kl,
    keep_set,
    mass_penalty,
    quantile_limits,
)
from stillhouse.losses.logits import kl
from stillhouse.teacher import TopK

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def written_out(student, teacher, target, lower, upper, *, scale, renorm, s=1.0):
    """The definition, one item after another, with autograd through the gates."""
    losses, masses, sizes = [], [], []
    for z, t, y, low, high in zip(student, teacher, target, lower, upper, strict=True):
        p, log_p, log_q = t.softmax(-1), t.log_softmax(-1), z.log_softmax(-1)
        ordered, count = p.sort(descending=True).values, len(p)

        def value(position, ordered=ordered, count=count):
            whole = int(position.detach().floor().clamp(0, count - 1))
            after = min(whole + 1, count - 1)
            return ordered[whole] + (position - whole) * (ordered[after] - ordered[whole])

        if scale == "linear":
            t_l, t_u = value((count - 1) * (1 - low)), value((count - 1) * (1 - high))
            hard = t_l.detach(), t_u.detach()
        else:
            n_l, n_u = count ** (1 - low), count ** (1 - high) - 1
            t_l, t_u = value(n_l - 1), value(n_u)
            hard = (
                ordered[min(math.ceil(n_l.item()) - 1, count - 1)],
                ordered[min(math.floor(n_u.item()), count - 1)],
            )
        soft = ((log_p - t_l.log()) / s).sigmoid() * ((t_u.log() - log_p) / s).sigmoid()
        inside = ((p >= hard[0]) & (p <= hard[1])).to(p)
        gate = soft + (inside - soft).detach()
        gate = torch.where(torch.arange(count) == y, torch.ones_like(gate), gate)
        kept = gate * p
        if renorm == "both":
            ratio = log_p - log_q - kept.sum().log() + (gate * log_q.exp()).sum().log()
            losses.append((kept / kept.sum() * ratio).sum())
        else:
            losses.append((kept * (log_p - log_q)).sum())
        masses.append(kept.sum())
        sizes.append(int((gate > 0.5).sum()))
    return torch.stack(losses), torch.stack(masses), sizes


def case(rows: int, classes: int, seed: int = 0, spread: float = 2.0):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        spread * torch.randn(rows, classes, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=rng)
    edges = torch.rand(rows, 2, generator=rng, dtype=torch.float64).sort(-1).values
    return student, teacher, target, edges[:, 0], edges[:, 1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("renorm", ["both", "none"])
@pytest.mark.parametrize(("rows", "classes", "s"), [(5, 2, 1.0), (7, 13, 0.5), (11, 64, 2.0)])
def test_values_and_slopes_are_those_written_out(scale, renorm, rows, classes, s):
    student, teacher, target, lower, upper = case(rows, classes, seed=classes)
    found, expected = [], []
    for slow in (False, True):
        inputs = [x.clone().requires_grad_() for x in (student, lower, upper)]
        if slow:
            loss, mass, size = written_out(
                inputs[0], teacher, target, *inputs[1:], scale=scale, renorm=renorm, s=s
            )
        else:
            loss, mass, size = clipped_kl(
                inputs[0], teacher, target, *inputs[1:], scale=scale, renorm=renorm, gate_scale=s
            )
        weights = torch.arange(1.0, rows + 1, dtype=torch.float64)
        whole = (loss * weights).sum() + (weights.flip(0) * mass_penalty(mass, 0.95)).sum()
        grads = torch.autograd.grad(whole, inputs)
        (expected if slow else found).extend([loss.detach(), mass.detach(), *grads])
        sizes = size if slow else size.tolist()
        (expected if slow else found).append(torch.tensor(sizes))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_values_of_the_sheet():
    """p = (.5, .3, .15, .05) and q uniform, by hand."""
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    student, first = torch.zeros_like(teacher), torch.tensor([0])

    def of(keep: int, **settings) -> float:
        lower = torch.tensor([1 - math.log(keep - 0.01) / math.log(4)], dtype=torch.float64)
        upper = torch.ones_like(lower)
        found = clipped_kl(student, teacher, first, lower, upper, **settings)
        assert int(found.size) == keep
        return float(found.loss)

    assert of(2) == pytest.approx(0.0315839, abs=1e-7)
    assert of(3) == pytest.approx(0.1053441, abs=1e-7)
    assert of(4) == pytest.approx(0.2441743, abs=1e-7)
    assert of(2, renorm="none") == pytest.approx(0.4012701, abs=1e-7)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("classes", [2, 12, 1000])
def test_everything_kept_is_the_plain_divergence(scale, classes):
    student, teacher, target, lower, _ = case(9, classes)
    zero = torch.zeros_like(lower)
    found = clipped_kl(student, teacher, target, zero, zero + 1, scale=scale)
    plain = kl(student, teacher, reduction="none", scale=False)
    torch.testing.assert_close(found.loss, plain, **EXACT)
    assert found.size.tolist() == [classes] * 9


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_differ_by_nothing(scale, dtype):
    student, _, target, lower, upper = case(50, 33)
    same = student.to(dtype)
    found = clipped_kl(same, same.clone(), target, lower, upper, scale=scale)
    assert found.loss.abs().max() < 1e-6
    assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_target_is_always_kept():
    _, teacher, _, lower, upper = case(20, 30)
    target = teacher.argmin(-1)
    limits = quantile_limits(
        teacher.softmax(-1).sort(-1, descending=True).values, lower * 0 + 0.9, upper * 0 + 0.95
    )
    keep = keep_set(teacher.softmax(-1), limits, target)
    assert keep.gather(-1, target[:, None]).all()
    assert keep.sum() < 20 * 10


def test_ranks_on_the_logarithmic_scale():
    """V = 32,000: u = .98 takes none off the top, l = .5 keeps about the root of V."""
    p = torch.arange(32000, 0, -1, dtype=torch.float64)[None] / 1e9
    limits = quantile_limits(p, torch.tensor([0.5]), torch.tensor([0.98]))
    assert limits.hard_high == p[0, 0]
    assert limits.high < p[0, 0]
    assert int((p >= limits.hard_low).sum()) == math.ceil(32000**0.5)
    top = quantile_limits(p, torch.tensor([0.5]), torch.tensor([0.9]))
    assert int((p > top.hard_high).sum()) == math.floor(32000**0.1 - 1)


def test_rows_are_taken_some_at_a_time(monkeypatch):
    arguments = case(40, 17)
    student = arguments[0].requires_grad_()
    whole = clipped_kl(*arguments)
    (expected,) = torch.autograd.grad(whole.loss.sum(), student)
    monkeypatch.setattr("stillhouse.losses.clipped_kl.block_of", lambda first: 3)
    parts = clipped_kl(*arguments)
    (found,) = torch.autograd.grad(parts.loss.sum(), student)
    torch.testing.assert_close(parts.loss, whole.loss, **EXACT)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_band_over_chunks_of_tokens_equals_the_dense_one():
    """Head and sub-network inside a chunked loss: no logits of all tokens are ever held."""
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(23, 8, generator=rng, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(23, 40, generator=rng, dtype=torch.float64)
    target = torch.randint(40, (23,), generator=rng)
    torch.manual_seed(0)
    head, band = nn.Linear(8, 40).double(), nn.Linear(2 * 4 + 2, 2).double()

    def items(logits, teacher_logits, y):
        edges = band(band_features(logits, teacher_logits, 4)).sigmoid()
        low, high = edges[:, 0] * 0.5, 0.5 + 0.5 * edges[:, 1]
        found = clipped_kl(logits, teacher_logits, y, low, high)
        return found.loss + mass_penalty(found.mass)

    learnt = [hidden, *head.parameters(), *band.parameters()]
    dense = items(head(hidden), teacher, target).mean()
    expected = torch.autograd.grad(dense, learnt)
    cut = chunked(
        items, hidden, head, teacher, target, chunk_size=5, parameters=list(band.parameters())
    )
    found = torch.autograd.grad(cut, learnt)
    torch.testing.assert_close(cut, dense, **EXACT)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
        assert other.abs().sum() > 0


def kept_of(teacher: torch.Tensor, k: int) -> TopK:
    log_p = teacher.log_softmax(-1)
    values, ids = log_p.topk(k, -1)
    outside = log_p.scatter(-1, ids, -math.inf)
    return TopK(ids, values, outside.logsumexp(-1))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("renorm", ["both", "none"])
def test_a_store_that_holds_the_whole_band_gives_the_dense_loss(scale, renorm):
    student, teacher, _, _, _ = case(30, 50, seed=3)
    target = teacher.topk(9, -1).indices[:, 8]
    lower = torch.full((30,), 0.8 if scale == "linear" else 0.45, dtype=torch.float64)
    upper = torch.full((30,), 0.98, dtype=torch.float64)
    results = []
    for given in (teacher, kept_of(teacher, 12)):
        inputs = [x.clone().requires_grad_() for x in (student, lower, upper)]
        found = clipped_kl(inputs[0], given, target, *inputs[1:], scale=scale, renorm=renorm)
        assert int(found.size.max()) <= 12
        total = (found.loss + mass_penalty(found.mass)).sum()
        results.append([found.loss.detach(), found.mass.detach(), total])
        results[-1].append(torch.autograd.grad(total, inputs[0])[0])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_store_ends_the_band_at_its_last_class_and_keeps_a_target_outside():
    student, teacher, _, _, _ = case(6, 50, seed=4)
    stored, target = kept_of(teacher, 8), teacher.argmin(-1)
    zero = torch.zeros(6, dtype=torch.float64)
    found = clipped_kl(student.requires_grad_(), stored, target, zero, zero + 1)
    assert found.size.tolist() == [9] * 6
    mean = stored.rest.exp() / 42
    torch.testing.assert_close(found.mass, 1 - stored.rest.exp() + mean, **EXACT)
    (slope,) = torch.autograd.grad(found.loss.sum(), student)
    assert (slope != 0).sum(-1).tolist() == [9] * 6
    padded = TopK(
        torch.cat([stored.ids, stored.ids[:, :1]], -1),
        torch.cat([stored.logp, torch.full((6, 1), -math.inf, dtype=torch.float64)], -1),
        stored.rest,
    )
    again = clipped_kl(student, padded, target, zero, zero + 1)
    assert again.size.tolist() == [9] * 6


def test_features_of_a_store_are_those_of_the_model_where_it_holds_them():
    student, teacher, *_ = case(6, 20, seed=8)
    dense = band_features(student, teacher, 5)
    whole = band_features(student, kept_of(teacher, 20), 5)
    torch.testing.assert_close(whole, dense, **EXACT)
    some = band_features(student.requires_grad_(), kept_of(teacher, 10), 5)
    torch.testing.assert_close(some[:, :10], dense[:, :10], **EXACT)
    assert not some.requires_grad
    with pytest.raises(ModelError, match="the store keeps 10"):
        band_features(student, kept_of(teacher, 10), 11)


def test_classes_that_both_rule_out_change_nothing():
    student, teacher, target, lower, upper = case(8, 20, seed=9)
    ruled = torch.full((8, 3), -math.inf, dtype=torch.float64)
    wide = [torch.cat([x, ruled], -1).requires_grad_() for x in (student, teacher)]
    lower = lower.clone().requires_grad_()
    found = clipped_kl(wide[0], wide[1], target, lower * 0, upper * 0 + 1)
    torch.testing.assert_close(
        found.loss, kl(student, teacher, reduction="none", scale=False), **EXACT
    )
    grads = torch.autograd.grad(found.loss.sum() + found.mass.sum(), [wide[0], lower])
    assert all(g.isfinite().all() for g in grads)


def test_refusals():
    student, teacher, target, lower, upper = case(4, 6)
    with pytest.raises(ModelError, match="same classes"):
        clipped_kl(student, teacher[:, :5], target, lower, upper)
    with pytest.raises(ModelError, match="target has shape"):
        clipped_kl(student, teacher, target[:3], lower, upper)
    with pytest.raises(RecipeError, match="did you mean 'logrank'"):
        clipped_kl(student, teacher, target, lower, upper, scale="logranks")
    with pytest.raises(RecipeError, match="unknown renorm"):
        clipped_kl(student, teacher, target, lower, upper, renorm="q")
    with pytest.raises(RecipeError, match="above 0"):
        clipped_kl(student, teacher, target, lower, upper, gate_scale=0)
    hot = kept_of(teacher, 3)._replace(temperature=2.0)
    with pytest.raises(ModelError, match="temperature 1"):
        clipped_kl(student, hot, target, lower, upper)
