from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.heads import ExtraHead


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("source", [(6, 4), nn.Linear(6, 4)])
def test_logits_from_the_features_of_the_main_head(kind, source):
    head = ExtraHead(source, kind)
    assert head(torch.randn(5, 6)).shape == (5, 4)
    assert head(torch.randn(5, 3, 6)).shape == (5, 3, 4)


def test_the_nonlinear_kind_is_that_of_the_sheet():
    layers = list(ExtraHead((6, 4), "nonlinear").net)
    kinds = [nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in layers] == kinds
    assert layers[0].out_features == layers[2].num_features == 200
    assert layers[1].p == 0.1


def test_the_gradient_reaches_the_features():
    features = torch.randn(5, 6, requires_grad=True)
    ExtraHead((6, 4))(features).sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_tokens_share_one_batch_norm():
    head = ExtraHead((6, 4), "nonlinear", dropout=0.0)
    x = torch.randn(5, 3, 6)
    assert torch.allclose(head(x), head(x.reshape(15, 6)).reshape(5, 3, 4))


def test_weights_are_a_function_of_the_generator():
    def make(seed: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return ExtraHead((6, 4), "nonlinear", generator=rng).state_dict()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, w) for v, w in zip(first.values(), make(0).values(), strict=True))
    assert not torch.equal(first["net.0.weight"], make(1)["net.0.weight"])
    bound = 1 / 6**0.5
    assert first["net.0.weight"].abs().max() <= bound
    assert first["net.0.weight"].abs().max() > 0.9 * bound


def test_device_and_dtype_follow_the_main_head():
    head = ExtraHead(nn.Linear(6, 4, dtype=torch.float64))
    assert head.net.weight.dtype == torch.float64


def test_bad_input_is_told():
    with pytest.raises(RecipeError, match="did you mean 'nonlinear'"):
        ExtraHead((6, 4), "non-linear")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="dropout"):
        ExtraHead((6, 4), "nonlinear", dropout=1.0)
    with pytest.raises(ModelError, match="Conv2d"):
        ExtraHead(nn.Conv2d(3, 4, 1))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"width 6.*tap the input"):
        ExtraHead((6, 4))(torch.randn(5, 7))
