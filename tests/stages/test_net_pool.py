"""The pool of trained networks: what it holds, where it lies, how it goes on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from stillhouse.errors import CheckpointError
from stillhouse.launch import open_job
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.recipe import load_recipe
from stillhouse.stages.judge_distilled_set import Protocol
from stillhouse.stages.net_pool import read_pool, trained_pool

RECIPE = {
    "method": "random-real",
    "data": {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8], "rows": 48}},
    "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
}
PROTOCOL = Protocol(epochs=6, batch=8, lr=0.05, augment="none", milestones=(0.5,), cutmix=0.5)


def opened(folder):
    return open_job(load_recipe(RECIPE), folder)


def make() -> Net:
    return Net(ConvNet(3, 4, 8, width=4, depth=2))


def states(pool):
    return [pool.load(i).state_dict() for i in range(len(pool))]


def equal(a, b) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_networks_are_trained_from_different_starts_that_are_kept(tmp_path):
    job = opened(tmp_path)
    pool = trained_pool(job, make, 2, PROTOCOL, None)
    starts, ends = [pool.blend(i, 1.0).state_dict() for i in range(2)], states(pool)
    assert not equal(starts[0], starts[1])
    assert not any(equal(s, e) for s, e in zip(starts, ends, strict=True)), "no aliased weights"
    for start, end, better in ((starts[0], ends[0], True), (starts[1], ends[1], True)):
        scores = []
        for weights in (start, end):
            net = make()
            net.load_state_dict(weights)
            scores.append(job.evaluate(net, "train")["accuracy"])
        assert (scores[1] > scores[0]) == better
    again = trained_pool(opened(tmp_path), make, 2, PROTOCOL, None)
    assert all(equal(a, b) for a, b in zip(ends, states(again), strict=True))


def test_a_shared_pool_lies_in_the_cache_under_what_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    first = trained_pool(opened(tmp_path / "a"), make, 1, PROTOCOL, None, share={"student": "x"})
    job = opened(tmp_path / "b")
    second = trained_pool(job, make, 2, PROTOCOL, None, share={"student": "x"})
    assert equal(states(first)[0], states(second)[0])
    assert len(list((tmp_path / "cache" / "shared").iterdir())) == 2
    assert [s["kind"] for s in job.stages] == ["train", "train"]
    longer = Protocol(**{**vars(PROTOCOL), "epochs": 7})
    other = trained_pool(opened(tmp_path / "c"), make, 1, longer, None, share={"student": "x"})
    assert not equal(states(first)[0], states(other)[0])


def test_networks_trained_elsewhere_are_read(tmp_path):
    files, nets = [], []
    for number in range(2):
        pair = []
        for what in ("start", "end"):
            net = make()
            nets.append(net)
            path = tmp_path / f"{what}{number}.safetensors"
            # A module's own names, or those inside a run: both are read.
            save_file(net.module.state_dict() if number else net.state_dict(), path)
            pair.append(path)
        files.append(tuple(pair))
    pool = read_pool(files, make, "cpu")
    assert equal(pool.load(1).state_dict(), nets[3].state_dict())
    assert equal(pool.blend(0, 1.0).state_dict(), nets[0].state_dict())
    (tmp_path / "end0.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"end0\.safetensors"):
        read_pool(files, make, "cpu")
    with pytest.raises(CheckpointError, match="does not fit"):
        read_pool(files[1:], lambda: Net(ConvNet(3, 4, 8, width=5, depth=2)), "cpu")
