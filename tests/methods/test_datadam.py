from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import yaml
from torch.optim import SGD

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.distributions import dm
from stillhouse.models.convnet import ConvNet
from stillhouse.net import Net
from stillhouse.opening import open_artifact
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.set_distillation import distilled_of
from stillhouse.teacher import Knowledge

DataDAM: Any = catalogue.load("datadam")
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class OneNet:
    """A pool that always gives the same network, and keeps it for inspection."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.net = Net(module.requires_grad_(False).train(), taps=module.taps)

    def fresh(self, generator: torch.Generator) -> Net:
        return self.net


def objective_of(net, syn, real, ipc, per_class, **settings):
    """DataDAM's objective on given images, one network, no augmentation."""
    classes = len(syn) // ipc
    start = DistilledSet(
        syn, torch.arange(classes).repeat_interleave(ipc), tuple(map(str, range(classes)))
    )
    config = DataDAM.Config(**{"ipc": ipc, "batch_real": per_class, "augment": "none", **settings})
    layers = [name for name in net.taps if name != "embed"]
    return DataDAM(config).objective(
        start, OneNet(net), lambda c, n, g: real[per_class * c : per_class * c + n], layers
    )


def terms_of(objective) -> dict[str, torch.Tensor]:
    objective.scratch = {}
    return objective(Batch(id=torch.arange(objective.classes)), Knowledge.none, Clock())


def small(seed: int = 0, **settings):
    """Three classes of 8x8, two synthetic and four real images each, float64."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvNet(3, 3, 16, width=4, depth=3).double()
    syn, real = (torch.randn(n, 3, 16, 16, generator=rng).double() for n in (6, 12))
    return objective_of(net, syn, real, 2, 4, **settings), net, real


# ----------------------------------------------------------------------------- reference
@pytest.mark.parametrize(
    ("name", "ipc", "per_class", "weight"), [("loss", 2, 4, 0.01), ("loss_1ch", 1, 3, 0.02)]
)
@pytest.mark.parametrize("chunk", [0, 1])
def test_the_whole_loss_is_the_released_one(golden, name, ipc, per_class, weight, chunk):
    stored = golden("datadam").case(name)
    case = {k: torch.from_numpy(v).double() for k, v in stored.items()}
    weights = {k[5:]: v for k, v in sorted(case.items()) if k.startswith("w.")}
    classes = len(weights["classifier.bias"])
    channels, size = case["syn"].shape[1], case["syn"].shape[2]
    for power in (1, 4):
        net = ConvNet(channels, classes, size, width=4, depth=3).double()
        net.load_state_dict(weights)
        settings = {"power": power, "mmd_weight": weight, "class_chunk": chunk}
        objective = objective_of(net, case["syn"], case["real"], ipc, per_class, **settings)
        terms = terms_of(objective)
        sum(terms.values()).backward()
        layers = torch.stack([terms["attention/act0"], terms["attention/act1"]]).detach()
        torch.testing.assert_close(layers, case[f"p{power}_sam_layers"], **CLOSE)
        torch.testing.assert_close(terms["mmd"].detach(), case["embed_term"], **CLOSE)
        total = sum(terms.values()).detach()
        torch.testing.assert_close(total, case[f"p{power}_total"], **CLOSE)
        torch.testing.assert_close(objective.pixels.grad, case[f"p{power}_grad_syn"], **CLOSE)
        last = objective_of(
            net, case["syn"], case["real"], ipc, per_class, last_layer=True, **settings
        )
        found = terms_of(last)["attention/act2"].detach()
        torch.testing.assert_close(found, case[f"p{power}_last_layer_unused"], **CLOSE)
        if power == 4 and f"p{power}_images_after_sgd" in case:
            SGD([objective.pixels], lr=0.5, momentum=0.5).step()
            torch.testing.assert_close(
                objective.pixels.detach(), case["p4_images_after_sgd"], **CLOSE
            )


def test_the_official_variant_is_the_released_call():
    official = DataDAM.variants["official"]
    assert official.set["power"] == 1.0
    assert official.budget["steps"] == 20000
    config = DataDAM.Config(**official.set)
    assert (config.judge_epochs, config.judge_batch, config.judge_nets) == (1800, 64, 10)
    assert DataDAM.Config().power == 4.0


def test_the_rate_follows_the_released_rule():
    assert DataDAM(DataDAM.Config(ipc=50)).default_rate() == 1.0
    assert DataDAM(DataDAM.Config(ipc=51)).default_rate() == 10.0
    assert DataDAM(DataDAM.Config(ipc=51, lr_img=3.0)).default_rate() == 3.0


# ----------------------------------------------------------------------------- properties
# Maps (properties 1, 2, 6, 10) are tested in tests/losses/test_features.py.
def test_identical_batches_give_zero_and_no_gradient():
    _, net, real = small()
    objective = objective_of(net, real, real, 4, 4)
    terms = terms_of(objective)
    sum(terms.values()).backward()
    assert all(value == 0 for value in terms.values())
    assert objective.pixels.grad.abs().sum() == 0
    # and under the same siamese augmentation too, where both sides are treated alike
    settings = {"augment": "color_crop_cutout_flip_scale_rotate"}
    augmented = objective_of(net, real, real, 4, 4, **settings)
    for step in range(6):
        augmented.scratch = {}
        rows = Batch(id=torch.arange(3))
        values = augmented(rows, Knowledge.none, Clock(step=step)).values()
        assert all(value == 0 for value in values)


def test_order_within_a_class_is_free_but_classes_are_not():
    objective, net, real = small()
    pixels = objective.pixels.detach()
    loss = sum(terms_of(objective).values()).detach()
    within = objective_of(net, pixels[[1, 0, 3, 2, 5, 4]], real, 2, 4)
    torch.testing.assert_close(sum(terms_of(within).values()).detach(), loss)
    across = objective_of(net, pixels[[2, 3, 0, 1, 4, 5]], real, 2, 4)
    assert (sum(terms_of(across).values()).detach() - loss).abs() > 1e-3


def test_without_attention_it_is_distribution_matching():
    settings = DataDAM.variants["mmd-only"].set
    objective, net, real = small(**settings)
    terms = terms_of(objective)
    assert list(terms) == ["mmd"]
    counts = {"synthetic_counts": 2, "real_counts": 4}
    expected = dm(net.embedding(objective.pixels), net.embedding(real), **counts)
    torch.testing.assert_close(terms["mmd"], expected)


def test_weights_of_zero_are_not_computed_and_weights_scale():
    whole = terms_of(small()[0])
    assert list(whole) == ["attention/act0", "attention/act1", "mmd"]
    assert list(terms_of(small(mmd_weight=0.0)[0])) == ["attention/act0", "attention/act1"]
    heavier = terms_of(small(scale=300.0, attention_weight=2.0)[0])
    torch.testing.assert_close(heavier["attention/act0"], 6 * whole["attention/act0"])
    torch.testing.assert_close(heavier["mmd"], 3 * whole["mmd"])


def test_layers_of_a_convnet_and_which_are_matched():
    net = ConvNet(3, 10, 32, width=4, depth=3)
    taps = OneNet(net).net(torch.randn(1, 3, 32, 32))["taps"]
    assert [tuple(taps[f"act{i}"].shape[2:]) for i in range(3)] == [(32, 32), (16, 16), (8, 8)]
    assert "attention/act2" not in terms_of(small()[0])
    assert "attention/act2" in terms_of(small(last_layer=True)[0])


def test_networks_and_the_real_side_get_no_gradient():
    objective, net, real = small()
    real.requires_grad_()
    sum(terms_of(objective).values()).backward()
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert real.grad is None
    assert objective.pixels.grad.abs().sum() > 0


def test_nothing_of_a_step_stays_in_memory(tmp_path):
    """Networks and activations go with the step; hooks go with their network."""
    recipe = load_recipe(DataDAM.example(0))
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    real = method.real_images(job)
    objective = method.built(job, method.initial_set(job, real, "real"), real.draw)
    import gc
    import weakref

    def step(number: int) -> Any:
        objective.scratch = {}
        rows = Batch(id=torch.arange(4))
        sum(objective.terms(rows, None, Clock(step=number)).values()).backward()
        return weakref.ref(objective.scratch["net"])

    first = step(0)
    step(1)
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("chunk", [1, 2])
def test_class_chunks_give_the_gradient_of_the_whole(chunk):
    whole, parts = small(class_chunk=0)[0], small(class_chunk=chunk)[0]
    for objective in (whole, parts):
        sum(terms_of(objective).values()).backward()
    torch.testing.assert_close(parts.pixels.grad, whole.pixels.grad, rtol=1e-6, atol=1e-12)


def test_dead_networks_give_finite_terms():
    objective, net, _ = small()
    with torch.no_grad():
        for layer in (1, 5, 9):
            net.features[layer].weight.zero_()
            net.features[layer].bias.fill_(-1.0)
    terms = terms_of(objective)
    sum(terms.values()).backward()
    assert all(torch.isfinite(v) for v in terms.values())
    assert torch.isfinite(objective.pixels.grad).all()


def test_powers_poolings_and_errors_are_settings():
    values = [
        terms_of(small(**s)[0])["attention/act0"].item()
        for s in (
            {}, {"power": 1.0}, {"power": 2.0}, {"power": 8.0}, {"pool": "max"},
            {"normalise": "l1"}, {"error": "absolute"}, {"error": "angular"},
        )
    ]  # fmt: skip
    assert len(set(values)) == len(values)
    same = terms_of(small(normalise="frobenius")[0])["attention/act0"].item()
    assert same == pytest.approx(values[0])


# -------------------------------------------------------------------------------- runs
def example(**changes: Any) -> dict[str, Any]:
    found = DataDAM.example(0)
    found["settings"] = {**found["settings"], **changes.pop("settings", {})}
    return {**found, "compare": [], **changes}


def made(folder, **changes: Any) -> DistilledSet:
    recipe = load_recipe(example(**changes))
    return distilled_of(open_method(recipe).run(open_job(recipe, folder)))


@pytest.mark.parametrize("init", ["real", "noise", "smart"])
def test_every_initialisation_is_moved(init, tmp_path):
    still = made(tmp_path / "a", settings={"init": init, "lr_img": 1e-30})
    moved = made(tmp_path / "b", settings={"init": init})
    assert not torch.equal(still.images, moved.images)
    assert moved.provenance["settings"]["init"] == init
    assert moved.provenance["iterations"] == 4


def test_matching_lowers_the_loss(tmp_path):
    recipe = load_recipe(
        example(
            settings={"init": "noise", "lr_img": 0.2, "batch_real": 8, "augment": "none"},
            budget={"steps": 60},
            output={"log_every": 1},
        )
    )
    job = open_job(recipe, tmp_path)
    open_method(recipe).run(job)
    job.log.close()
    import json

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    last = [line for line in lines if line["event"] == "step"][-1]
    assert set(last["terms"]) == {"attention/act0", "mmd"}
    assert {"pixel_min", "pixel_max"} <= set(last["notes"])


def test_the_artifact_reopens_with_everything(tmp_path):
    result = run(load_recipe(example()), folder=tmp_path / "run", progress=False)
    artifact = open_artifact(tmp_path / "run")
    found = distilled_of(artifact)
    assert artifact.kind == "dataset"
    assert torch.equal(found.images, distilled_of(result.artifact).images)
    assert found.preprocessing is not None
    assert found.provenance["method"] == "datadam"
    assert artifact.sheet is not None
    assert artifact.sheet.startswith(b"\x89PNG")
    figures = result.sides["distilled"]["0"]
    assert {"accuracy", "random_real", "k_means", "full_data", "lrs"} <= set(figures)
    assert "How the set was judged" in (tmp_path / "run" / "report.html").read_text()


def test_the_rate_is_scanned_on_validation_data(tmp_path):
    rates = [1e-30, 1.0]
    found = made(tmp_path, settings={"lr_scan": rates, "scan_steps": 2})
    scan = found.provenance["scan"]
    assert [row["point"] for row in scan] == rates
    best = max(scan, key=lambda row: row["measure"])["point"]
    assert found.provenance["lr_img"] == best


def test_evaluations_in_between_are_logged_on_validation_data(tmp_path):
    recipe = load_recipe(
        example(budget={"steps": 4, "validate_every": 2}, settings={"augment": "none"})
    )
    for _ in range(2):
        job = open_job(recipe, tmp_path)
        open_method(recipe).run(job)
        job.log.close()
    import json

    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["event"] == "validation" and line["stage"] == "match"]
    assert [line["step"] for line in found] == [2, 4]
    assert all(set(line["scores"]) == {"accuracy", "accuracy_std"} for line in found)


def test_whitened_space(tmp_path):
    found = made(tmp_path, settings={"space": "zca"})
    assert type(found.preprocessing).__name__ == "ZCA"


def test_bad_settings_are_told_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match="power"):
        open_method(load_recipe(example(settings={"power": 0})))
    with pytest.raises(RecipeError, match="add student"):
        made(tmp_path / "a", student=None)
    with pytest.raises(RecipeError, match=r"budget\.ema"):
        made(tmp_path / "b", budget={"steps": 2, "ema": 0.9})
    shallow = {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 1}}
    with pytest.raises(ModelError, match="two layers at least"):
        made(tmp_path / "c", student=shallow)
    assert made(tmp_path / "d", student=shallow, settings={"last_layer": True}).images.ndim == 4


@pytest.mark.parametrize(
    ("model", "options", "taps"),
    [
        (
            "torchvision:resnet18",
            {},
            {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3", "embed": "avgpool"},
        ),
        ("torchvision:vgg11", {}, {"relu1": "features.1", "relu2": "features.4"}),
        ("timm:resnet10t", {}, {"stage1": "layer1", "stage2": "layer2", "stage3": "layer3"}),
    ],
)
def test_networks_of_other_libraries_plug_in_by_their_taps(model, options, taps, tmp_path):
    pytest.importorskip(model.partition(":")[0])
    found = made(
        tmp_path,
        data={"name": "generated", "options": {"kind": "images", "shape": [3, 32, 32], "rows": 16}},
        student={"model": model, "options": options, "taps": taps},
        budget={"steps": 1},
        settings={"batch_real": 2},
    )
    assert found.images.shape == (4, 3, 32, 32)
    assert torch.isfinite(found.images).all()


def test_two_processes_equal_one(one_and_two_processes):
    """Each process has some of the classes (three over two), and the result is one's."""
    found = one_and_two_processes("datadam")
    torch.testing.assert_close(found[0]["images"], found[1]["images"], rtol=0, atol=1e-5)
    assert found[0]["accuracy"] == found[1]["accuracy"]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            example(
                budget={"steps": 120},
                settings={"ipc": 2, "batch_real": 8, "judge_epochs": 20, "judge_nets": 2},
                output={"checkpoint_minutes": 0.0, "log_every": 5},
            )
        )
    )

    def begin(folder):
        command = [sys.executable, "-m", "stillhouse", "run", str(recipe), "--folder", str(folder)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(process):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()[-3000:]

    finish(begin(tmp_path / "whole"))
    rng, kills = random.Random(1), 0
    folder = tmp_path / "killed"
    deadline = time.monotonic() + 150
    while kills < 3 and time.monotonic() < deadline:
        process = begin(folder)
        match = folder / "stages" / "match"
        while process.poll() is None and not list(match.glob("step-*")):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.05, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if (folder / "run.json").exists():
            break
    finish(begin(folder))
    assert kills
    whole, killed = (distilled_of(open_artifact(tmp_path / n)) for n in ("whole", "killed"))
    assert torch.equal(whole.images, killed.images)
    import json

    figures = [
        json.loads((tmp_path / n / "side.json").read_text())["figures"] for n in ("whole", "killed")
    ]
    for name in ("accuracy", "random_real", "k_means", "full_data"):
        assert figures[0][name] == figures[1][name]
