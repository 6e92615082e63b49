"""Images by class: the training of noise predictors, and how they are judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stillhouse import catalogue
from stillhouse.batch import Batch, Splits, TensorSource
from stillhouse.clock import Clock, generator
from stillhouse.errors import ModelError, StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.models.mini_unet import MiniUNet
from stillhouse.parts.noise import Sampler
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given
from stillhouse.stages.audit import checked_class, conditioning_table
from stillhouse.tasks import open_task
from stillhouse.tasks.image_generation import (
    UNTOLD,
    Denoising,
    ImageGeneration,
    ImagePredictor,
    Judged,
    NoiseNet,
    draw_images,
    independent_classifier,
    to_images,
    to_range,
)
from stillhouse.teacher import Knowledge


def splits(classes: int = 3, rows: int = 90) -> Splits:
    """Bright squares in a place that says the class, easy to tell apart."""

    def made(count: int, seed: int) -> TensorSource:
        rng = torch.Generator().manual_seed(seed)
        target = torch.arange(count) % classes
        x = 0.1 * torch.rand(count, 1, 4, 4, generator=rng)
        x[torch.arange(count), 0, target, target] = 1.0
        return TensorSource({"x": x, "target": target}, name=f"squares {seed}")

    about = {"classes": [f"c{c}" for c in range(classes)], "input": (1, 4, 4)}
    return Splits({"train": made(rows, 0), "test": made(rows, 1)}, "squares", about)


class Painter(torch.nn.Module):
    """Knows the image of every class, but paints class 0 as class 1 when it has forgotten."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.forgets, self.classes, self.shape, self.null = forgets, 3, (1, 4, 4), None

    def forward(self, noisy, time, condition):
        from stillhouse.parts.noise import NoiseSchedule

        if self.forgets:
            condition = torch.where(condition == 0, torch.ones_like(condition), condition)
        x0 = torch.full_like(noisy, -0.9)
        x0[torch.arange(len(x0)), 0, condition, condition] = 1.0
        return NoiseSchedule.linear().noise_of(noisy, x0 * self.scale, time.long())


def job_of(tmp_path):
    recipe = load_recipe({**catalogue.load("ddim").example(0), "data": "given"})
    return open_job(recipe, tmp_path, given=Given(splits=splits()))


def test_the_audit_of_painters_who_know_and_who_have_forgotten(tmp_path):
    job = job_of(tmp_path).judging()
    task: Any = job.task
    figures = {}
    for forgets in (False, True):
        net = task.net(Painter(forgets))
        net.sampler = Sampler(steps=2)
        figures[forgets] = task.audited(job, net, forget=0, override=1)
    knows, forgot = figures[False], figures[True]
    assert knows["classifier_accuracy"] > 0.97
    assert (knows["ua"], forgot["ua"]) == (0.0, 1.0)
    assert knows["accuracy"] == forgot["accuracy"] == 1.0
    assert (knows["override_share"], forgot["override_share"]) == (0.0, 1.0)
    assert knows["forgotten_probability"] > 0.5 > forgot["forgotten_probability"]
    assert knows["nfe"] == 2.0
    assert knows["leak"] == 0.0
    plain = task.judge(job, task.net(Painter(True)))
    assert plain["accuracy"] == pytest.approx(2 / 3)
    table = conditioning_table(job, {"after": task.net(Painter(True))}, 0)
    assert [row[0] for row in table["rows"]] == ["c0", "c1", "c2"]
    assert table["rows"][0][1:] == ["c1 (100%)", "0%"]


def test_a_class_without_images_is_not_told_to_be_gone(tmp_path):
    recipe = load_recipe({**catalogue.load("ddim").example(0), "data": "given"})
    found = splits(classes=2)
    found.about["classes"] = ["c0", "c1", "c2"]  # nobody has seen the third
    job = open_job(recipe, tmp_path, given=Given(splits=found))
    checked_class(job, "forget", 2)
    net = job.task.net(Painter(False))
    net.sampler = Sampler(steps=2)
    assert "ua" in job.task.audited(job.judging(), net, forget=0)
    figures = job.task.audited(job.judging(), net, forget=2)
    assert not figures.keys() & UNTOLD
    assert {"accuracy", "entropy", "frechet"} <= figures.keys()
    told = (tmp_path / "log.jsonl").read_text()
    assert told.count("no image of 'c2'") == 1


def test_one_classifier_judges_a_run_and_another_is_asked_within_it(tmp_path):
    job = job_of(tmp_path)
    judge = independent_classifier(job.child("audit"))
    assert independent_classifier(job.child("audit")) is judge
    other = independent_classifier(job)
    assert any(
        not torch.equal(a, b) for a, b in zip(judge.parameters(), other.parameters(), strict=True)
    )
    judged = Judged(judge, torch.rand(5, 1, 4, 4))
    assert judged.probabilities.shape == (5, 3)
    assert judged.features.shape[0] == 5


def test_images_have_their_range_and_their_noise_is_of_the_seed():
    torch.manual_seed(0)
    net = NoiseNet(MiniUNet(classes=3, size=4, width=4, multipliers=[1]), sampler=Sampler(0, 440))
    asked = torch.tensor([0, 1, 2, 0])
    first = draw_images(net, asked, (1, 4, 4), generator("a"))
    again = draw_images(net, asked, (1, 4, 4), generator("a"), batch=3)
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, draw_images(net, asked, (1, 4, 4), generator("b")))
    assert net.training
    x = torch.rand(3, 1, 2, 2)
    torch.testing.assert_close(to_images(to_range(x)), x)


def test_a_perfect_denoiser_has_no_loss_and_labels_are_hidden_at_times():
    asked = []

    class Seen(torch.nn.Module):
        null, label_dropout = 3, 0.5

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noisy, time, condition):
            asked.extend(condition.tolist())
            return noisy * self.w

    objective = Denoising(NoiseNet(Seen()))
    batch = Batch(id=torch.arange(200), x=torch.rand(200, 1, 2, 2), target=torch.ones(200).long())
    loss = objective(batch, Knowledge.none, Clock())["noise"]
    # Nothing is predicted: the noise itself is left, of variance 1 at four places.
    assert float(loss.detach()) == pytest.approx(4.0, rel=0.15)
    assert 0.35 < asked.count(3) / 200 < 0.65
    assert set(asked) == {1, 3}


def test_guidance_without_no_class_is_told():
    net = NoiseNet(Painter(False))
    with pytest.raises(ModelError, match="without classes"):
        net.noise(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1).long(), 1.0)


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({"model": "torch.nn:Linear", "options": {"in_features": 3, "out_features": 2}}, "noise"),
        ({"model": "stillhouse:mini-unet", "options": {"classes": 7}}, "knows 7 classes"),
        ({"model": "stillhouse:small_cnn"}, "noise predictor"),
    ],
)
def test_models_that_draw_nothing_are_told(teacher, told, tmp_path):
    recipe = load_recipe({**catalogue.load("ddim").example(0), "teacher": teacher})
    with pytest.raises(StillhouseError, match=told):
        run(recipe, folder=tmp_path, progress=False)


@pytest.mark.parametrize("entry", ["sfd", "esd"])
@pytest.mark.parametrize(("field", "value"), [("select", "best"), ("validate_every", 2)])
def test_choosing_a_state_by_rows_is_told(entry, field, value, tmp_path):
    given = catalogue.load(entry).example(0)
    given["budget"][field] = value
    with pytest.raises(StillhouseError, match=rf"leave out budget\.{field}"):
        run(load_recipe(given), folder=tmp_path, progress=False)


def test_a_predictor_reopens_with_its_sampler():
    torch.manual_seed(0)
    module = MiniUNet(classes=3, size=4, width=4, multipliers=[1])
    task = open_task("image-generation", splits())
    assert isinstance(task, ImageGeneration)
    net = NoiseNet(module, sampler=Sampler(steps=0, time=300), guidance=0.5)
    predictor = task.predictor(net)
    from stillhouse.net import Net

    again = ImagePredictor.restore(Net(module, answer="noise"), predictor.settings)
    assert again.module.sampler == net.sampler
    assert again.module.guidance == 0.5
    assert torch.equal(again.predict([1], seed=4)[0], predictor.predict(["c1"], seed=4)[0])
    with pytest.raises(StillhouseError, match="whole number"):
        again.predict([1], seed=-1)


def test_a_run_with_a_profile(tmp_path):
    result = run(
        load_recipe(catalogue.load("sfd").example(0)), folder=tmp_path, progress=False,
        profiled=True,
    )  # fmt: skip
    assert result.summary["profile"]
