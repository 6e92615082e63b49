"""Two heads in one module, and the probe of how their losses pull."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.artifact import alterations_of, altered
from stillhouse.clock import Clock
from stillhouse.errors import CheckpointError, ModelError, RecipeError
from stillhouse.parts.conflict import ConflictProbe
from stillhouse.parts.mixing import mix_probabilities
from stillhouse.parts.two_heads import TwoHeads


def model(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, classes))


def test_both_heads_read_the_same_features():
    inner = model()
    two = TwoHeads(inner)
    x = torch.randn(6, 3)
    out = two(x)
    features = inner[1](inner[0](x))
    torch.testing.assert_close(out["ce"], inner[2](features))
    torch.testing.assert_close(out["kd"], two.second(features))
    mixed = mix_probabilities(out["ce"], out["kd"], alpha=0.5, beta=0.5)
    torch.testing.assert_close(out["logits"].exp(), mixed)
    two.set_mix(0.2, 4.0)
    mixed = mix_probabilities(out["ce"], out["kd"], alpha=0.2, beta=4.0)
    torch.testing.assert_close(two(x)["logits"].softmax(-1), mixed)


def test_probabilities_of_nothing_stay_finite():
    two = TwoHeads(model())
    with torch.no_grad():
        two.net.head_layer().bias.copy_(torch.tensor([900.0, 0, 0, 0]))
        two.second.net.bias.copy_(torch.tensor([900.0, 0, 0, 0]))
    assert torch.isfinite(two(torch.zeros(2, 3))["logits"]).all()


def test_the_second_head_may_begin_as_the_first():
    two = TwoHeads(model(), kind="cosine", scale=10.0, copy=True)
    assert torch.equal(two.second.net.weight, two.net.head_layer().weight)
    two.net.head_layer().weight.data.zero_()
    assert two.second.net.weight.any()  # a copy, not the same
    bare = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False))
    assert not TwoHeads(bare, copy=True).second.net.bias.any()


def test_the_backbone_is_what_lies_below_both():
    two = TwoHeads(model())
    assert {tuple(p.shape) for p in two.backbone()} == {(5, 3), (5,)}


def test_a_copy_catches_its_own_features():
    two = TwoHeads(model())
    other = copy.deepcopy(two)
    with torch.no_grad():
        two.net.module[0].weight.zero_()
    x = torch.randn(2, 3)
    assert not torch.equal(two(x)["kd"], other(x)["kd"])


def test_it_is_built_again_around_the_model():
    two = TwoHeads(model(), kind="cosine", scale=7.0)
    changes = alterations_of(two)
    assert changes == [
        {
            "by": "stillhouse.parts.two_heads:TwoHeads",
            "options": {"head": "2", "kind": "cosine", "scale": 7.0},
        }
    ]
    again = altered(model(), {"altered": changes})
    again.load_state_dict(two.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(again(x)["logits"], two(x)["logits"])
    assert alterations_of(model()) == []
    plain = model()
    assert altered(plain, {}) is plain
    assert altered(again, {"altered": changes}) is again


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("os:system", "not of a package"),
        ("stillhouse.parts.two_heads:Three", "cannot be found"),
        ("stillhouse.parts.two_heads:TwoHeads", "cannot be built again"),
        ("stillhouse.parts.two_heads:KINDS", "cannot be built again"),
    ],
)
def test_what_an_artifact_may_not_put_around_a_model(by, message):
    with pytest.raises(CheckpointError, match=message):
        altered(model(), {"altered": [{"by": by, "options": {"heads": 3}}]})


def test_bad_heads_are_told():
    with pytest.raises(RecipeError, match="did you mean 'cosine'"):
        TwoHeads(model(), kind="cosin")
    with pytest.raises(ModelError, match="no linear layer"):
        TwoHeads(nn.Conv2d(1, 2, 3))
    with pytest.raises(ModelError, match="alpha lies in"):
        TwoHeads(model()).set_mix(0.5, 0.0)
    with pytest.raises(ModelError, match="gives 5 logits, its last linear layer"):
        _odd()(torch.randn(2, 3))


def _odd() -> TwoHeads:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.more = nn.Linear(3, 4), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.cat([self.fc(x), x[:, :1] * self.more], -1)

    return TwoHeads(Odd())


# ---- the probe -------------------------------------------------------------------------------


def test_the_cosine_between_two_losses():
    net = model()
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    probe, params = ConflictProbe(2), list(net[0].parameters())
    one, other = F.cross_entropy(net(x), y), net(x).square().mean()
    found = probe.measure(one, other, params)
    grads = [torch.autograd.grad(v, params, retain_graph=True) for v in (one, other)]
    flat = [torch.cat([g.flatten() for g in own]) for own in grads]
    torch.testing.assert_close(found, F.cosine_similarity(*flat, dim=0))
    assert probe.mean() is None  # proposed, not yet accepted
    probe.settle(True)
    assert probe.mean() == pytest.approx(found.item())
    assert probe.measure(one, one, params).item() == pytest.approx(1.0)
    assert probe.measure(one, -one, params).item() == pytest.approx(-1.0)
    assert probe.measure(one, other, [nn.Parameter(x)]) is None
    (one + other).backward()  # the graph is still there


def test_the_probe_is_due_now_and_then():
    probe = ConflictProbe(3)
    assert [probe.due(Clock(step=step)) for step in range(5)] == [True, False, False, True, False]
    assert not ConflictProbe(0).due(Clock())
    with torch.no_grad():
        assert not probe.due(Clock())
    with pytest.raises(RecipeError, match="at least 0"):
        ConflictProbe(-1)
