"""Channel-wise and pixel-wise distillation of segmentation networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Clock
from stillhouse.errors import StillhouseError
from stillhouse.launch import open_job, run
from stillhouse.losses.spatial import kl_pixels, kl_space, resized_to, soft_trimap
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method


def recipe(name: str, **changes: Any):
    return load_recipe({**catalogue.load(name).example(), "compare": [], **changes})


def opened(name: str, folder: Path, **changes: Any):
    told = recipe(name, **changes)
    job = open_job(told, folder)
    teacher = job.teacher()
    made = open_method(told).objective(job, job.student(), teacher)
    teacher.bind(made.wants, job.task)
    batch = read_rows(job.splits["train"], torch.arange(4), None)
    made.eval()
    return job, made, teacher, batch


@pytest.mark.parametrize(
    ("name", "term", "loss"), [("cwd", "channels", kl_space), ("pixel-kd", "pixels", kl_pixels)]
)
def test_the_term_is_its_weight_times_the_divergence_of_logits(name, term, loss, tmp_path):
    _, made, teacher, batch = opened(name, tmp_path, settings={"weight": 2.0, "temperature": 3.0})
    said = teacher.knowledge(batch)
    terms = made(batch, said, Clock())
    assert list(terms) == ["task", term]
    own = made.student(batch.view("x"))["logits"]
    expected = 2.0 * loss(own, said.tensor("logits"), temperature=3.0)
    torch.testing.assert_close(terms[term], expected)
    alone = made(Batch(batch), said, Clock())["task"]
    torch.testing.assert_close(alone, terms["task"])


@pytest.mark.parametrize("name", ["cwd", "pixel-kd"])
def test_a_larger_teacher_map_is_resized(name, tmp_path):
    _, made, teacher, batch = opened(name, tmp_path)
    said = teacher.knowledge(batch)
    large = resized_to(said.tensor("logits"), (24, 24))
    found = made(batch, type(said)({"logits": large}), Clock())
    assert all(torch.isfinite(value) for value in found.values())


def test_pixels_near_edges_alone(tmp_path):
    settings = catalogue.load("pixel-kd").variants["edges"].set
    _, made, teacher, batch = opened("pixel-kd", tmp_path, settings={**settings, "radius": 1})
    said = teacher.knowledge(batch)
    own = made.student(batch.view("x"))["logits"]
    mask = soft_trimap(batch["target"], 3, tuple(own.shape[2:]), radius=1)[0].amax(1)
    each = kl_pixels(own, said.tensor("logits"), temperature=4.0, reduction="none")
    expected = ((each * mask).sum((1, 2)) / mask.sum((1, 2))).mean()
    torch.testing.assert_close(made(batch, said, Clock())["pixels"], expected)
    batch["target"] = torch.zeros_like(batch["target"])
    assert made(batch, said, Clock())["pixels"] == 0


def test_features_need_a_projector_that_leaves_with_the_training(tmp_path):
    settings = catalogue.load("cwd").variants["features"].set
    tap = {"map": "decoder"}
    networks = {
        side: {**catalogue.load("cwd").example()[side], "taps": tap}
        for side in ("student", "teacher")
    }
    _, made, teacher, batch = opened("cwd", tmp_path / "a", settings=settings, **networks)
    assert made.projector.weight.shape == (8, 4, 1, 1)
    terms = made(batch, teacher.knowledge(batch), Clock())
    terms["channels"].backward()
    assert made.projector.weight.grad.abs().sum() > 0
    told = recipe("cwd", settings=settings, **networks)
    run(told, folder=tmp_path / "run", progress=False)
    kept = plain_state(open_artifact(tmp_path / "run").module)
    assert not any("projector" in name for name in kept)
    with pytest.raises(StillhouseError, match="map"):
        opened("cwd", tmp_path / "b", settings=settings)


@pytest.mark.parametrize("name", ["cwd", "pixel-kd"])
def test_without_a_weight_no_teacher_is_asked(name):
    assert not open_method(recipe(name, settings={"weight": 0.0})).wants_teacher()
    assert open_method(recipe(name)).wants_teacher()
