"""What an unlearned generator is compared with: the teacher, retraining, redirected scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.models.mini_unet import MiniUNet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.tasks.image_generation import Denoising, NoiseNet
from stillhouse.teacher import Frozen, Knowledge


def recipe_of(entry: str, **changes: Any):
    given = catalogue.load(entry).example(0)
    for key, value in changes.items():
        given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    return load_recipe(given)


def unet(seed: int) -> NoiseNet:
    torch.manual_seed(seed)
    module = MiniUNet(classes=3, size=4, width=4, multipliers=[1], dropout=0.0)
    torch.nn.init.normal_(module.last.weight, std=0.3)
    return NoiseNet(module)


def redirection(**settings: Any):
    esd: Any = catalogue.load("esd")
    module = __import__(esd.__module__, fromlist=["Redirection"])
    images = torch.rand(3, 5, 1, 4, 4) * 2 - 1
    phi = Frozen(unet(1))
    return module.Redirection(unet(2), phi, images, esd.Config(forget=1, **settings), 2), phi


@pytest.mark.parametrize("target", ["negative", "override"])
def test_scores_of_one_class_are_turned_and_the_others_kept(target):
    objective, phi = redirection(target=target, strength=0.5)
    x_t, times = torch.randn(4, 1, 4, 4), torch.tensor([5, 100, 400, 900])
    labels = torch.tensor([1, 1, 0, 2])
    net = phi.module
    with torch.no_grad():
        found = objective._target(x_t, times, labels, 2)
        kept = net.noise(x_t, times, labels)
        none = net.noise(x_t, times, torch.full((4,), net.null))
        other = net.noise(x_t, times, torch.full((4,), 2))
    torch.testing.assert_close(found[2:], kept[2:])
    expected = other[:2] if target == "override" else none[:2] - 0.5 * (kept[:2] - none[:2])
    torch.testing.assert_close(found[:2], expected)


def test_a_copy_of_the_teacher_has_no_loss_on_the_others():
    objective, phi = redirection(target="override")
    objective.student.load_state_dict(phi.module.state_dict())
    terms = objective(Batch(id=torch.arange(8)), Knowledge.none, Clock())
    assert float(terms["keep"].detach()) == pytest.approx(0.0, abs=1e-8)
    assert float(terms["forget"].detach()) > 0
    alone, _ = redirection(keep_weight=0.0)
    assert set(alone(Batch(id=torch.arange(8)), Knowledge.none, Clock())) == {"forget"}


def test_the_class_is_not_among_what_is_trained_anew(tmp_path, monkeypatch):
    seen: set[int] = set()
    inner = Denoising.forward

    def forward(self, batch, knowledge, clock):
        seen.update(batch["target"].tolist())
        return inner(self, batch, knowledge, clock)

    monkeypatch.setattr(Denoising, "forward", forward)
    train = {"model": "stillhouse:mini-unet", "options": {"width": 4, "multipliers": [1]},
             "train": {"steps": 12, "batch": 8, "lr": 1e-3}}  # fmt: skip
    recipe = recipe_of("retrain-without", settings={"forget": 2}, teacher=train)
    job = open_job(recipe, tmp_path)
    artifact = open_method(recipe).run(job)
    job.log.close()
    assert seen == {0, 1, 3}
    assert artifact.meta["unlearning"]["forgotten"] == "class 2"


def test_retraining_needs_to_know_how(tmp_path):
    recipe = recipe_of("retrain-without", teacher={"train": None})
    with pytest.raises(StillhouseError, match="how the teacher is trained"):
        run(recipe, folder=tmp_path, progress=False)


@pytest.mark.parametrize("entry", ["ddim", "esd", "retrain-without"])
def test_a_class_that_is_not_there_is_told(entry, tmp_path):
    with pytest.raises(StillhouseError, match="class 7 of 4"):
        run(recipe_of(entry, settings={"forget": 7}), folder=tmp_path, progress=False)


def test_steps_are_counted(tmp_path):
    result = run(recipe_of("ddim", settings={"steps": 3}), folder=tmp_path, progress=False)
    assert result.sides["distilled"]["0"]["nfe"] == 3.0
    assert result.artifact.predictor.settings["sampler"]["steps"] == 3


@pytest.mark.parametrize(("mode", "shown"), [("swap", 2), ("ascent", 1)])
def test_the_forgotten_number_is_shown_other_images_or_pushed_from_its_own(mode, shown):
    entry: Any = catalogue.load("label-swap")
    module = __import__(entry.__module__, fromlist=["Against"])
    config = entry.Config(forget=1, mode=mode)
    net, asked = unet(3), []
    inner = net.module.forward
    net.module.forward = lambda noisy, time, condition: (
        asked.extend(condition.tolist()) or inner(noisy, time, condition)
    )
    objective = module.Against(net, config, 2)
    target = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    batch = Batch(id=torch.arange(7), x=torch.rand(7, 1, 4, 4), target=target)
    terms = objective(batch, Knowledge.none, Clock())
    stay, rows = objective.rows(batch)
    assert (target[stay] != 1).all()
    assert (target[rows] == shown).all()
    assert asked == [*target[stay].tolist(), 1, 1]
    assert objective.count(batch) == {"keep": 5, "forget": 2}
    assert float(terms["keep"].detach()) > 0
    assert (float(terms["forget"].detach()) < 0) == (mode == "ascent")


def test_a_batch_without_the_class_still_keeps_the_others(tmp_path):
    entry: Any = catalogue.load("label-swap")
    module = __import__(entry.__module__, fromlist=["Against"])
    objective = module.Against(unet(3), entry.Config(forget=1), 2)
    batch = Batch(id=torch.arange(3), x=torch.rand(3, 1, 4, 4), target=torch.zeros(3).long())
    assert objective.count(batch) == {"keep": 3, "forget": 0}
    assert torch.isfinite(objective(batch, Knowledge.none, Clock())["keep"])
