from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.losses.score import (
    diff_instruct,
    guided,
    noise_prediction,
    sample_weight,
    score_identity,
)


def flat(value: float) -> torch.Tensor:
    return torch.full((2, 1, 2, 3), value, dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "each"), [(1.2, 0.4), (1.0, 0.5)])
def test_the_loss_of_known_images(alpha, each):
    found = score_identity(flat(0), flat(2), flat(1), alpha=alpha, reduction="none")
    torch.testing.assert_close(found, torch.full((2,), 6 * each, dtype=torch.float64))


def test_scores_that_agree_give_neither_loss_nor_gradient():
    x0 = flat(0.3).requires_grad_()
    seen = 2 * x0 + 1
    loss = score_identity(x0, seen, 2 * x0 + 1, alpha=1.2)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(x0.grad.abs().max()) == 0.0


def test_the_weight_has_no_gradient_and_a_floor():
    x0 = flat(1.0).requires_grad_()
    weight = sample_weight(3 * x0, x0)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.full((2,), 2.0, dtype=torch.float64))
    assert float(sample_weight(x0, x0).max()) == pytest.approx(1e-5)
    assert torch.isfinite(score_identity(x0, x0 * 1, flat(0.5), alpha=1.2))


def test_gradients_pass_through_both_networks_unless_it_is_diff_instruct():
    x0 = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    p, s = torch.tanh(2 * x0), torch.tanh(x0)
    (through,) = torch.autograd.grad(score_identity(x0, p, s), x0, retain_graph=True)
    (direct,) = torch.autograd.grad(diff_instruct(x0, p, s), x0)
    weight = sample_weight(p, x0)[:, None, None, None]
    torch.testing.assert_close(direct, -((p - s) / weight).detach() / 3)
    assert not torch.allclose(through, direct)


def test_noise_prediction_is_a_sum_over_an_image():
    noise, found = torch.randn(2, 5, 2, 4, 4).unbind(0)
    assert float(noise_prediction(noise, noise)) == 0.0
    once = noise_prediction(found, noise)
    tall = noise_prediction(torch.cat([found, found], 2), torch.cat([noise, noise], 2))
    torch.testing.assert_close(tall, 2 * once)
    each = noise_prediction(found, noise, reduction="none")
    torch.testing.assert_close(each.mean(), once)
    torch.testing.assert_close(each.sum(), noise_prediction(found, noise, reduction="sum"))


def test_guidance():
    one, none = torch.randn(2, 3, 4).unbind(0)
    assert guided(one, none, 0.0) is one
    half = guided(one, none, 0.5)
    torch.testing.assert_close(guided(one, none, 1.0) - one, 2 * (half - one))
    torch.testing.assert_close(guided(one, none, 1.5), none + 2.5 * (one - none))


def test_what_does_not_fit_is_told():
    with pytest.raises(ModelError, match=r"\(2, 1, 2, 3\).*\(2, 1, 2, 2\)"):
        noise_prediction(flat(0), flat(0)[..., :2])
    with pytest.raises(ModelError, match="reduction"):
        score_identity(flat(0), flat(1), flat(2), reduction="max")  # type: ignore[arg-type]


def test_half_precision_is_widened_before_anything_is_subtracted():
    one, other = (
        torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(k)).bfloat16()
        for k in (0, 1)
    )
    wide = [v.double() for v in (one, other)]
    found = noise_prediction(one, other, reduction="none").double()
    expected = noise_prediction(*wide, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        sample_weight(one, other).double(), sample_weight(*wide), rtol=1e-5, atol=0
    )
