"""FedLGD: released values of its steps, rounds, clients, and a run that is killed and goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from stillhouse import catalogue
from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import Clock
from stillhouse.data.clients import client_source, joined_clients
from stillhouse.engine.loop import Stage
from stillhouse.errors import DataError, Interrupted, RecipeError
from stillhouse.launch import federated_client, open_job, run, side_recipe
from stillhouse.methods.datasets.fedlgd import (
    OneNet,
    alignment,
    match_update,
    refresh,
    totals,
    train_locally,
    working_net,
)
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.augment import DSA
from stillhouse.parts.class_statistics import class_statistics, normal_images
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.pixel_matching import MeanMatching
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method
from stillhouse.stages.federation import InProcess, Server, packed

FedLGD: Any = catalogue.load("fedlgd")


def case(golden, name: str) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in golden("fedlgd").case(name).items()}


def weights_of(found: dict[str, torch.Tensor], prefix: str = "w.") -> dict[str, torch.Tensor]:
    chosen = {k[len(prefix) :]: v for k, v in sorted(found.items()) if k.startswith(prefix)}
    return {name.split(".", 1)[1]: value for name, value in chosen.items()}


def net_of(weights: dict[str, torch.Tensor], size: int, dtype: torch.dtype) -> Net:
    convs = [v for v in weights.values() if v.ndim == 4]
    module = ConvNet(
        convs[0].shape[1], len(weights["classifier.bias"]), size,
        width=convs[0].shape[0], depth=len(convs),
    ).to(dtype)  # fmt: skip
    module.load_state_dict({k: v.to(dtype) for k, v in weights.items()})
    return Net(module, taps=module.taps)


def small_net(seed: int = 0, classes: int = 3) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = ConvNet(3, classes, 8, width=4, depth=2).double()
    return Net(module, taps=module.taps)


def some(rows: int, seed: int = 0, classes: int = 3):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 8, 8, generator=rng).double(), torch.arange(rows) % classes


# -------------------------------------------------------------------------- released values
def test_class_statistics_corrected_and_as_released(golden):
    found = case(golden, "class_stats")
    classes = len(found["mean_corrected"])
    images, labels = found["images"].double(), found["labels"]
    mean, std, count = class_statistics(images, labels, classes)
    torch.testing.assert_close(mean, found["mean_corrected"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(std, found["std_corrected"], rtol=1e-9, atol=1e-12)
    assert count.tolist() == torch.bincount(labels, minlength=classes).tolist()
    mean, std, _ = class_statistics(images, labels, classes, "official")
    torch.testing.assert_close(mean, found["mean_official"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std, found["std_official"], rtol=1e-6, atol=1e-6)


@dataclass
class GivenSeeds(Clock):
    """A clock whose augmentation seeds are given, one per class."""

    seeds: list[int] = field(default_factory=list)

    def seed_for(self, *stream: str | int) -> int:
        return self.seeds[int(stream[1])] if stream[0] == "augment" else super().seed_for(*stream)


def matching_of(found, augment: str, dtype: torch.dtype) -> MeanMatching:
    """The refresh of the released code under a fixed net."""
    net = net_of(weights_of(found), found["images"].shape[-1], dtype)
    classes, real = len(found["real"]), found["real"].to(dtype)
    labels = torch.arange(classes).repeat_interleave(len(found["images"]) // classes)
    start = DistilledSet(found["images"].to(dtype), labels, tuple(map(str, range(classes))))
    return MeanMatching(
        start, OneNet(net), lambda c, n, g: real[c], batch_real=real.shape[1],
        augment=DSA(augment, siamese=True), class_chunk=1,
    )  # fmt: skip


def test_a_refresh_step_is_the_released_one(golden):
    found = case(golden, "dm_step")
    matching = matching_of(found, "color_crop_cutout_flip_scale_rotate", torch.float32)
    clock = GivenSeeds(seeds=[int(s) for s in found["seeds"]])
    each = len(found["images"]) // len(found["real"])
    for c, seed in enumerate(clock.seeds):
        own = found["images"][each * c : each * (c + 1)]
        for images, name in ((found["real"][c], "aug_real"), (own, "aug_syn")):
            shown = matching.augment(images, seed)
            torch.testing.assert_close(shown, found[name][c], rtol=1e-5, atol=1e-5)
    images, _, loss = refresh(matching, clock, iterations=1, lr_img=1.0, momentum=0.5)
    assert loss == pytest.approx(float(found["loss"]), rel=1e-5)
    torch.testing.assert_close(matching.pixels.grad, found["grad_images"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images, found["images_after"], rtol=1e-5, atol=1e-5)


def test_a_refresh_step_without_augmentation(golden):
    found = {**case(golden, "dm_step"), **case(golden, "dm_step_noaug")}
    matching = matching_of(found, "none", torch.float64)
    images, _, loss = refresh(matching, Clock(), iterations=1, lr_img=1.0, momentum=0.5)
    assert loss == pytest.approx(float(found["loss"]), rel=1e-9)
    torch.testing.assert_close(matching.pixels.grad, found["grad_images"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(images, found["images_after"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "regulariser", "weight"),
    [("contrastive", "contrastive", 10.0), ("mmd", "mmd", 1.0), ("ce", "none", 0.0)],
)
def test_local_training_is_the_released_one(golden, kind, regulariser, weight):
    weights = weights_of(case(golden, "gradient_matching"))
    found = case(golden, "local_training")
    net = net_of(weights, found["x.0"].shape[-1], torch.float64)
    count = sum(name.startswith("x.") for name in found)
    batches = [(found[f"x.{k}"].double(), found[f"y.{k}"]) for k in range(count)]
    told = train_locally(
        net, batches, lr=0.01, anchors=(found["server_images"].double(), found["server_labels"]),
        regulariser=regulariser, weight=weight,
    )  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in net.module.parameters()])
    torch.testing.assert_close(after, found[f"{kind}_params_after"], rtol=1e-7, atol=1e-10)
    assert told["loss"] == pytest.approx(float(found[f"{kind}_loss_mean"]), rel=1e-7)
    if kind != "ce":
        assert told["align"] == pytest.approx(float(found[f"{kind}_align_mean"]), rel=1e-7)


def test_the_server_step_is_the_released_one(golden):
    found = case(golden, "gradient_matching")
    before, after = weights_of(found), weights_of(found, "new.")
    before = {k: v.double() for k, v in before.items()}
    net = net_of(before, found["images"].shape[-1], torch.float64)
    steps = sum(name.startswith("loss.") for name in found)
    for count in range(1, steps + 1):
        images, losses = match_update(
            net, before, after, (found["images"].double(), found["labels"]),
            lr=0.01, lr_img=1.0, momentum=0.5, iterations=count,
        )  # fmt: skip
        torch.testing.assert_close(images, found[f"images.{count - 1}"], rtol=1e-7, atol=1e-9)
        assert losses[-1] == pytest.approx(float(found[f"loss.{count - 1}"]), rel=1e-7)
    for name, value in net.module.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------ class statistics
def test_statistics_of_constant_colours_are_those_colours():
    colours = torch.tensor([[0.1, 0.7, 0.3], [0.9, 0.2, 0.5]])
    labels = torch.tensor([0, 1, 1, 0, 1])
    images = colours[labels][:, :, None, None].expand(5, 3, 4, 4)
    mean, std, count = class_statistics(images, labels, 3)
    torch.testing.assert_close(mean[:2], colours)
    assert float(std.max()) < 1e-7
    assert count.tolist() == [2, 3, 0]
    official, _, _ = class_statistics(images, labels, 3, "official")
    assert not torch.allclose(official[:2], colours)
    with pytest.raises(DataError, match="labels"):
        class_statistics(images, labels, 2 - 1)
    with pytest.raises(RecipeError, match="per_class"):
        class_statistics(images, labels, 3, "offical")


def test_noise_has_the_statistics_of_its_class():
    mean, std = torch.tensor([[0.0, 2.0], [5.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    images = normal_images(mean, std, 40, (8, 8), torch.Generator().manual_seed(0))
    found = class_statistics(images, torch.arange(2).repeat_interleave(40), 2)
    torch.testing.assert_close(found[0], mean, atol=0.15, rtol=0)
    torch.testing.assert_close(found[1], std, atol=0.15, rtol=0)


# ------------------------------------------------------------------------------ local training
def test_without_weight_there_is_no_alignment_and_mu_pulls_back():
    batches, anchors = [some(4, k) for k in range(3)], some(6, 9)
    ends = {}
    for name, settings in {
        "plain": {},
        "weightless": {"anchors": anchors, "regulariser": "contrastive", "weight": 0.0},
        "aligned": {"anchors": anchors, "regulariser": "contrastive", "weight": 1.0},
        "detached": {"anchors": anchors, "regulariser": "contrastive", "weight": 1.0,
                     "detach_anchor": True},
        "pulled": {"proximal": 5.0},
    }.items():  # fmt: skip
        net = small_net()
        told = train_locally(net, batches, lr=0.1, **settings)
        ends[name] = torch.cat([p.detach().flatten() for p in net.parameters()])
        assert told["images"] == 12 + (18 if name in {"aligned", "detached"} else 0)
    begin = torch.cat([p.detach().flatten() for p in small_net().parameters()])
    assert torch.equal(ends["plain"], ends["weightless"])
    assert not torch.allclose(ends["plain"], ends["aligned"])
    assert not torch.allclose(ends["detached"], ends["aligned"])
    assert (ends["pulled"] - begin).norm() < (ends["plain"] - begin).norm()


def test_one_proximal_step_is_a_plain_one():
    ends = []
    for mu in (0.0, 10.0):
        net = small_net()
        train_locally(net, [some(4)], lr=0.1, proximal=mu)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_alignment_of_class_means_counts_every_class():
    ours, theirs = torch.eye(4)[:3], torch.eye(4)[[0, 1, 3]]
    labels = torch.tensor([0, 1, 2])
    assert alignment("l2norm", ours, labels, theirs, labels) == pytest.approx(2 / 3)
    assert alignment("l2norm", ours[:2], labels[:2], theirs, labels) == pytest.approx(0.0)
    scaled = alignment("l2norm", 3 * ours, labels, theirs, labels)
    assert scaled == pytest.approx(2 / 3)


# ------------------------------------------------------------------------- distilling and matching
def test_equal_sets_match_and_nothing_but_pixels_moves():
    images, _ = some(6)
    net = small_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    start = DistilledSet(images, torch.arange(3).repeat_interleave(2), ("a", "b", "c"))

    def matching(real):
        return MeanMatching(
            start, OneNet(net), lambda c, n, g: real[2 * c : 2 * c + 2], batch_real=2,
            augment=DSA("color_crop_cutout_scale_rotate", siamese=True),
        )  # fmt: skip

    same, _, loss = refresh(matching(images), Clock(), iterations=1, lr_img=1.0, momentum=0.5)
    assert loss == pytest.approx(0.0, abs=1e-20)
    torch.testing.assert_close(same, images)
    moved, _, loss = refresh(matching(images + 1), Clock(), iterations=2, lr_img=1.0, momentum=0.5)
    assert loss > 0
    assert not torch.allclose(moved, images)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_warm_up_in_two_pieces_is_one():
    images, _ = some(6)
    start = DistilledSet(images, torch.arange(3).repeat_interleave(2), ("a", "b", "c"))

    def matching(begin):
        found = MeanMatching(
            start.replace(images=begin), OneNet(small_net()), lambda c, n, g: images + c,
            batch_real=2, augment=DSA("crop_scale", siamese=True),
        )  # fmt: skip
        return found

    whole, _, _ = refresh(matching(images), Clock(), iterations=5, lr_img=1.0, momentum=0.5)
    first, velocity, _ = refresh(matching(images), Clock(), iterations=2, lr_img=1.0, momentum=0.5)
    both, _, _ = refresh(
        matching(first), Clock(step=2), iterations=3, lr_img=1.0, momentum=0.5, velocity=velocity
    )
    assert torch.equal(whole, both)


def test_images_that_give_the_update_are_at_distance_zero_whatever_the_rate():
    net, (images, labels) = small_net(), some(6)
    with torch.no_grad():  # gradients far above the 1e-6 in the cosine's denominator
        net.module.classifier.weight.mul_(5)
    before = {k: v.detach().clone() for k, v in net.module.state_dict().items()}
    loss = cross_entropy(net(images)["logits"], labels)
    found = torch.autograd.grad(loss, list(net.module.parameters()))
    names = [name for name, _ in net.module.named_parameters()]
    for lr in (0.1, 0.001):
        after = {k: before[k] - lr * g for k, g in zip(names, found, strict=True)}
        _, losses = match_update(
            small_net(1), before, after, (images, labels), lr=lr, lr_img=1.0, momentum=0.5,
            iterations=1,
        )  # fmt: skip
        assert losses[0] == pytest.approx(0.0, abs=1e-4)
        after |= {k: v + 100 for k, v in after.items() if v.ndim == 1}
        _, again = match_update(
            small_net(1), before, after, (images, labels), lr=lr, lr_img=1.0, momentum=0.5,
            iterations=1,
        )  # fmt: skip
        assert again == losses


# --------------------------------------------------------------------------------- whole runs
def example(variant: str = "", **changes: Any):
    found = FedLGD.example(0)
    settings = {**found["settings"], **changes.pop("settings", {})}
    recipe = load_recipe({**found, **changes, "settings": settings})
    return side_recipe(recipe, f"fedlgd/{variant}", 0) if variant else recipe


def executed(folder, recipe, given=None):
    """The artifact and the server's last state."""
    job = open_job(recipe, folder, given=given)
    method = open_method(recipe)
    try:
        return job, method, method.run(job)
    finally:
        job.log.close()


def weights(artifact) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in artifact.module.state_dict().items()}


def images_of(artifact) -> dict[str, torch.Tensor]:
    return {k: v.tensors["images"] for k, v in artifact.attachments.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Watching(InProcess):
    """Keeps what was sent."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sent: list[dict[str, Any]] = []

    def round(self, number, message, clients):
        self.sent.append({**message, "to": list(clients)})
        return super().round(number, message, clients)


def watched(folder, recipe):
    seen: list[Watching] = []

    def connect(job):
        method = open_method(recipe)
        clients = {n: method.client(job, n) for n in method.clients(job)}
        seen.append(Watching(clients, job.seed))
        return seen[-1]

    _, _, artifact = executed(folder, recipe, Given(connect=connect))
    return artifact, [m for m in seen[0].sent if m["ask"] == "train"], seen[0]


def test_rounds_follow_the_plan(tmp_path):
    recipe = example(settings={"rounds": 6, "gap": 2, "updates": 2})
    artifact, sent, _ = watched(tmp_path, recipe)
    assert [m["refresh"] for m in sent] == [False, False, True, False, True, False]
    assert [m["align"] for m in sent] == [False, True, False, True, False, True]
    assert ["anchors/images" in m for m in sent] == [False] + [True] * 5
    changed = [not torch.equal(a["anchors/images"], b["anchors/images"])
               for a, b in itertools.pairwise(sent[1:])]  # fmt: skip
    assert changed == [False, True, False, True]
    log = [r for r in artifact.meta["federation"]["log"] if "round" in r]
    assert ["gradient_last" in r for r in log] == [True, False, True, False, True, False]


def test_official_trains_on_noise_in_round_0(tmp_path):
    artifact, sent, _ = watched(tmp_path, example(variant="official"))
    assert "anchors/images" in sent[0]
    assert not sent[0]["align"]
    assert "anchors" in artifact.attachments


def test_without_updates_local_sets_stay_and_the_server_has_no_gradient_to_match(tmp_path):
    still = executed(tmp_path / "a", example(settings={"updates": 0, "anchors_per_class": 0}))[2]
    local = executed(tmp_path / "b", example(variant="local"))[2]
    assert equal(weights(still), weights(local))
    assert equal(images_of(still), images_of(local))


def test_weightless_alignment_is_plain_averaging_on_both_sets(tmp_path):
    light = executed(tmp_path / "a", example(settings={"align_weight": 0.0}))[2]
    none = executed(tmp_path / "b", example(variant="unaligned"))[2]
    assert equal(weights(light), weights(none))


def test_sides_begin_with_the_same_sets_and_random_ones_are_real(tmp_path):
    recipe = example(variant="random", settings={"ipc": 2})
    job, method, artifact = executed(tmp_path, recipe)
    client = method.client(job, "a")
    real, labels = client._all_real()
    for image in images_of(artifact)["client-a"]:
        assert bool((real == image).flatten(1).all(1).any())
    assert labels.tolist() == sorted(labels.tolist())


def test_real_data_are_weighted_by_rows(tmp_path):
    artifact, _, transport = watched(tmp_path, example(variant="real", settings={"rounds": 1}))
    replies = {n: c._read(1)["reply"] for n, c in transport.clients.items()}
    rows = {n: r["rows"] for n, r in replies.items()}
    assert rows == {"a": 32, "b": 16}
    name = next(k for k in replies["a"] if k.startswith("w/"))
    expected = (2 * replies["a"][name] + replies["b"][name]) / 3
    torch.testing.assert_close(weights(artifact)["module." + name[2:]], expected)
    assert not artifact.attachments


def test_only_a_share_of_the_clients_takes_part(tmp_path):
    _, sent, _ = watched(tmp_path, example(settings={"participation": 0.5, "rounds": 6}))
    assert all(len(m["to"]) == 1 for m in sent)
    assert {m["to"][0] for m in sent} == {"a", "b"}


def test_parameters_that_are_kept_stay_with_their_client(tmp_path):
    recipe = example(settings={"keep": ["classifier"], "rounds": 2})
    artifact, sent, transport = watched(tmp_path, recipe)
    begin = {k: v for k, v in sent[0].items() if k.startswith("w/classifier")}
    for name, value in begin.items():
        assert torch.equal(weights(artifact)["module." + name[2:]], value)
    own = [state["own/classifier.weight"] for state in transport.states.values()]
    assert not torch.equal(*own)


def test_a_client_alone_draws_what_it_draws_among_others(tmp_path):
    recipe = example()
    job = open_job(recipe, tmp_path / "server")
    method = open_method(recipe)
    server = Server({}, "run")
    net, _ = working_net(job)
    sent = {"ask": "train", "round": 0, "refresh": True, "align": False,
            **packed("w", {k[7:]: v for k, v in net.state_dict().items()})}  # fmt: skip
    together = InProcess({n: method.client(job, n) for n in ("b", "a")}, job.seed)
    alone = federated_client(recipe, "a", tmp_path / "a")
    assert set(alone.client.job.splits.about["clients"]) == {"a"}
    warm = {"ask": "warm-up", "first": 0, "iterations": 2, "last": True}
    for number, message in enumerate(({"ask": "introduce"}, warm, sent)):
        asked = {**message, "run": server.run, "after/a": number - 1, "after/b": number - 1}
        ours = together.round(number, asked, ["b", "a"])["a"]
        theirs = alone.answer(number, asked)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[key])
    assert torch.equal(alone.state["images"], together.states["a"]["images"])


def test_stopped_in_any_exchange_it_ends_the_same(tmp_path, monkeypatch):
    recipe = example()
    _, _, whole = executed(tmp_path / "whole", recipe)
    due = Stage.due
    for stop_at in (1, 2, 3, 5):
        calls = {"n": 0}

        def ask(self, now, calls=calls, stop_at=stop_at):
            calls["n"] += 1
            if calls["n"] == stop_at:
                self.stop.asked = 15
            return due(self, now)

        folder = tmp_path / str(stop_at)
        # Else the warm-up of the whole run would be taken over.
        monkeypatch.setenv("STILLHOUSE_CACHE", str(folder / "cache"))
        monkeypatch.setattr(Stage, "due", ask)
        with pytest.raises(Interrupted):
            executed(folder, recipe)
        monkeypatch.setattr(Stage, "due", due)
        _, _, again = executed(folder, recipe)
        assert equal(weights(whole), weights(again))
        assert equal(images_of(whole), images_of(again))


def test_a_server_killed_after_its_clients_answered_asks_none_of_them_again(tmp_path, monkeypatch):
    recipe = example()
    _, _, whole = executed(tmp_path / "whole", recipe)
    move, calls = Server.move, {"n": 0}

    def die(self, weights):
        calls["n"] += 1
        if calls["n"] == 3:
            raise KeyboardInterrupt
        move(self, weights)

    monkeypatch.setattr(Server, "move", die)
    with pytest.raises(KeyboardInterrupt):
        executed(tmp_path / "killed", recipe)
    monkeypatch.setattr(Server, "move", move)
    trained = []
    Client = type(open_method(recipe).client(open_job(recipe, tmp_path / "x"), "a"))
    train = Client.train

    def count(self, state, message):
        trained.append((self.name, int(message["round"])))
        return train(self, state, message)

    monkeypatch.setattr(Client, "train", count)
    _, _, again = executed(tmp_path / "killed", recipe)
    assert trained == [("a", 3), ("b", 3)]
    assert equal(weights(whole), weights(again))
    assert equal(images_of(whole), images_of(again))


def test_sides_share_the_warm_up_and_its_cost(tmp_path, monkeypatch):
    full = executed(tmp_path / "a", example())[2]
    Client = type(open_method(example()).client(open_job(example(), tmp_path / "x"), "a"))
    monkeypatch.setattr(Client, "_warmed_up", None)  # nothing is made anew
    local = executed(tmp_path / "b", example("local"))[2]
    log = [a.meta["federation"]["log"] for a in (full, local)]
    made = [[r for r in records if "round" not in r and "distil_seconds" in r] for records in log]
    spent = [[r["distil_seconds"] for r in records] for records in made]
    assert len(spent[0]) == 2
    assert spent[0] == spent[1]
    assert min(spent[0]) > 0
    with pytest.raises(TypeError):
        executed(tmp_path / "c", example(seed=1))
    with pytest.raises(TypeError):
        executed(tmp_path / "d", example("local", settings={"lr_img": 2.0}))


@pytest.mark.slow
def test_killed_outright_at_any_moment_it_ends_the_same(tmp_path):
    settings = {"rounds": 30, "warm_up": 8, "refresh": 4, "gap": 3, "updates": 8}
    recipe = tmp_path / "recipe.yaml"
    found = FedLGD.example(0)
    text = {**found, "settings": {**found["settings"], **settings}, "compare": []}
    recipe.write_text(yaml.safe_dump(text))

    def begin(name):
        folder, cache = tmp_path / name, str(tmp_path / f"{name}-cache")
        command = [sys.executable, "-m", "stillhouse", "run", str(recipe), "--folder", str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "STILLHOUSE_CACHE": cache}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(name):
        process = begin(name)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()[-3000:]

    finish("whole")
    chance, kills, deadline = random.Random(1), 0, time.monotonic() + 150
    while kills < 4 and time.monotonic() < deadline:
        process = begin("killed")
        rounds = tmp_path / "killed" / "stages" / "rounds"
        seen = set(rounds.glob("step-*"))
        while process.poll() is None and set(rounds.glob("step-*")) == seen:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if (tmp_path / "killed" / "run.json").exists():
            break
    finish("killed")
    assert kills
    whole, killed = (open_artifact(tmp_path / name) for name in ("whole", "killed"))
    assert equal(weights(whole), weights(killed))
    assert equal(images_of(whole), images_of(killed))


def test_the_run_shows_every_client_and_the_cost(tmp_path):
    result = run(example(settings={"fresh_epochs": 2}), folder=tmp_path, progress=False)
    figures = next(iter(result.sides.values()))["0"]
    each = [figures["accuracy_a"], figures["accuracy_b"]]
    assert figures["accuracy"] == pytest.approx(sum(each) / 2)
    assert figures["worst_client"] == min(each)
    assert figures["domain_gap"] > 0
    assert 0 <= figures["fresh_accuracy"] <= 1
    # Two clients, four classes: 3 + 2 iterations of 4 real and 1 own image of each class.
    server = 2 * 2 * 4
    assert figures["images_distilling"] == 2 * (3 + 2) * 4 * (4 + 1) + server
    assert figures["images_seen"] == figures["images_distilling"] + figures["images_training"]
    summary = json.loads((tmp_path / "run.json").read_text())
    titles = [p["title"] for p in summary["details"]["images"]]
    assert titles == ["The server's images", "The set of a", "The set of b"]
    log = result.artifact.meta["federation"]["log"]
    sizes = sum(p.numel() for p in result.artifact.module.parameters()) * 4
    rounds = [r for r in log if "round" in r]
    assert rounds[0]["bytes_up"] >= 2 * sizes
    # From round 1 on the anchors travel too: K * IPC * C * H * W floats and K labels.
    assert rounds[1]["bytes_down"] - rounds[0]["bytes_down"] == 2 * (4 * 3 * 8 * 8 * 4 + 4 * 8)
    assert totals(log)["bytes_up"] == sum(r["bytes_up"] for r in log)


def test_a_client_that_lacks_a_class_distils_the_others(tmp_path):
    def splits(labels):
        rng = torch.Generator().manual_seed(len(labels))
        x = torch.rand(len(labels), 3, 8, 8, generator=rng)
        target = torch.tensor(labels)
        about = {"classes": ["p", "q", "r"], "input": [3, 8, 8]}
        roles = ("train", "val", "test")
        return Splits({r: TensorSource({"x": x, "target": target}) for r in roles}, "own", about)

    whole = joined_clients({"full": splits([0, 1, 2] * 4), "poor": splits([0, 2] * 5)})
    recipe = example(data={"name": "given"})
    _, _, artifact = executed(tmp_path, recipe, Given(splits=whole))
    poor = artifact.attachments["client-poor"].tensors
    assert poor["labels"].tolist() == [0, 2]
    assert artifact.attachments["anchors"].tensors["labels"].tolist() == [0, 1, 2]


def test_data_without_clients_and_impossible_settings_are_told(tmp_path):
    with pytest.raises(RecipeError, match="divided among clients"):
        executed(tmp_path / "a", example(data={"name": "generated", "options": {"kind": "images",
                 "shape": [3, 8, 8]}}))  # fmt: skip
    with pytest.raises(RecipeError, match="local: distilled"):
        executed(tmp_path / "b", example(settings={"local": "real"}))
    with pytest.raises(RecipeError, match="family 'flop'"):
        open_method(example(settings={"augment": "flop"}))
    with pytest.raises(DataError, match="per class are asked for"):
        executed(tmp_path / "c", example(variant="random", settings={"ipc": 50}))
    with pytest.raises(RecipeError, match="no client 'c'"):
        federated_client(example(), "c", tmp_path / "d")
    kd = load_recipe(catalogue.load("kd").example(0))
    with pytest.raises(RecipeError, match="not federated"):
        federated_client(kd, "a", tmp_path / "e")


def test_a_network_of_other_norms_takes_part(tmp_path):
    student = {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2, "norm": "batch"}}
    _, _, artifact = executed(tmp_path, example(student=student))
    assert int(weights(artifact)["module.features.1.num_batches_tracked"]) > 0


def test_residual_network_with_a_tap_of_its_own(tmp_path):
    student = {"model": "stillhouse:resnet8", "taps": {}}
    _, _, artifact = executed(tmp_path, example(student=student, settings={"rounds": 2}))
    assert all(torch.isfinite(v).all() for v in weights(artifact).values())


def test_real_digits_of_five_clients(data_root, tmp_path):
    recipe = example(
        data={"name": "digit_clients", "options": {"per_client": 60, "per_test": 20,
              "image_size": 8, "clients": ["mnist", "uci", "photo"]}},
        settings={"rounds": 2, "warm_up": 2, "matching": 2,
                  "augment": "color_crop_cutout_scale_rotate"},
    )  # fmt: skip
    job, _, artifact = executed(tmp_path, recipe)
    assert set(artifact.attachments) == {"anchors", "client-mnist", "client-uci", "client-photo"}
    assert len(client_source(job.splits, "train", "uci")) == 54
