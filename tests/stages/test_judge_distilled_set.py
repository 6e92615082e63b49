from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.launch import open_job
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.parts.distilled_set import Decode
from stillhouse.recipe import load_recipe
from stillhouse.stages import judge_distilled_set as stage
from stillhouse.stages.fresh_nets import fresh_net
from stillhouse.stages.initial_set import RealImages, initial_images, set_of
from stillhouse.stages.judge_distilled_set import Judging, Protocol, accuracies
from stillhouse.teacher import Knowledge

RECIPE = {
    "method": "random-real",
    "data": {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32}},
    "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
}
SHORT = Protocol(epochs=3, augment="color_flip")


def opened(folder, **changes):
    return open_job(load_recipe({**RECIPE, **changes}), folder).judging()


def some_set(job, ipc: int = 2):
    classes = job.task.about["classes"]
    real = RealImages(job.splits["train"], len(classes), None)
    return set_of(initial_images(real, ipc, "real", job.rng("x")), ipc, classes, None)


def fresh(job):
    return lambda number: fresh_net(job, number)


@pytest.mark.parametrize("name", ["eval_schedule_mtt", "eval_schedule_dc"])
def test_the_schedule_is_the_released_one(golden, name, tmp_path, monkeypatch):
    """Every step of a real training is recorded: full batch, so one step is one epoch."""
    case = golden("dd_common").case(name)
    steps, tests = [], []

    class Recorder(SGD):
        def step(self, closure=None):
            group = self.param_groups[0]
            new = not any(state for state in self.state.values())
            steps.append((group["lr"], group["momentum"], group["weight_decay"], new))
            return super().step(closure)

    monkeypatch.setattr(stage, "SGD", Recorder)
    job = opened(tmp_path)
    evaluate = job.evaluate
    monkeypatch.setattr(type(job), "evaluate", lambda self, *a: tests.append(a) or evaluate(*a))
    distilled = some_set(job)
    accuracies(job, "own", distilled, Protocol(epochs=9), fresh(job), nets=1)
    assert len(steps) == len(case["lr"]) == 10
    for term, column in (("lr", 0), ("momentum", 1), ("weight_decay", 2)):
        assert [s[column] for s in steps] == pytest.approx(case[term].tolist())
    marked = [int(s[3]) for s in steps]
    assert [0, *marked[1:]] == case["new_optimizer"].tolist(), "the first one is not marked"
    assert len(tests) == int(case["n_test"])


def test_short_trainings_have_the_phases_of_the_released_loop():
    def released(epochs):
        rates, rate = [], 0.01
        for epoch in range(epochs + 1):
            rates.append(rate)
            if epoch in [epochs // 2 + 1]:
                rate *= 0.1
        return rates

    for epochs in range(12):
        phases = Protocol(epochs=epochs).phases()
        ours = [rate for count, rate in phases for _ in range(count)]
        assert ours == pytest.approx(released(epochs))


def test_accuracy_is_that_of_fresh_networks_and_repeats(tmp_path):
    job = opened(tmp_path / "a")
    first = accuracies(job, "own", some_set(job), SHORT, fresh(job), nets=2)
    other = opened(tmp_path / "b")
    again = accuracies(other, "own", some_set(other), SHORT, fresh(other), nets=2)
    assert first == again
    assert all(0 <= a <= 1 for a in first)
    resumed = opened(tmp_path / "a")
    assert accuracies(resumed, "own", some_set(resumed), SHORT, fresh(resumed), nets=2) == first
    nets = [fresh(job)(i) for i in (0, 0, 1)]
    weights = [n.module.classifier.weight for n in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_enough_training_on_a_learnable_set_beats_chance(tmp_path):
    job = opened(tmp_path)
    protocol = Protocol(epochs=40, lr=0.05, augment="none")
    assert min(accuracies(job, "own", some_set(job, 4), protocol, fresh(job), nets=2)) > 0.6


def test_soft_labels_and_a_learned_rate_are_used(tmp_path, monkeypatch):
    rates = []

    class Recorder(SGD):
        def __init__(self, params, lr, **rest):
            rates.append(lr)
            super().__init__(params, lr=lr, **rest)

    monkeypatch.setattr(stage, "SGD", Recorder)
    job = opened(tmp_path)
    hard = some_set(job)
    wrong = torch.nn.functional.one_hot((hard.labels + 1) % 4, 4) * 50.0
    soft = hard.replace(label_logits=wrong, lr=0.05)
    protocol = Protocol(epochs=30, augment="none")
    misled = accuracies(job, "soft", soft, protocol, fresh(job), nets=1)
    right = accuracies(job, "hard", soft, protocol, fresh(job), nets=1, soft=False)
    assert rates[0] == 0.05
    assert misled[0] < 0.25 < right[0]


def test_all_figures_and_scores(tmp_path):
    job = opened(tmp_path)
    judging = Judging(
        protocol=SHORT,
        nets=2,
        plain_nets=1,
        full=Protocol(epochs=2),
        cross={"wide": lambda n: fresh_net(job, n, "stillhouse:resnet8")},
    )
    figures = stage.judge_distilled_set(job, some_set(job), fresh(job), judging)
    assert set(figures) == {
        "accuracy", "accuracy_std", "random_real", "k_means", "full_data", "accuracy_wide",
        "ior", "hlr", "lrs", "lrs_std", "ars", "accuracy_plain", "random_real_plain",
        "images", "training_images", "pixel_bytes", "label_bytes",
    }  # fmt: skip
    assert figures["ior"] == pytest.approx(figures["accuracy"] - figures["random_real"])
    assert figures["hlr"] == pytest.approx(figures["full_data"] - figures["accuracy"])
    assert figures["pixel_bytes"] == 8 * 3 * 64 * 4
    names = {s["name"].split("/")[0] for s in job.stages}
    assert names == {
        "own", "full", "k-means", "k-means-rows", "random-real", "own-plain",
        "random-real-plain", "cross-wide",
    }  # fmt: skip


def test_soft_sets_need_soft_random_images_and_get_them(tmp_path):
    job = opened(tmp_path)
    soft = some_set(job).replace(label_logits=torch.zeros(8, 4))
    judging = Judging(protocol=SHORT, nets=1, against=("random-real",))
    with pytest.raises(RecipeError, match="function that labels images"):
        stage.judge_distilled_set(job, soft, fresh(job), judging)
    asked = []

    def label(images):
        asked.append(images)
        return torch.zeros(len(images), 4)

    job = opened(tmp_path)
    figures = stage.judge_distilled_set(job, soft, fresh(job), judging, label=label)
    assert len(asked[0]) == 8
    assert {"accuracy", "accuracy_hard", "random_real"} <= set(figures)


def test_the_full_data_net_is_shared_by_its_key(tmp_path):
    job = opened(tmp_path / "a")
    arguments = (Protocol(epochs=2), None, {"student": "x"})
    first = stage.full_data_net(job, fresh(job), *arguments)
    other = opened(tmp_path / "b")
    again = stage.full_data_net(other, fresh(other), *arguments)
    assert torch.equal(first.module.classifier.weight, again.module.classifier.weight)
    assert not list((tmp_path / "b").rglob("finished.state"))
    changed = opened(tmp_path / "c")
    third = stage.full_data_net(changed, fresh(changed), Protocol(epochs=1), None, {"student": "x"})
    assert not torch.equal(first.module.classifier.weight, third.module.classifier.weight)


def test_k_means_images_are_real_and_of_their_class(tmp_path):
    job = opened(tmp_path)
    real = RealImages(job.splits["train"], 4, None)
    images = stage.k_means_images(job, real, fresh(job)(0), [2, 2, 2, 2])
    assert len(images.flatten(1).unique(dim=0)) == 8
    for c in range(4):
        own = real.take(real.rows[c]).flatten(1)
        for image in images[2 * c : 2 * c + 2].flatten(1):
            assert (own == image).all(1).any()


def test_a_judge_without_networks_is_refused():
    with pytest.raises(RecipeError, match="1 network at least"):
        Judging(nets=0)


def test_the_protocol_of_ncfm_halves_the_rate_of_one_optimiser(tmp_path, monkeypatch):
    """AdamW for E epochs, the rate halved after each fifth; every step is recorded."""
    rates, fresh_states = [], []

    class Recorder(AdamW):
        def step(self, closure=None):
            rates.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
            fresh_states.append(not any(state for state in self.state.values()))
            return super().step(closure)

    monkeypatch.setattr(stage, "AdamW", Recorder)
    job = opened(tmp_path)
    protocol = Protocol.ncfm(epochs=10, augment="color_flip")
    accuracies(job, "own", some_set(job), protocol, fresh(job), nets=1)
    assert [r for r, _ in rates] == pytest.approx(
        [1e-3 * 0.5 ** (epoch // 2) for epoch in range(10)]
    )
    assert {d for _, d in rates} == {0.01}
    assert fresh_states == [True] + [False] * 9
    assert protocol.told().startswith("10 epochs (AdamW")
    assert Protocol().told().startswith("1001 epochs (SGD")


def test_cutmix_counts_both_labels_by_their_shares():
    net = Net(ConvNet(3, 4, 8, width=4, depth=1))
    training = stage.SetTraining(net, Protocol(augment="none", cutmix=1.0))
    batch = Batch(x=torch.rand(6, 3, 8, 8), target=torch.arange(6) % 4)
    clock = Clock(step=3)
    mix = training.cutmix.draw(6, (8, 8), clock.rng("cutmix"))
    logits = net(mix.images(batch["x"]))["logits"]
    share = mix.box.share
    expected = share * F.cross_entropy(logits, batch["target"]) + (1 - share) * F.cross_entropy(
        logits, batch["target"][mix.partner]
    )
    torch.testing.assert_close(training(batch, Knowledge.none, clock)["task"], expected)
    assert training.batchwide
    assert not stage.SetTraining(net, Protocol()).batchwide


def test_soft_labels_give_way_in_the_last_epochs():
    net = Net(ConvNet(3, 4, 8, width=4, depth=1))
    training = stage.SetTraining(net, Protocol(epochs=5, augment="none", hard_last=2))
    soft = torch.randn(3, 4)
    batch = Batch(x=torch.rand(3, 3, 8, 8), target=torch.tensor([0, 1, 2]), label_logits=soft)
    logits = net(batch["x"])["logits"]
    hard = F.cross_entropy(logits, batch["target"])
    softly = F.cross_entropy(logits, soft.softmax(1))
    for epoch, expected in ((0, softly), (2, softly), (3, hard), (4, hard)):
        found = training(batch, Knowledge.none, Clock(epoch=epoch))["task"]
        torch.testing.assert_close(found, expected)


def test_a_set_of_mosaics_stands_beside_mosaics_of_real_images(tmp_path):
    job = opened(tmp_path)
    classes = job.task.about["classes"]
    real = RealImages(job.splits["train"], len(classes), None)
    images = initial_images(real, 1, "real", job.rng("x"), factor=2)
    tiles = set_of(images, 1, classes, None, Decode(2))
    judging = Judging(protocol=SHORT, nets=1, against=("random-real",))
    figures = stage.judge_distilled_set(job, tiles, fresh(job), judging)
    assert {"random_real", "random_mosaic"} <= set(figures)
    assert figures["images"] == 4
    assert figures["training_images"] == 16
    drawn = stage.random_images(job, real, [1] * 4, 2)
    again = initial_images(real, 1, "real", job.rng("initial images"), factor=2)
    assert torch.equal(drawn, again)
