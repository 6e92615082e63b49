from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.features import attention_map, attention_matching

MAPS = {
    "p1": {"power": 1},
    "p2": {"power": 2},
    "p4": {"power": 4},
    "p0_abs_sum_l2": {"power": 1},
    "p4_l1": {"power": 4, "normalise": "l1"},
    "p2_none": {"power": 2, "normalise": "none"},
}


@pytest.mark.parametrize("name", ["attention_signed", "attention_relu"])
def test_attention_maps_reproduce_the_released_ones(golden, name):
    case = {k: torch.from_numpy(v).double() for k, v in golden("datadam").case(name).items()}
    close = {"rtol": 1e-10, "atol": 1e-10}
    for term, settings in MAPS.items():
        x = case["x"].clone().requires_grad_()
        maps = attention_map(x, **settings)
        torch.testing.assert_close(maps.detach(), case[term], **close)
        if f"grad_{term}" in case:
            (case["cotangent"] * maps).sum().backward()
            torch.testing.assert_close(x.grad, case[f"grad_{term}"], **close)
    official = attention_map(case["x"][2:], 2, normalise="fro_official")
    torch.testing.assert_close(official.reshape(3, 3, 4), case["p2_fro_official"], **close)
    frobenius = attention_map(case["x"], 2, normalise="frobenius")
    torch.testing.assert_close(frobenius, case["p2"], **close)


def test_the_worked_example():
    features = torch.tensor([[[1.0, 2.0], [2.0, 0.0]]])
    expected = torch.tensor([[3.0, 2.0]]) / math.sqrt(13)
    torch.testing.assert_close(attention_map(features, 1), expected)
    expected = torch.tensor([[17.0, 16.0]]) / math.sqrt(545)
    torch.testing.assert_close(attention_map(features, 4), expected)


@pytest.mark.parametrize("power", [1, 2, 4, 8])
def test_maps_have_unit_norm_are_not_negative_and_ignore_scale(power):
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    maps = attention_map(x, power)
    torch.testing.assert_close(maps.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert maps.min() >= 0
    torch.testing.assert_close(attention_map(7.0 * x, power), maps)


def test_no_activation_gives_the_zero_map_with_a_finite_gradient():
    for normalise in ("l2", "l1", "frobenius", "none", "fro_official"):
        for power in (1, 4):
            x = torch.zeros(2, 3, 2, 2, requires_grad=True)
            maps = attention_map(x, power, normalise=normalise)
            maps.sum().backward()
            assert maps.abs().sum() == 0
            assert x.grad.abs().sum() == 0


def test_max_over_channels():
    features = torch.tensor([[[1.0, -3.0], [2.0, 0.0]]])
    maps = attention_map(features, 2, pool="max", normalise="none")
    assert maps.tolist() == [[4.0, 9.0]]


def test_half_precision_is_widened():
    x = torch.full((1, 64, 4, 4), 30.0, dtype=torch.float16)  # 30^4 * 64 overflows float16
    torch.testing.assert_close(attention_map(x, 4), torch.full((1, 16), 0.25))


def test_features_without_channels_to_pool_or_space_are_told():
    with pytest.raises(ModelError, match="positions"):
        attention_map(torch.zeros(2, 3))
    with pytest.raises(RecipeError, match="positive"):
        attention_map(torch.zeros(2, 3, 4), 0)
    with pytest.raises(RecipeError, match="got 'L2'"):
        attention_map(torch.zeros(2, 3, 4), normalise="L2")
    with pytest.raises(RecipeError, match="got 'mean'"):
        attention_map(torch.zeros(2, 3, 4), pool="mean")


# ------------------------------------------------------------------------- matching
def matched(syn, real, ours=2, theirs=3, **settings):
    return attention_matching(syn, real, synthetic_counts=ours, real_counts=theirs, **settings)


def test_maps_are_normalised_before_they_are_averaged():
    real = torch.zeros(2, 1, 1, 2)
    real[0, 0, 0, 0], real[1, 0, 0, 1] = 5.0, 0.1  # one-hot maps at different pixels
    syn = torch.tensor([[[[3.0, 0.0]]]])
    torch.testing.assert_close(matched(syn, real, 1, 2), torch.tensor(0.5))


def test_matching_sums_over_positions_and_classes():
    syn = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    real = torch.randn(6, 5, 4, 4, dtype=torch.float64)  # channels may differ, positions not
    a = attention_map(syn, 4).reshape(2, 2, 16).mean(1)
    b = attention_map(real, 4).reshape(2, 3, 16).mean(1)
    torch.testing.assert_close(matched(syn, real), (a - b).square().sum())
    torch.testing.assert_close(matched(syn, real, reduction="none"), (a - b).square().sum(1))
    torch.testing.assert_close(matched(syn, real, error="absolute"), (a - b).abs().sum())
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(matched(syn, real, error="angular"), (1 - cosine).sum())
    unequal = matched(syn, real, [1, 3], [4, 2])
    maps_s, maps_r = attention_map(syn, 4), attention_map(real, 4)
    expected = (maps_s[:1].mean(0) - maps_r[:4].mean(0)).square().sum()
    expected += (maps_s[1:].mean(0) - maps_r[4:].mean(0)).square().sum()
    torch.testing.assert_close(unequal, expected)


def test_identical_batches_give_zero_and_no_gradient():
    syn = torch.rand(6, 3, 4, 4, requires_grad=True)
    real = syn.detach().clone().requires_grad_()
    loss = matched(syn, real, 3, 3)
    loss.backward()
    assert loss == 0
    assert syn.grad.abs().sum() == 0
    assert real.grad is None


def test_order_within_a_class_is_free_but_classes_are_not():
    syn, real = torch.rand(4, 3, 4, 4).double(), torch.rand(6, 3, 4, 4).double()
    loss = matched(syn, real)
    torch.testing.assert_close(matched(syn[[1, 0, 3, 2]], real[[2, 0, 1, 5, 4, 3]]), loss)
    assert (matched(syn[[2, 3, 0, 1]], real) - loss).abs() > 1e-6


def test_layers_that_do_not_fit_are_told():
    with pytest.raises(ModelError, match="cannot be matched"):
        matched(torch.rand(4, 3, 4, 4), torch.rand(6, 3, 2, 2))
    with pytest.raises(RecipeError, match="got 'mse'"):
        matched(torch.rand(4, 3, 4, 4), torch.rand(6, 3, 4, 4), error="mse")
    with pytest.raises(RecipeError, match="got 'mean'"):
        matched(torch.rand(4, 3, 4, 4), torch.rand(6, 3, 4, 4), reduction="mean")
