from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from stillhouse.batch import Shuffled, TensorSource
from stillhouse.clock import Clock
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.log import RunLog
from stillhouse.engine.step import Training
from stillhouse.errors import RecipeError
from stillhouse.models.convnet import ConvNet
from stillhouse.objective import Objective
from stillhouse.parts.gradient import Sharpness


def doubles(case):
    return {k: torch.from_numpy(v) if v.dtype.kind == "i" else torch.from_numpy(v).double()
            for k, v in case.items()}  # fmt: skip


def quadratic(hessian, theta):
    """`grads` of .5 theta^T H theta, read where theta stands when it is called."""
    return lambda *sets: [[hessian @ theta] for _ in sets]


# ----------------------------------------------------------------------------- reference
@pytest.mark.parametrize(
    ("name", "rho", "alpha", "adaptive"),
    [
        ("quad_plain", 0.1, 0.3, False),
        ("quad_adaptive", 0.1, 0.3, True),
        ("quad_zero_weight", 0.05, 1.0, True),
    ],
)
def test_a_step_on_a_quadratic(golden, name, rho, alpha, adaptive):
    case = doubles(golden("ftd").case(name))
    theta, hessian = case["theta"].clone(), case["H"]
    rule = Sharpness(rho, alpha, adaptive)
    (step,) = rule.perturbation([case["g"]], [theta])
    torch.testing.assert_close(step, case["e"], rtol=1e-9, atol=1e-12)
    (update,) = rule(quadratic(hessian, theta), [theta])
    assert torch.equal(theta, case["theta"])
    torch.testing.assert_close(update, case["update"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theta - 0.1 * update, case["theta_after"], rtol=1e-9, atol=1e-12)
    orthogonal = (case["g_plus"] - update) / alpha
    torch.testing.assert_close(orthogonal, case["g_perp"], rtol=1e-7, atol=1e-10)
    assert abs(orthogonal @ case["g_plus"]) < 1e-9


def test_the_penalty_form(golden):
    case = doubles(golden("ftd").case("penalty"))
    theta = case["theta"].clone()
    rule = Sharpness(0.1, 0.3, adaptive=False, form="penalty")
    (update,) = rule(quadratic(case["H"], theta), [theta])
    torch.testing.assert_close(update, case["grad"], rtol=1e-12, atol=1e-12)


class Classify(Objective):
    """Cross-entropy of a bare module."""

    def forward(self, batch, knowledge, clock):
        return {"task": F.cross_entropy(self.student(batch["x"]), batch["target"])}


def trained(net, x, labels, rule, steps, lr=0.01, accumulate=1):
    """The engine's steps on one fixed batch; parameters after each, and the losses."""
    source = TensorSource({"x": x, "target": labels})
    objective = Classify(net)
    objective.train()
    clock = Clock(total=steps)
    training = Training(
        objective, Shuffled(source, len(x), shuffle=False), teacher=None, gradient=rule,
        optim=lambda p: SGD(p, lr=lr), hardware=Hardware(), log=RunLog(None), stage="x",
        clock=clock, log_every=1, accumulate=accumulate,
    )  # fmt: skip
    found = []
    for step in range(steps):
        clock.step = step
        training(None, clock)
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        found.append((flat, training.last["task"]))
    return found


@pytest.mark.parametrize(
    ("name", "norm", "rho", "alpha", "adaptive"),
    [
        ("gsam_net_adaptive", "instance", 0.01, 0.3, True),
        ("gsam_net_plain", "instance", 0.05, 1.0, False),
        ("gsam_net_batchnorm", "batch", 0.01, 0.3, True),
    ],
)
def test_steps_of_an_expert_in_the_engine(golden, name, norm, rho, alpha, adaptive):
    case = doubles(golden("ftd").case(name))
    net = ConvNet(3, 3, 8, width=4, depth=2, norm=norm).double()
    weights = {k.split(".", 2)[2]: v for k, v in case.items() if k.startswith("w.")}
    net.load_state_dict(weights, strict=False)
    steps = sum(k.startswith("params_after.") for k in case)
    rule = Sharpness(rho, alpha, adaptive)
    found = trained(net, case["x"], case["labels"], rule, steps)
    for step, (flat, loss) in enumerate(found):
        torch.testing.assert_close(flat, case[f"params_after.{step}"], rtol=1e-8, atol=1e-12)
        assert loss == pytest.approx(float(case[f"loss.{step}"]), rel=1e-8)
    for key, value in case.items():
        if key.startswith("buffer_after."):
            ours = dict(net.named_buffers())[key.removeprefix("buffer_after.")]
            torch.testing.assert_close(ours, value.to(ours.dtype))


# ----------------------------------------------------------------------------- properties
def toy(seed=0):
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvNet(3, 3, 8, width=4, depth=1).double()
    return net, torch.randn(6, 3, 8, 8, generator=rng).double(), torch.tensor([0, 1, 2, 0, 1, 2])


def test_rho_zero_is_plain_descent_for_every_alpha():
    plain = trained(*toy(), None, 3)
    for alpha in (0.0, 0.7):
        found = trained(*toy(), Sharpness(0.0, alpha), 3)
        torch.testing.assert_close(found[-1][0], plain[-1][0], rtol=1e-10, atol=1e-13)
    other = trained(*toy(), Sharpness(0.05, 0.0, adaptive=False), 3)
    assert not torch.allclose(other[-1][0], plain[-1][0])


def test_a_rate_of_zero_leaves_the_parameters_bit_for_bit():
    net, x, labels = toy()
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = trained(net, x, labels, Sharpness(0.1, 0.3), 2, lr=0.0)
    assert torch.equal(found[-1][0], before)


def test_micro_batches_give_the_step_of_the_whole():
    whole = trained(*toy(), Sharpness(0.1, 0.3), 3)
    parts = trained(*toy(), Sharpness(0.1, 0.3), 3, accumulate=3)
    # shares of micro-batches are float32
    torch.testing.assert_close(parts[-1][0], whole[-1][0], rtol=1e-6, atol=1e-8)


def test_size_of_the_perturbation():
    rng = torch.Generator().manual_seed(1)
    params = [torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng), torch.zeros(2)]
    grads = [torch.randn(p.shape, generator=rng) for p in params[:2]] + [None]
    plain = Sharpness(0.2, adaptive=False).perturbation(grads, params)
    assert plain[2] is None
    norm = torch.cat([e.flatten() for e in plain[:2]]).norm()
    assert norm == pytest.approx(0.2, rel=1e-5)
    relative = Sharpness(0.2).perturbation(grads, params)
    scaled = [(e / p.abs()).flatten() for e, p in zip(relative[:2], params, strict=False)]
    assert torch.cat(scaled).norm() == pytest.approx(0.2, rel=1e-5)


def test_averages_over_all_batches_count_the_first_pass_only():
    net = nn.Sequential(nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 2)).double()
    twin = nn.Sequential(nn.BatchNorm1d(2, momentum=None), nn.Linear(2, 2)).double()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double()
    labels = torch.tensor([0, 1])
    trained(net, x, labels, Sharpness(0.1), 3)
    trained(twin, x, labels, None, 3)
    assert torch.equal(net[0].running_mean, twin[0].running_mean)
    assert net[0].momentum is None


def test_bad_settings_are_told():
    with pytest.raises(RecipeError, match="at least 0"):
        Sharpness(-0.1)
    with pytest.raises(RecipeError, match="form"):
        Sharpness(form="flat")
    assert repr(Sharpness()) == "Sharpness(rho=0.01, alpha=0.3, adaptive=True, form='gsam')"
