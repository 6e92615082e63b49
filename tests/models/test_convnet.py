from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.convnet import ConvNet

CASES = {
    "convnet_instance": {"size": 16, "width": 6, "depth": 3, "norm": "instance"},
    "convnet_instance_1ch28": {"size": 28, "width": 4, "depth": 3, "norm": "instance"},
    "convnet_batch": {"size": 8, "width": 4, "depth": 2, "norm": "batch"},
    "convnet_layer": {"size": 8, "width": 4, "depth": 2, "norm": "layer"},
    "convnet_group": {"size": 8, "width": 8, "depth": 2, "norm": "group"},
}


def stored_weights(case: dict, prefix: str = "w.") -> dict[str, torch.Tensor]:
    """`w.<k>.<name>` arrays as a state dict in float64."""
    found = sorted(k for k in case if k.startswith(prefix))
    return {k[len(prefix) + 3 :]: torch.from_numpy(case[k]).double() for k in found}


@pytest.mark.parametrize("name", sorted(CASES))
def test_reproduces_the_released_network(golden, name):
    case = golden("dd_common").case(name)
    x = torch.from_numpy(case["x"]).double().requires_grad_()
    net = ConvNet(x.shape[1], case["logits"].shape[1], **CASES[name]).double()
    weights = stored_weights(case)
    assert list(weights) == [k for k, _ in net.named_parameters()], "parameter order and names"
    net.load_state_dict(weights, strict=name != "convnet_batch")

    logits, taps = net.tapped(x)
    (torch.from_numpy(case["cotangent"]).double() * logits).sum().backward()

    def same(mine, term):
        torch.testing.assert_close(
            mine.detach(), torch.from_numpy(case[term]), rtol=1e-9, atol=1e-12
        )

    same(logits, "logits")
    same(taps["embed"], "embed")
    same(x.grad, "grad_x")
    for term in case:
        if term.startswith("tap"):
            same(taps[f"act{term[3:]}"], term)
        if term.startswith("after."):
            stored = torch.from_numpy(case[term])
            torch.testing.assert_close(net.state_dict()[term[6:]], stored, rtol=1e-9, atol=1e-12)
    if "logits_eval" in case:
        same(net.eval()(x), "logits_eval")


def test_parameter_counts(golden):
    vectors = golden("dd_common")
    for case in vectors.json["param_counts"]:
        net = ConvNet(
            case["channels"],
            case["classes"],
            case["size"],
            width=case["width"],
            depth=case["depth"],
            norm=case["norm"].removesuffix("norm"),
        )
        assert sum(p.numel() for p in net.parameters()) == case["params"]
    vectors.count("param_counts")


def test_embedding_width_of_the_standard_setting():
    assert ConvNet().embed_width == 2048
    assert ConvNet(1, 10, 28).embed_width == 2048


def test_instance_norm_is_per_sample_statistics_with_scale_and_shift():
    torch.manual_seed(0)
    norm = ConvNet(3, 2, 8, width=5, depth=1).features[1]
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.uniform_(-1.0, 1.0)
    x = torch.randn(3, 5, 8, 8)
    expected = F.instance_norm(x) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("norm", ["instance", "layer", "group", "none"])
def test_train_and_eval_are_one_function_without_batch_norm(norm):
    net = ConvNet(3, 4, 16, width=8, depth=2, norm=norm)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net.train()(x), net.eval()(x))


def test_taps_name_modules_whose_output_is_what_tapped_returns():
    net = ConvNet(3, 4, 32, width=8, depth=3)
    x = torch.randn(2, 3, 32, 32)
    caught = {}
    for name, path in net.taps.items():
        net.get_submodule(path).register_forward_hook(
            lambda _m, _i, out, name=name: caught.__setitem__(name, out)
        )
    logits = net(x)
    again, taps = net.tapped(x)
    torch.testing.assert_close(logits, again)
    assert list(caught) == list(taps) == ["act0", "act1", "act2", "embed"]
    assert [tuple(taps[f"act{i}"].shape[2:]) for i in range(3)] == [(32, 32), (16, 16), (8, 8)]
    for name, value in caught.items():
        assert torch.equal(value, taps[name])


def test_only_one_channel_images_of_28_are_padded_by_three():
    assert ConvNet(1, 10, 28, width=4).features[0].padding == (3, 3)
    for channels, size in ((1, 8), (1, 16), (3, 28)):
        net = ConvNet(channels, 10, size, width=4)
        assert net.features[0].padding == (1, 1)
        assert net(torch.randn(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "sigmoid", "swish"])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_every_activation_and_pooling_builds_and_runs(act, pooling):
    net = ConvNet(2, 3, (8, 12), width=4, depth=2, act=act, pooling=pooling)
    logits, taps = net.tapped(torch.randn(2, 2, 8, 12))
    assert logits.shape == (2, 3)
    assert taps["embed"].shape == (2, net.embed_width)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "instanec"}, "did you mean 'instance'"),
        ({"act": "rleu"}, "did you mean 'relu'"),
        ({"pooling": "mean"}, "no pooling 'mean'"),
        ({"size": 4, "depth": 4}, "too small for depth 4"),
        ({"norm": "group", "width": 6}, "width 6 is no multiple"),
        ({"width": 0}, "width must be at least 1"),
    ],
)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(ModelError, match=message):
        ConvNet(**settings)
