"""Matching training trajectories: the baseline of DATM and its kin."""

from __future__ import annotations

import pytest
import torch

from stillhouse import catalogue
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.launch import open_job, side_recipe
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.set_distillation import distilled_of


def made(entry: str, folder, **changes) -> DistilledSet:
    example = catalogue.load(entry).example(0)
    example["settings"] = {**example["settings"], **changes.pop("settings", {})}
    recipe = load_recipe({**example, "compare": [], **changes})
    return distilled_of(open_method(recipe).run(open_job(recipe, folder)))


def test_it_begins_with_the_images_of_random_real_and_moves_them(tmp_path):
    settings = {"space": "zca"}
    start = made("random-real", tmp_path / "a", settings=settings)
    found = made("mtt", tmp_path / "b", settings={"lr_img": 50.0})
    assert found.label_logits is None
    assert found.lr != 0.01
    assert not torch.equal(found.images, start.images)
    still = made("mtt", tmp_path / "c", settings={"lr_img": 1e-30, "lr_lr": 0.0})
    torch.testing.assert_close(still.images, start.images)
    assert still.lr == pytest.approx(0.01)


def test_datm_without_its_changes_is_the_same(tmp_path):
    off = {
        "init": "real", "labels": "hard", "sequential": False, "max_start": 2, "threshold": None,
        "rho": 0.0, "lr_img": 1000.0, "batch_syn": 0, "judge_batch": 256,
    }  # fmt: skip
    ours = made("mtt", tmp_path / "mtt")
    theirs = made("datm", tmp_path / "datm", settings=off)
    assert torch.equal(ours.images, theirs.images)
    assert ours.lr == theirs.lr


def test_the_window_is_early_and_fixed():
    entry = catalogue.load("mtt")
    assert entry(entry.Config()).window(5).upper(Clock()) == 20
    assert entry(entry.Config(expert_epochs=2)).window(5).upper(Clock()) == 1
    method = entry(entry.Config(max_start=7))
    window = method.window(5)
    assert (window.lowest, window.threshold, window.steps) == (0, None, 5)
    assert [window.upper(Clock(step=s)) for s in (0, 4000)] == [7, 7]


def test_as_a_side_it_takes_over_experts_and_steps_but_not_windows_or_labels():
    recipe = load_recipe(
        {
            **catalogue.load("datm").example(0),
            "settings": {
                "ipc": 3, "experts": 5, "expert_epochs": 9, "inner_steps": 4, "lr_img": 7.0,
                "grow_from": 2, "max_start": 5, "lr_y": 3.0, "rho": 0.5,
            },
        }
    )  # fmt: skip
    side = side_recipe(recipe, "mtt", 4)
    assert side.settings == {
        "ipc": 3, "experts": 5, "expert_epochs": 9, "inner_steps": 4,
    }  # fmt: skip
    assert open_method(side).window(1).upper(Clock()) == 3


def test_a_window_beyond_the_experts_is_told(tmp_path):
    with pytest.raises(RecipeError, match="max_start may be 3 at most"):
        made("mtt", tmp_path, settings={"max_start": 9})
