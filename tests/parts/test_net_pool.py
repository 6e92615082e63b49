from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stillhouse.engine.checkpoint import read_state
from stillhouse.engine.job import Each
from stillhouse.errors import CheckpointError, ModelError
from stillhouse.launch import open_job
from stillhouse.models.convnet import ConvNet
from stillhouse.parts.net_pool import NetPool
from stillhouse.recipe import load_recipe
from stillhouse.stages.supervised import Supervised


def factory() -> nn.Module:
    return ConvNet(3, 4, 8, width=4, depth=2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_fresh_networks_are_a_function_of_the_generator_and_leave_the_global_state():
    pool = NetPool(factory)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    rng = generator()
    first, second = pool.fresh(rng), pool.fresh(rng)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, pool.fresh(generator()))
    assert not same(first, second)


def test_fresh_networks_are_frozen_and_in_train_mode():
    net = NetPool(factory).fresh(generator())
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    image = torch.randn(1, 3, 8, 8, requires_grad=True)
    net(image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_initialisation_has_the_spread_of_the_constructor():
    net = NetPool(factory).fresh(generator())
    bound = (3 * 9) ** -0.5  # kaiming uniform with a = sqrt 5
    weight = net.features[0].weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound


def test_the_global_state_is_restored_when_building_fails():
    def broken() -> nn.Module:
        torch.rand(3)
        raise RuntimeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        NetPool(broken).fresh(generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoints_are_drawn_and_loaded(tmp_path):
    nets = [NetPool(factory).fresh(generator(seed)) for seed in range(3)]
    save_file(nets[2].state_dict(), tmp_path / "two.safetensors")
    states = [nets[0].state_dict(), nets[1].state_dict(), tmp_path / "two.safetensors"]
    pool = NetPool(factory, states)
    for index, net in enumerate(nets):
        assert same(pool.load(index), net)
    rng = generator()
    drawn = [pool.fresh(rng) for _ in range(30)]
    assert {next(i for i, n in enumerate(nets) if same(n, net)) for net in drawn} == {0, 1, 2}


def test_bad_pools_are_told():
    with pytest.raises(ModelError, match="empty list"):
        NetPool(factory, [])
    with pytest.raises(ModelError, match="no checkpoints"):
        NetPool(factory).load(0)
    with pytest.raises(CheckpointError, match="checkpoint 0 does not fit"):
        NetPool(factory, [{"weight": torch.ones(1)}]).load(0)


def test_snapshots_of_a_training_are_copies_and_serve_as_checkpoints(tmp_path):
    """On a CPU a detached parameter is the live one: snapshots must not all be the last state."""
    recipe = {
        "method": "supervised",
        "data": {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8]}},
        "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
        "budget": {"epochs": 2, "batch": 16, "lr": 0.1, "optimizer": "sgd"},
    }
    job = open_job(load_recipe(recipe), tmp_path)
    net = job.student()
    fit = job.fit("expert", Supervised(net, job.task), job.order(), keep=Each(1))
    states = [read_state(path) for path in fit.snapshots]
    assert len(states) == 3, "the initial state and one per epoch"
    weights = [s["classifier.weight"] for s in states]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    pool = NetPool(lambda: ConvNet(3, 4, 8, width=4, depth=2), states)
    assert same(pool.load(2), net.module)


def test_blending_goes_from_the_end_to_the_start():
    start, end = factory().state_dict(), factory().state_dict()
    pool = NetPool(factory, [end], starts=[start])
    assert len(pool) == 1
    for share in (0.0, 0.25, 0.5, 1.0):
        net = pool.blend(0, share)
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, share * start[name] + (1 - share) * end[name])
    exact = pool.blend(0, 1.0).state_dict(), pool.blend(0, 0.0).state_dict()
    assert all(torch.equal(exact[0][k], start[k]) for k in start)
    assert all(torch.equal(exact[1][k], end[k]) for k in end)


def test_running_statistics_are_blended_and_counters_are_those_of_the_end():
    def normed() -> nn.Module:
        return ConvNet(3, 4, 8, width=4, depth=2, norm="batch")

    start, end = normed().state_dict(), normed().state_dict()
    key, counter = "features.1.running_mean", "features.1.num_batches_tracked"
    end[key] = torch.ones_like(end[key])
    end[counter] = torch.tensor(7)
    net = NetPool(normed, [end], starts=[start]).blend(0, 0.25)
    torch.testing.assert_close(net.state_dict()[key], torch.full((4,), 0.75))
    assert int(net.state_dict()[counter]) == 7


def test_what_cannot_be_blended_is_told():
    state = factory().state_dict()
    with pytest.raises(ModelError, match="starts"):
        NetPool(factory, [state]).blend(0, 0.5)
    with pytest.raises(ModelError, match="one start for each"):
        NetPool(factory, [state], starts=[state, state])
    with pytest.raises(ModelError, match="share"):
        NetPool(factory, [state], starts=[state]).blend(0, 1.5)
    with pytest.raises(CheckpointError, match="different tensors"):
        NetPool(factory, [state], starts=[{"x": torch.ones(1)}]).blend(0, 0.5)
