"""The multilayer perceptron."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.mlp import MLP


def test_shapes_taps_and_gradient():
    net = MLP(classes=3, inputs=12, widths=(8, 5))
    out = net(torch.randn(4, 3, 2, 2))
    assert out.shape == (4, 3)
    assert list(net.taps) == ["hidden1", "hidden2"]
    assert net.get_submodule(net.taps["hidden2"])(torch.randn(4, 8)).shape == (4, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_no_hidden_layer_is_a_linear_classifier():
    net = MLP(classes=3, inputs=4, widths=())
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.allclose(net(x) + net(y), net(x + y) + net(torch.zeros(1, 4)), atol=1e-5)
    assert sum(p.numel() for p in net.parameters()) == 15


def test_dropout_acts_in_training_only():
    net = MLP(inputs=4, widths=(64,), dropout=0.5)
    x = torch.randn(2, 4)
    assert torch.equal(net.eval()(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    "settings", [{"classes": 0}, {"inputs": 0}, {"widths": (4, 0)}, {"dropout": 1.0}]
)
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(ModelError, match="numbers >= 1 and dropout in"):
        MLP(**settings)


def test_another_size_of_samples_is_told():
    with pytest.raises(ModelError, match="reads 4 numbers per sample, not 6"):
        MLP(inputs=4)(torch.randn(2, 6))
