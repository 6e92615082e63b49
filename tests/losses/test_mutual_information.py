"""CMI as a loss: the sheet's properties and the official values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.mutual_information import cmi, usable


def outputs(rows: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=rng, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=rng)
    means = torch.rand(classes, classes, generator=rng, dtype=torch.float64) + 0.05
    return logits, target, means / means.sum(1, keepdim=True)


def exact(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.softmax(-1)
    own = [p[target == k] for k in range(logits.shape[-1])]
    return torch.stack([x.mean(0) if len(x) else p.new_full(p.shape[1:], 0.25) for x in own])


def test_hand_values():
    """Property 1."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    target = torch.zeros(2, dtype=torch.long)
    means = torch.tensor([[0.6, 0.25, 0.15]] * 3, dtype=torch.float64)
    each = cmi(p.log(), means, target, reduction="none")
    assert each.tolist() == pytest.approx([0.022730, 0.021072], abs=5e-7)
    whole, ce = cmi(p.log(), means, target), F.cross_entropy(p.log(), target)
    assert whole.item() == pytest.approx(0.021901, abs=5e-7)
    assert ce.item() == pytest.approx(0.524911, abs=5e-7)
    assert (ce - 0.15 * whole).item() == pytest.approx(0.521626, abs=5e-7)


def test_with_exact_means_it_lies_between_nothing_and_log_classes():
    """Property 2."""
    for seed in range(5):
        logits, target, _ = outputs(seed=seed)
        found = cmi(logits * 10, exact(logits * 10, target), target).item()
        assert 0 < found <= math.log(4)
    same = torch.randn(4, 4, dtype=torch.float64)[target]
    assert cmi(same, exact(same, target), target).item() == pytest.approx(0, abs=1e-12)


def test_frozen_means_add_their_distance():
    """Property 3."""
    logits, target, frozen = outputs()
    present = exact(logits, target)
    shift = (present * (present / frozen).log()).sum(-1)[target].mean()
    apart = cmi(logits, frozen, target) - cmi(logits, present, target)
    torch.testing.assert_close(apart, shift, rtol=0, atol=1e-6)


def test_no_gradient_reaches_the_means():
    """Property 5."""
    logits, target, means = outputs()
    means.requires_grad_(True)
    logits.requires_grad_(True)
    cmi(logits, means, target).backward()
    assert means.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_order_within_a_class_and_a_common_level_do_not_matter():
    """Property 6."""
    logits, target, means = outputs()
    order = torch.randperm(12)
    torch.testing.assert_close(cmi(logits, means, target), cmi(logits[order], means, target[order]))
    level = torch.randn(12, 1, dtype=torch.float64) * 5
    torch.testing.assert_close(cmi(logits, means, target), cmi(logits + level, means, target))


def test_the_gradient_is_that_of_finite_differences():
    """Property 10: both through P and through log P."""
    logits, target, means = outputs(5)
    logits.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: cmi(x, means, target), logits)
    assert torch.autograd.gradcheck(lambda x: cmi(x, means, target, reduction="sum"), logits)


@pytest.mark.parametrize("case", ["loss0", "loss1"])
def test_official_loss(golden, case):
    g = golden("mcmi").case(case)
    target = torch.as_tensor(g["target"])
    for kind, suffix, rel in ((torch.float64, "", 1e-12), (torch.float32, "_f32", 1e-6)):
        logits = torch.as_tensor(g["output"]).to(kind).requires_grad_(True)
        means = torch.as_tensor(g["centroids"]).to(kind)
        found = {
            "ce": F.cross_entropy(logits, target),
            "cmi": cmi(logits, means, target),
        }
        found["total"] = found["ce"] - 0.15 * found["cmi"]
        for name, value in found.items():
            assert value.item() == pytest.approx(float(g[name + suffix]), rel=rel)
            (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
            reference = torch.as_tensor(g[f"grad_{name}{suffix}"])
            assert (grad - reference).abs().max() <= rel * reference.abs().max()


def test_a_mean_of_exactly_zero(golden):
    g = golden("mcmi").case("loss_zero_entry")
    logits, target = torch.as_tensor(g["output"]), torch.as_tensor(g["target"])
    means = torch.as_tensor(g["centroids"])
    assert (means == 0).any()
    reference = float(g["cmi_corrected"])
    assert math.isinf(float(g["cmi_official"]))
    assert cmi(logits.double(), means.double(), target).item() == pytest.approx(
        reference, rel=1e-10
    )
    assert cmi(logits, means, target).item() == pytest.approx(reference, rel=1e-6)


def test_means_are_only_touched_where_one_vanishes():
    plain = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    assert torch.equal(usable(plain), plain)
    found = usable(torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64))
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.isfinite(found.log()).all()


def test_ruled_out_classes_add_nothing_and_send_no_nan():
    logits, target, means = outputs()
    logits[:, 3] = -math.inf
    target = target.clamp(max=2)
    logits.requires_grad_(True)
    found = cmi(logits, means, target)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()


def test_masks_and_dimensions():
    logits, target, means = outputs()
    mask = torch.arange(12) % 3 != 0
    kept = cmi(logits[mask], means, target[mask])
    hidden = logits.clone()
    hidden[~mask] = math.nan
    wild = target.clone()
    wild[~mask] = -100
    torch.testing.assert_close(cmi(hidden, means, wild, mask=mask), kept)
    shaped = cmi(logits.view(3, 4, 4), means, target.view(3, 4), reduction="none")
    torch.testing.assert_close(shaped.flatten(), cmi(logits, means, target, reduction="none"))
    half = cmi(logits.bfloat16(), means, target)
    assert half.dtype == torch.float32


def test_bad_input_is_told():
    logits, target, means = outputs()
    with pytest.raises(ModelError, match="centroids of shape"):
        cmi(logits, means[:3], target)
    with pytest.raises(ModelError, match="targets of shape"):
        cmi(logits, means, target[:5])
    with pytest.raises(RecipeError, match="reduction"):
        cmi(logits, means, target, reduction="max")
