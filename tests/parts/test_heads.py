from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.net import Net
from stillhouse.parts.heads import ExtraHead, WideHead, widen, widen_net


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


def test_a_last_batch_of_one_row_is_taken():
    head = ExtraHead(
        (6, 3), "nonlinear", hidden=64, dropout=0.0, generator=torch.Generator().manual_seed(0)
    ).train()
    x = torch.ones(1, 6, requires_grad=True)
    found = head(x)
    found.sum().backward()
    assert bool((x.grad != 0).any())
    assert int(head.net[2].num_batches_tracked) == 0
    torch.testing.assert_close(found, head.eval()(x))


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


class Classifier(nn.Module):
    """A backbone and a head in a sequence, as torchvision has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):
        return self.classifier(self.body(x))


@pytest.mark.parametrize("shape", [(5,), (2, 5), ()])
def test_a_fold_sums_the_probabilities_of_each_class(shape):
    joint = 3 * torch.randn(*shape, 12, generator=torch.Generator().manual_seed(0))
    folded = WideHead.fold(joint, 4)
    assert folded.shape == (*shape, 3)
    summed = joint.softmax(-1).reshape(*shape, 3, 4).sum(-1)
    torch.testing.assert_close(folded.softmax(-1), summed)
    assert torch.equal(folded.argmax(-1), summed.argmax(-1))
    assert WideHead.fold(joint, 1) is joint
    half = WideHead.fold(joint.half() * 200, 4)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()
    with pytest.raises(ModelError, match="no whole number of classes of 5"):
        WideHead.fold(joint, 5)


def test_a_wide_head_takes_the_place_of_the_last_layer_and_its_taps():
    torch.manual_seed(0)
    module = Classifier().double()
    net = Net(module, taps={"head:input": "classifier.1:input", "scores": "classifier.1"})
    assert widen_net(net, 4, "joint") == "classifier.1"
    x = torch.randn(7, 4).double()
    out = net(x)
    joint = out["taps"]["joint"]
    assert joint.shape == (7, 12)
    assert joint.dtype == torch.float64
    assert torch.equal(out["logits"], WideHead.fold(joint, 4))
    assert torch.equal(out["taps"]["scores"], out["logits"])
    torch.testing.assert_close(out["taps"]["head:input"], torch.relu(module.body(x)))
    assert net.head() == "classifier.1.wide"
    assert net.head_layer().out_features == 12
    assert Net(module).head() == "classifier.1.wide"


def test_widening_a_fresh_module_makes_room_for_the_same_weights():
    widened = widen(Classifier(), "classifier.1", 2)
    again = widen(Classifier(), "classifier.1", 2)
    again.load_state_dict(widened.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(widened(x), again(x))
    with pytest.raises(ModelError, match="did you mean 'classifier"):
        widen(Classifier(), "clasifier.1", 2)
    with pytest.raises(ModelError, match="of Classifier is a ReLU"):
        widen(Classifier(), "classifier.0", 2)
    with pytest.raises(RecipeError, match="at least 1 output per class"):
        WideHead((6, 3), 0)
