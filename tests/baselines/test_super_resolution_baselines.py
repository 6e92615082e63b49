from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.baselines.edsr_small import EdsrSmall
from stillhouse.launch import open_job, run, side_recipe
from stillhouse.methods.dense.imdn import Imdn
from stillhouse.models.edsr import EDSR
from stillhouse.opening import open_artifact
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method


def test_bicubic_gains_nothing_over_itself_and_has_no_stage(tmp_path: Path) -> None:
    recipe = side_recipe(load_recipe(Imdn.example()), "bicubic", 0)
    result = run(recipe, folder=tmp_path, progress=False)
    figures = result.sides["distilled"]["0"]
    assert figures["gain_y"] == 0.0
    assert figures["psnr_y"] > 20
    assert all(stage["kind"] == "judge" for stage in result.summary["stages"])


def test_edsr_has_the_size_it_is_told_and_takes_the_scale_of_the_data(tmp_path: Path) -> None:
    recipe = side_recipe(load_recipe(Imdn.example()), "edsr-small", 0)
    method = open_method(recipe)
    assert sum(p.numel() for p in EDSR(32, 4, 2).parameters()) == 121_987
    assert (method.config.channels, method.config.blocks) == (32, 4)
    three = {"name": "generated-pairs", "options": {"scale": 3}}
    recipe = load_recipe({**EdsrSmall.example(), "data": three})
    artifact = open_method(recipe).run(open_job(recipe, tmp_path))
    assert artifact.module.module.scale == 3
    artifact.save(tmp_path / "artifact")
    assert open_artifact(tmp_path / "artifact").module.module.channels == 4


def test_edsr_learns(tmp_path: Path) -> None:
    given = EdsrSmall.example()
    given["budget"] = {"steps": 80, "batch": 8, "lr": 5e-3, "optimizer": "adam"}
    figures = run(load_recipe(given), folder=tmp_path / "long", progress=False)
    given["budget"] = {**given["budget"], "steps": 1}
    start = run(load_recipe(given), folder=tmp_path / "short", progress=False)
    gained = [r.sides["distilled"]["0"]["psnr_y"] for r in (start, figures)]
    assert gained[1] > gained[0] + 1
    assert figures.sides["distilled"]["0"]["parameters"] == pytest.approx(
        sum(p.numel() for p in EDSR(4, 1, 2).parameters())
    )
