from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stillhouse.errors import ModelError, TrainingError
from stillhouse.losses.distributions import trajectory_distance
from stillhouse.losses.logits import soft_cross_entropy
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.parts.unroll import FlatNet, chunks, matched_in_pieces, unroll

CLOSE = {"rtol": 1e-8, "atol": 1e-12}


def doubles(case):
    return {k: torch.from_numpy(v) if v.dtype.kind == "i" else torch.from_numpy(v).double()
            for k, v in case.items()}  # fmt: skip


def start_of(case, prefix="start."):
    return torch.cat([case[k].flatten() for k in sorted(case) if k.startswith(prefix)])


def rows_of(case, prefix="chunk."):
    return [case[f"{prefix}{i}"] for i in range(sum(k.startswith(prefix) for k in case))]


def convnet():
    return ConvNet(3, 3, 8, width=4, depth=2).double()


# ----------------------------------------------------------------------------- reference
def test_the_released_step_of_trajectory_matching(golden):
    case = doubles(golden("dd_common").case("mtt_step"))
    start = start_of(case)
    images, lr = case["images"].requires_grad_(), case["lr"].requires_grad_()

    def loss(call, rows, number):
        return F.cross_entropy(call(images[rows]), case["labels"][rows])

    reached = unroll(convnet(), start, rows_of(case), loss, lr, keep={1})
    distance = trajectory_distance(reached.end, case["target"], start)
    distance.backward()
    torch.testing.assert_close(reached.kept[1].detach(), case["theta_1"], **CLOSE)
    torch.testing.assert_close(reached.end.detach(), case["theta_N"], **CLOSE)
    torch.testing.assert_close(distance.detach(), case["loss"], **CLOSE)
    torch.testing.assert_close(images.grad, case["grad_images"], **CLOSE)
    torch.testing.assert_close(lr.grad, case["grad_lr"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "begin", "span", "momentum", "scale", "graph"),
    [
        ("unroll_plain", 1, 2, 0.0, 1.0, None),
        ("unroll_full", 3, 3, 0.9, None, None),
        ("unroll_adaptive", 0, 3, 0.9, None, None),
        ("unroll_truncated", 1, 2, 0.9, 1.0, 8),
    ],
)
def test_momentum_middle_matching_and_the_truncated_graph_of_ast(
    golden, name, begin, span, momentum, scale, graph
):
    """The unrolled part of AST's step: what its method will build on."""
    vectors = golden("ast")
    shared, case = doubles(vectors.case("unroll_plain")), doubles(vectors.case(name))
    trajectory = [shared[f"traj.{i}"] for i in range(8)]
    start = case.get("start", trajectory[begin])
    if scale is None:  # the balanced inner loss, h = S_max // 2 with S_max 5
        half = 5 // 2
        log5 = torch.log(torch.tensor(abs(begin - half) + 8.0).double()) / torch.log(
            torch.tensor(5.0).double()
        )
        scale = log5 if begin >= half else 1 / log5
    images = shared["images"].requires_grad_()
    lr = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)

    def loss(call, rows, number):
        return scale * F.cross_entropy(call(images[rows]), shared["labels"][rows])

    batches = rows_of(case)
    middle = [len(batches) // span * i for i in range(1, span)]
    if name in {"unroll_plain"}:
        middle = []
    reached = unroll(convnet(), start, batches, loss, lr, momentum, middle, graph=graph)
    end = trajectory_distance(reached.end, trajectory[begin + span], start)
    between = [
        trajectory_distance(reached.kept[n], trajectory[begin + i + 1], start)
        for i, n in enumerate(middle)
    ]
    total = end + sum(b * d for b, d in zip(case["beta"], between, strict=True))
    total.backward()
    torch.testing.assert_close(reached.end.detach(), case["theta_N"], **CLOSE)
    torch.testing.assert_close(end.detach(), case["end"], **CLOSE)
    for ours, theirs in zip(between, case["middle"], strict=True):
        torch.testing.assert_close(ours.detach(), theirs, **CLOSE)
    torch.testing.assert_close(total.detach(), case["total"], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(images.grad, case["grad_images"], rtol=1e-6, atol=1e-11)
    torch.testing.assert_close(lr.grad, case["grad_lr"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_constant_memory_is_the_released_approximation(golden, steps):
    vectors = golden("datm")
    shared, case = doubles(vectors.case("unroll")), doubles(vectors.case(f"tesla_N{steps}"))
    start, target = start_of(shared), shared["target"]
    found = {}
    for memory in ("pieces", "whole"):
        images = shared["images0"].clone().requires_grad_()
        labels = shared["label_logits0"].clone().requires_grad_()
        lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

        def loss(call, rows, number, images=images, labels=labels):
            return soft_cross_entropy(call(images[rows]), labels[rows], from_logits=True)

        batches = rows_of(case)
        if memory == "pieces":
            distance = matched_in_pieces(
                convnet(), start, target, batches, loss, lr, [images, labels]
            )
        else:
            end = unroll(convnet(), start, batches, loss, lr).end
            distance = trajectory_distance(end, target, start)
        distance.backward()
        found[memory] = (images.grad, labels.grad, lr.grad)
        torch.testing.assert_close(distance.detach(), case["loss"], **CLOSE)
    prefix = "full_" if steps > 1 else ""
    names = ("grad_images", "grad_label_logits", "grad_lr")
    for ours, name in zip(found["pieces"], names, strict=True):
        torch.testing.assert_close(ours, case[name], **CLOSE)
    for ours, name in zip(found["whole"], names, strict=True):
        torch.testing.assert_close(ours, case[prefix + name], **CLOSE)
    if steps > 1:
        assert not torch.allclose(found["pieces"][0], found["whole"][0], rtol=1e-3)


# ----------------------------------------------------------------------------- properties
def linear(seed=0):
    rng = torch.Generator().manual_seed(seed)
    theta, target = (torch.randn(21, generator=rng).double() for _ in range(2))
    images = torch.randn(4, 6, generator=rng).double().requires_grad_()
    labels = torch.tensor([0, 2, 1, 1])

    def loss(call, rows, number):
        return F.cross_entropy(call(images[rows]), labels[rows])

    return nn.Linear(6, 3).double(), theta, target, images, loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_against_finite_differences(momentum):
    net, theta, target, images, loss = linear()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([0, 3])]

    def distance():
        end = unroll(net, theta, batches, loss, lr, momentum).end
        return trajectory_distance(end, target, theta)

    distance().backward()
    for tensor, place in ((images, (1, 4)), (images, (3, 0)), (lr, ())):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor[place] += sign * 1e-5
            values.append(distance().detach())
            with torch.no_grad():
                tensor[place] -= sign * 1e-5
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(tensor.grad[place], slope, rtol=1e-4, atol=1e-9)


def test_a_short_graph_equals_the_whole_one_and_a_shorter_one_does_not():
    found = []
    for graph in (None, 9, 3, 1):
        net, theta, target, images, loss = linear()
        lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        batches = [torch.arange(4)] * 3
        end = unroll(net, theta, batches, loss, lr, 0.9, graph=graph).end
        trajectory_distance(end, target, theta).backward()
        found.append((end.detach(), images.grad, lr.grad))
    for other in found[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    torch.testing.assert_close(found[3][0], found[0][0])
    assert not torch.allclose(found[3][1], found[0][1])
    # the learning rate still collects the velocities of the steps without a graph
    assert found[3][2].abs() > 0


def test_a_rate_of_zero_stays_and_no_gradient_reaches_the_expert():
    net, theta, target, _, loss = linear()
    theta.requires_grad_(), target.requires_grad_()
    lr = torch.zeros((), dtype=torch.float64, requires_grad=True)
    reached = unroll(net, theta.detach(), [torch.arange(4)] * 2, loss, lr)
    assert torch.equal(reached.end.detach(), theta.detach())
    distance = trajectory_distance(reached.end, target, theta)
    assert distance == 1
    distance.backward()
    assert theta.grad is None
    assert target.grad is None
    assert lr.grad.abs() > 0


def test_the_module_is_a_shape_only():
    net, theta, _, _, loss = linear()
    before = [p.clone() for p in net.parameters()]
    unroll(net, theta, [torch.arange(4)], loss, 0.1).end.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_without_gradients_it_runs_too():
    net, theta, _, _, loss = linear()
    with torch.no_grad():
        end = unroll(net, theta, [torch.arange(4)] * 2, loss, 0.1).end
    torch.testing.assert_close(
        end, unroll(net, theta, [torch.arange(4)] * 2, loss, 0.1).end.detach()
    )
    assert not end.requires_grad


def test_chunks_take_permutations_from_their_ends():
    rng = torch.Generator().manual_seed(3)
    found = chunks(6, 4, 5, rng)
    assert [len(c) for c in found] == [2, 4, 2, 4, 2]
    for at in (0, 2):
        assert sorted(torch.cat(found[at : at + 2]).tolist()) == list(range(6))
    assert torch.cat(found[:2]).tolist() != torch.cat(found[2:4]).tolist()
    rng = torch.Generator().manual_seed(3)
    order = torch.randperm(6, generator=rng)
    assert torch.equal(found[0], order[4:])
    assert [len(c) for c in chunks(5, 9, 2, rng)] == [5, 5]


def test_weights_by_name_in_order_and_of_a_wrapped_net():
    module = ConvNet(3, 2, 8, width=4, depth=1)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    flat, wrapped = FlatNet(module), FlatNet(Net(module))
    vector = flat.flatten(state)
    assert torch.equal(vector, wrapped.flatten(state))
    assert torch.equal(vector, flat.flatten(list(module.parameters())))
    shuffled = dict(reversed(list(state.items())))
    assert torch.equal(vector, flat.flatten(shuffled))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(flat(vector, x), module(x))
    torch.testing.assert_close(wrapped.at(vector)(x)["logits"], module(x))


def test_what_cannot_be_unrolled_is_told():
    with pytest.raises(ModelError, match="running statistics"):
        FlatNet(ConvNet(3, 2, 8, width=4, depth=1, norm="batch"))
    FlatNet(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    with pytest.raises(ModelError, match="dropout"):
        FlatNet(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    with pytest.raises(ModelError, match="no parameters"):
        FlatNet(nn.ReLU())
    net = FlatNet(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="6 weights"):
        net(torch.zeros(5), torch.zeros(1, 2))
    with pytest.raises(ModelError, match="weight"):
        net.flatten({"wight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    with pytest.raises(ModelError, match="shapes"):
        net.flatten([torch.zeros(2, 3), torch.zeros(2)])
    with pytest.raises(TrainingError, match="one batch"):
        unroll(net, torch.zeros(6), [], lambda *a: None, 0.1)
