from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.distributions import (
    cf_distance,
    characteristic,
    class_means,
    dm,
    gradient_cosine,
    trajectory_distance,
)
from stillhouse.models.convnet import ConvNet


def doubles(case: dict) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v).double() for k, v in case.items() if v.dtype.kind == "f"}


def weights_of(case: dict, prefix: str) -> dict[str, torch.Tensor]:
    found = sorted(k for k in case if k.startswith(prefix))
    return {k[len(prefix) + 3 :]: torch.from_numpy(case[k]).double() for k in found}


def lists(case: dict, name: str) -> list[torch.Tensor]:
    return [case[f"{name}.{i}"] for i in range(5)]


# ------------------------------------------------------------------------------ dm
def test_dm_reproduces_the_released_loss(golden):
    case = golden("dd_common").case("dm")
    net = ConvNet(3, 3, 8, width=6, depth=2).double().requires_grad_(False)
    net.load_state_dict(weights_of(case, "w."))
    case = doubles(case)
    syn = case["syn"].requires_grad_()
    real = net.embedding(case["real"])
    counts = {"synthetic_counts": 2, "real_counts": 4}
    loss = dm(net.embedding(syn), real, **counts)
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss.detach(), case["loss"], **close)
    torch.testing.assert_close(syn.grad, case["grad_syn"], **close)
    per_class = dm(net.embedding(syn), real, reduction="none", **counts)
    torch.testing.assert_close(per_class.detach(), case["per_class"], **close)


def test_dm_with_unequal_counts_is_the_written_out_sum():
    syn, real = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    expected = (syn[:2].mean(0) - real[:6].mean(0)).square().sum()
    expected += (syn[2:].mean(0) - real[6:].mean(0)).square().sum()
    found = dm(syn, real, synthetic_counts=[2, 3], real_counts=[6, 3])
    torch.testing.assert_close(found, expected)


def test_dm_sends_no_gradient_to_the_real_side_and_is_zero_for_equal_batches():
    x = torch.randn(6, 4, requires_grad=True)
    real = x.detach().clone().requires_grad_()
    loss = dm(x, real, synthetic_counts=3, real_counts=3)
    loss.backward()
    assert loss == 0
    assert x.grad.abs().sum() == 0
    assert real.grad is None


def test_class_means_of_half_precision_are_made_in_float32():
    x = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    assert class_means(x, 4096).dtype == torch.float32
    assert class_means(x, [4096]).item() == 1.0


def test_counts_that_do_not_fit_are_told():
    x = torch.zeros(6, 2)
    with pytest.raises(ModelError, match="no whole number of classes of 4"):
        class_means(x, 4)
    with pytest.raises(ModelError, match="add up to 6"):
        class_means(x, [2, 2])
    with pytest.raises(ModelError, match="positive"):
        class_means(x, [6, 0])
    with pytest.raises(ModelError, match="shapes differ"):
        dm(x, x, synthetic_counts=3, real_counts=2)
    with pytest.raises(RecipeError, match="'sum' or 'none'"):
        dm(x, x, synthetic_counts=3, real_counts=3, reduction="mean")


# ------------------------------------------------------------------ gradient distance
def test_gradient_distance_reproduces_the_released_one(golden):
    case = doubles(golden("dd_common").case("grad_distance"))
    real = lists(case, "real")
    syn = [t.clone().requires_grad_() for t in lists(case, "syn")]
    loss = gradient_cosine(syn, real)
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(loss.detach(), case["ours"], **close)
    for i, tensor in enumerate(syn):
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(grad, case[f"ours_grad_syn.{i}"], **close)
    per_tensor = gradient_cosine(syn, real, reduction="none")
    torch.testing.assert_close(per_tensor.detach(), case["ours_per_tensor"], **close)
    for form, term in (("mse", "mse"), ("cosine", "cos")):
        found = gradient_cosine(syn, real, form=form)
        torch.testing.assert_close(found.detach(), case[term], **close)


def test_gradient_distance_properties():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(*s, generator=generator) for s in ((4, 3, 3, 3), (4,), (5, 8))]
    negative = [-g for g in grads]
    assert gradient_cosine(grads, grads).abs() < 1e-5
    torch.testing.assert_close(gradient_cosine(negative, grads), torch.tensor(2.0 * 9))
    assert gradient_cosine(negative, grads, reduction="none")[1] == 0
    scaled = gradient_cosine([7 * g for g in negative], [0.5 * g for g in grads])
    torch.testing.assert_close(scaled, torch.tensor(2.0 * 9))
    assert gradient_cosine([None, *grads[1:]], [None, *grads[1:]]).abs() < 1e-5


def test_gradients_that_cannot_be_compared_are_told():
    g = [torch.ones(2, 2)]
    with pytest.raises(ModelError, match="1 gradients cannot be compared with 2"):
        gradient_cosine(g, g * 2)
    with pytest.raises(ModelError, match="shapes differ"):
        gradient_cosine(g, [torch.ones(2, 3)])
    with pytest.raises(ModelError, match="no gradient"):
        gradient_cosine([None], [None])
    with pytest.raises(RecipeError, match="no form 'l2'"):
        gradient_cosine(g, g, form="l2")
    with pytest.raises(RecipeError, match="one value only"):
        gradient_cosine(g, g, form="mse", reduction="none")


# ------------------------------------------------------------------------- trajectories
def unrolled(net, theta, images, labels, chunks, lr):
    """Plain SGD on synthetic chunks, differentiable; the list of parameter vectors."""
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)
    sizes = [s.numel() for s in shapes]
    thetas = [theta]
    for rows in chunks:
        pieces = thetas[-1].split(sizes)
        named = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        loss = F.cross_entropy(functional_call(net, named, (images[rows],)), labels[rows])
        (slope,) = torch.autograd.grad(loss, thetas[-1], create_graph=True)
        thetas.append(thetas[-1] - lr * slope)
    return thetas


def test_a_trajectory_matching_step_reproduces_the_released_one(golden):
    case = golden("dd_common").case("mtt_step")
    start = torch.cat([t.flatten() for t in weights_of(case, "start.").values()])
    net = ConvNet(3, 3, 8, width=4, depth=2).double()
    labels = torch.from_numpy(case["labels"])
    chunks = [torch.from_numpy(case[f"chunk.{i}"]) for i in range(4)]
    case = doubles(case)
    images, lr = case["images"].requires_grad_(), case["lr"].requires_grad_()
    thetas = unrolled(net, start.clone().requires_grad_(), images, labels, chunks, lr)
    loss = trajectory_distance(thetas[-1], case["target"], start)
    loss.backward()
    close = {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(thetas[1].detach(), case["theta_1"], **close)
    torch.testing.assert_close(thetas[-1].detach(), case["theta_N"], **close)
    torch.testing.assert_close(loss.detach(), case["loss"], **close)
    torch.testing.assert_close(images.grad, case["grad_images"], **close)
    torch.testing.assert_close(lr.grad, case["grad_lr"], **close)
    numerator = (thetas[-1] - case["target"]).square().sum().detach()
    denominator = (start - case["target"]).square().sum()
    torch.testing.assert_close(numerator, case["numerator"], **close)
    torch.testing.assert_close(denominator, case["denominator"], **close)


def test_one_unrolled_step_against_finite_differences():
    """Sheet 10.6: one step of a linear softmax model, gradient of one pixel."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Linear(6, 3).double()
    theta, target = (torch.randn(21, generator=generator).double() for _ in range(2))
    labels = torch.tensor([0, 2])

    def loss(images):
        start = theta.clone().requires_grad_()
        last = unrolled(net, start, images, labels, [torch.arange(2)], torch.tensor(0.1))[-1]
        return trajectory_distance(last, target, theta)

    images = torch.randn(2, 6, generator=generator).double().requires_grad_()
    (grad,) = torch.autograd.grad(loss(images), images)
    step = torch.zeros_like(images)
    step[1, 4] = 1e-5
    slope = (loss((images + step).detach()) - loss((images - step).detach())) / 2e-5
    torch.testing.assert_close(grad[1, 4], slope.detach(), rtol=1e-3, atol=1e-9)


def test_one_inner_step_has_the_gradient_of_the_constant_memory_formula():
    """Sheet 10.7: for N = 1 TESLA's gradient, d/dx of 2 (lr c + lr^2 G) . g, is exact."""
    generator = torch.Generator().manual_seed(1)
    net = torch.nn.Linear(6, 3).double()
    theta, target = (torch.randn(21, generator=generator).double() for _ in range(2))
    images = torch.randn(2, 6, generator=generator).double().requires_grad_()
    labels, lr = torch.tensor([1, 2]), 0.3
    start = theta.clone().requires_grad_()
    last = unrolled(net, start, images, labels, [torch.arange(2)], lr)[-1]
    (whole,) = torch.autograd.grad(trajectory_distance(last, target, theta), images)

    start = theta.clone().requires_grad_()
    slope = (start - unrolled(net, start, images, labels, [torch.arange(2)], lr)[-1]) / lr
    way = target - theta
    product = 2 * (lr * way + lr**2 * slope.detach()) @ slope / (way @ way)
    torch.testing.assert_close(torch.autograd.grad(product, images)[0], whole)


def test_trajectory_distance_properties():
    generator = torch.Generator().manual_seed(0)
    start, target, other = (torch.randn(20, generator=generator) for _ in range(3))
    student = other.clone().requires_grad_()
    assert trajectory_distance(start, target, start) == 1  # lr = 0
    assert trajectory_distance(target, target, start) == 0
    loss = trajectory_distance(student, target.requires_grad_(), start.requires_grad_())
    rescaled = trajectory_distance(3 * student, 3 * target, 3 * start)
    torch.testing.assert_close(rescaled, loss)
    in_pieces = trajectory_distance(*(list(t.split(7)) for t in (student, target, start)))
    torch.testing.assert_close(in_pieces, loss)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert target.grad is None
    assert start.grad is None
    with pytest.raises(ModelError, match="shapes differ"):
        trajectory_distance(torch.ones(2), torch.ones(3), torch.ones(3))
    with pytest.raises(ModelError, match="2, 1 and 1"):
        trajectory_distance([torch.ones(2)] * 2, [torch.ones(2)], [torch.ones(2)])


# ------------------------------------------------------------- characteristic functions
CF = ["cf_0", "cf_1", "cf_2"]
WEIGHTS = {"cf_0": (0.5, 0.5), "cf_1": (0.001, 0.999), "cf_2": (1.0, 1.0)}


def _cf(case, weights=(0.5, 0.5)):
    t = {k: torch.from_numpy(v).double() for k, v in case.items()}
    syn = t["syn"].requires_grad_()
    found = cf_distance(syn, t["real"], t["t"], amplitude=weights[0], phase=weights[1])
    found.backward()
    return t, syn, found.detach()


@pytest.mark.parametrize("name", CF)
def test_cf_distance_is_the_released_one(golden, name):
    t, syn, found = _cf(golden("ncfm").case(name), WEIGHTS[name])
    torch.testing.assert_close(found, t["loss"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(syn.grad, t["grad_syn"], rtol=1e-9, atol=1e-10)
    for side in ("real", "syn"):
        parts = torch.stack(characteristic(t[side].detach(), t["t"]))
        torch.testing.assert_close(parts, t[f"phi_{side}"], rtol=1e-10, atol=1e-10)
    single = cf_distance(
        t["syn"].detach().float(), t["real"].float(), t["t"].float(),
        amplitude=WEIGHTS[name][0], phase=WEIGHTS[name][1],
    )  # fmt: skip
    torch.testing.assert_close(single.double(), t["loss"], rtol=1e-5, atol=0)


def test_cf_distance_of_long_features_is_the_released_one(golden):
    t, syn, found = _cf(golden("ncfm").case("cf_unnormalised"))
    torch.testing.assert_close(found, t["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(syn.grad, t["grad_syn"], rtol=1e-9, atol=1e-9)


def test_cf_distance_of_identical_features_is_the_floor(golden):
    case = {k: torch.from_numpy(v).double() for k, v in golden("ncfm").case("cf_identical").items()}
    syn = case["feats"].clone().requires_grad_()
    found = cf_distance(syn, case["feats"], case["t"])
    found.backward()
    torch.testing.assert_close(300 * found.detach(), case["loss300"], rtol=0, atol=1e-6)
    torch.testing.assert_close(syn.grad, case["grad"], rtol=0, atol=1e-6)


def test_with_both_weights_one_it_is_the_distance_of_complex_numbers():
    rng = torch.Generator().manual_seed(0)
    ours, theirs, t = (torch.randn(n, 6, generator=rng).double() for n in (5, 9, 40))
    phi = [torch.exp(1j * (x @ t.T)).mean(0) for x in (ours, theirs)]
    found = cf_distance(ours, theirs, t, amplitude=1.0, phase=1.0)
    torch.testing.assert_close(found, (phi[0] - phi[1]).abs().mean())


def test_cf_distance_in_one_dimension():
    def distance(syn, real, t, **weights):
        columns = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (syn, real, t))
        return cf_distance(*columns, **weights).item()

    half = math.pi / 2
    assert distance([half], [0.0], [1.0]) == pytest.approx(1.0)
    assert distance([half], [0.0, math.pi], [1.0]) == pytest.approx(0.7071068)
    both = ([0.5, 2.0], [0.0, 1.0], [1.0, 2.0])
    assert distance(*both) == pytest.approx(0.404745, abs=1e-6)
    assert distance(*both, amplitude=1.0, phase=1.0) == pytest.approx(0.572396, abs=1e-6)


def test_cf_distance_is_symmetric_and_sees_only_the_distribution():
    rng = torch.Generator().manual_seed(1)
    ours, theirs, t = (torch.randn(n, 4, generator=rng).double() for n in (5, 7, 30))
    found = cf_distance(ours, theirs, t)
    torch.testing.assert_close(cf_distance(theirs, ours, t), found)
    torch.testing.assert_close(cf_distance(ours.flip(0), theirs.roll(2, 0), t), found)
    torch.testing.assert_close(cf_distance(ours.repeat(3, 1), theirs, t), found)
    assert cf_distance(ours, theirs, t, reduction="none").shape == (30,)


def test_cf_distance_gives_no_gradient_to_real_features_and_a_finite_one_everywhere():
    ours, theirs = (torch.zeros(2, 1).double().requires_grad_() for _ in range(2))
    t = torch.tensor([[0.0], [1.0]]).double().requires_grad_()
    with torch.no_grad():
        ours += torch.tensor([[0.0], [math.pi]])  # |Phi(1)| is 0 there
    cf_distance(ours, theirs, t).backward()
    assert theirs.grad is None
    assert torch.isfinite(ours.grad).all()
    assert torch.isfinite(t.grad).all()
    ours.grad = None
    cf_distance(ours, theirs, t, amplitude=1.0, phase=0.0).backward()
    assert torch.isfinite(ours.grad).all()


def test_cf_distance_tells_what_does_not_fit():
    good = torch.zeros(2, 3)
    with pytest.raises(ModelError, match="features"):
        cf_distance(good, good, torch.zeros(5, 4))
    with pytest.raises(ModelError, match="one row"):
        cf_distance(good[:0], good, torch.zeros(5, 3))
    with pytest.raises(RecipeError, match="weights"):
        cf_distance(good, good, torch.zeros(5, 3), amplitude=-1.0)
    with pytest.raises(RecipeError, match="reduction"):
        cf_distance(good, good, torch.zeros(5, 3), reduction="sum")
