from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stillhouse import catalogue
from stillhouse.clock import Clock
from stillhouse.errors import CheckpointError, ModelError, RecipeError
from stillhouse.launch import infer, open_job, run
from stillhouse.methods.dense.imdn import Imdn, ImdnObjective
from stillhouse.models.imdn import IMDN, IMDN_AS, load_published, parameter_count
from stillhouse.opening import open_artifact
from stillhouse.parts.degrade import imresize
from stillhouse.parts.schedule import halved_every
from stillhouse.planning import plan
from stillhouse.recipe import dump_recipe, load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.teacher import Knowledge


def recipe(**changes: Any):
    given = {**Imdn.example(), "compare": []}
    for key, value in changes.items():
        inner = given.get(key)
        given[key] = {**inner, **value} if isinstance(inner, dict) else value
    return load_recipe(given)


def network(tmp_path: Path, **changes: Any) -> torch.nn.Module:
    """The network a recipe's method would train, before any training."""
    told = recipe(**changes)
    job = open_job(told, tmp_path)
    return open_method(told).network(job).module


# The objective -----------------------------------------------------------------------------


def test_l1_of_the_reference_network_matches(golden, tmp_path: Path) -> None:
    case = golden("imdn").case("net_x2")
    state = {k[2:]: torch.from_numpy(v).float() for k, v in case.items() if k.startswith("w.")}
    job = open_job(recipe(), tmp_path)
    objective = ImdnObjective(job.task.net(load_published(state)), job.task)
    batch = {"x": torch.from_numpy(case["lr"]), "target": torch.from_numpy(case["hr"])}
    batch = job.task.collate([{k: v[i] for k, v in batch.items()} for i in range(len(batch["x"]))])
    terms = objective(batch, Knowledge.none, Clock())
    assert set(terms) == {"task"}
    assert float(terms["task"].detach()) == pytest.approx(float(case["l1_f64"]), abs=1e-6)
    terms["task"].backward()
    grads = dict(objective.student.module.named_parameters())
    for name, value in case.items():
        if name.startswith("g."):
            np.testing.assert_allclose(grads[name[2:]].grad, value, atol=1e-6)


def test_a_teacher_shares_the_weight(tmp_path: Path) -> None:
    job = open_job(recipe(), tmp_path)
    batch = job.task.collate([job.splits["train"][i, None] for i in range(4)])
    teacher = torch.rand(batch["target"].shape)
    known = Knowledge({"image": teacher})
    net = job.student()
    image = net(batch.view())["image"].detach()
    gaps = {
        "task": float((image - batch["target"]).abs().mean()),
        "teacher": float((image - teacher).abs().mean()),
    }
    for weight, shares in ((0.3, {"task": 0.7, "teacher": 0.3}), (1.0, {"teacher": 1.0})):
        terms = ImdnObjective(net, job.task, weight)(batch, known, Clock())
        assert set(terms) == set(shares)
        for name, share in shares.items():
            assert float(terms[name].detach()) == pytest.approx(share * gaps[name], rel=1e-5)
    assert ImdnObjective(net, job.task).wants == ()


def test_released_schedule(golden) -> None:
    vectors = golden("imdn")
    schedule = halved_every(200)
    for epoch, rate in vectors.json["lr_schedule"]:
        # Clock epochs count from 0, those of the released code from 1.
        assert 2e-4 * schedule(Clock(epoch=epoch - 1)) == pytest.approx(rate, rel=1e-12)
    vectors.count("lr_schedule")


def test_official_variant_trains_by_the_released_schedule(tmp_path: Path) -> None:
    official = load_recipe({**Imdn.example(), "budget": {}, "variant": "official"})
    assert official.budget.epochs == 1000
    assert official.budget.lr == 2e-4
    assert official.budget.optimizer == "adam"
    assert official.budget.weight_decay == 0
    schedule = open_method(official).training(open_job(official, tmp_path))["schedule"]
    assert [schedule(Clock(epoch=e)) for e in (0, 198, 199, 399)] == [1.0, 1.0, 0.5, 0.25]
    assert open_method(recipe()).training(None) == {}


# The network -------------------------------------------------------------------------------


def test_settings_are_the_ablations(tmp_path: Path) -> None:
    student = {"options": {"channels": 16, "blocks": 2}}
    whole = network(tmp_path, student=student)
    assert isinstance(whole, IMDN)
    assert whole.settings()["attention"] == "contrast"
    assert whole.scale == 2
    plain = network(tmp_path, student=student, settings={"split": False})
    assert not plain.split
    assert parameter_count(plain) >= parameter_count(whole)
    mean = network(tmp_path, student=student, settings={"attention": "mean"})
    assert mean.IMDB1.cca.kind == "mean"
    assert parameter_count(mean) == parameter_count(whole)
    alone = network(tmp_path, student=student, settings={"collect": False})
    assert not hasattr(alone, "c")


def test_sides_begin_with_equal_weights(tmp_path: Path) -> None:
    first = network(tmp_path).state_dict()
    second = network(tmp_path, settings={"attention": "mean"}).state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    other = network(tmp_path, seed=1).state_dict()
    assert not torch.equal(first["fea_conv.weight"], other["fea_conv.weight"])


def test_every_variant_runs(tmp_path: Path) -> None:
    for name in catalogue.find("imdn").variants:
        if name == "official":
            continue
        told = load_recipe({**Imdn.example(), "variant": name})
        artifact = open_method(told).run(open_job(told, tmp_path / name))
        artifact.save(tmp_path / name / "artifact")
        again = open_artifact(tmp_path / name / "artifact")
        state = again.module.module.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in artifact.module.module.state_dict().items())


def test_ablations_of_foreign_or_loaded_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the student is a EDSR"):
        network(
            tmp_path,
            student={"model": "stillhouse:edsr", "options": {"channels": 4, "blocks": 1}},
            settings={"split": False},
        )
    save_file(IMDN(8, 1, 2).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(RecipeError, match=r"\['split'\] change the network"):
        network(
            tmp_path,
            student={"weights": str(tmp_path / "net.safetensors")},
            settings={"split": False},
        )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_weights_are_the_start(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(5)
    state = {f"module.{k}": v for k, v in IMDN(8, 1, 2).state_dict().items()}
    file = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    loaded = network(tmp_path, student={"weights": str(file)}).state_dict()
    assert all(torch.equal(v, state[f"module.{k}"]) for k, v in loaded.items())

    three = network(tmp_path, data={"options": {"scale": 3}}, settings={"start": str(file)})
    fresh = network(tmp_path, data={"options": {"scale": 3}}).state_dict()
    for name, value in three.state_dict().items():
        tail = name.startswith("upsampler.")
        assert torch.equal(value, fresh[name] if tail else state[f"module.{name}"])

    with pytest.raises(ModelError, match=r"upsampler\.0\.bias is \(12,\) in the file, \(27,\)"):
        network(tmp_path, data={"options": {"scale": 3}}, student={"weights": str(file)})
    wide = {"options": {"channels": 8, "blocks": 2}}
    with pytest.raises(CheckpointError, match=r"IMDB2\.c1\.bias"):
        network(tmp_path, student=wide, settings={"start": str(file)})


# Whole runs --------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_says_its_size(tmp_path: Path) -> None:
    budget = {"steps": 80, "batch": 8, "lr": 5e-3}
    told = recipe(student={"options": {"channels": 16, "blocks": 1}}, budget=budget)
    result = run(told, folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    before = network(tmp_path / "fresh", student={"options": {"channels": 16, "blocks": 1}})
    assert figures["parameters"] == parameter_count(before)
    job = open_job(told, tmp_path / "fresh").judging()
    assert figures["psnr_y"] > job.evaluate(job.task.net(before), "test")["psnr_y"] + 5


def test_a_teacher_of_the_recipe_is_asked(tmp_path: Path) -> None:
    teacher = {"model": "stillhouse:bicubic"}
    told = recipe(teacher=teacher, settings={"teacher_weight": 1.0})
    result = run(told, folder=tmp_path / "run", progress=False)
    assert set(result.sides) == {"distilled", "teacher"}
    alone = run(recipe(), folder=tmp_path / "alone", progress=False)
    assert result.sides["distilled"]["0"]["psnr_y"] != alone.sides["distilled"]["0"]["psnr_y"]
    with pytest.raises(RecipeError, match="needs a teacher"):
        run(recipe(settings={"teacher_weight": 0.5}), folder=tmp_path / "no", progress=False)


def photographs(place: Path) -> None:
    place.mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(66, 75), (70, 61), (101, 97)]):
        coarse = rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
        Image.fromarray(imresize(coarse, size=size)).save(place / f"{number}.png")


def test_any_scale_network_from_a_folder_to_a_folder(tmp_path: Path) -> None:
    photographs(tmp_path / "hr")
    options = {
        "images": str(tmp_path / "hr"),
        "scale": 1.5,
        "enlarge": True,
        "patch": 32,
        "held_out_test": 1,
    }
    told = load_recipe(
        {
            **Imdn.example(),
            "data": {"name": "photographs", "options": options},
            "student": {"model": "stillhouse:imdn-as", "options": {"channels": 8, "blocks": 1}},
        }
    )
    result = run(told, folder=tmp_path / "run", progress=False)
    assert isinstance(result.artifact.module.module, IMDN_AS)
    found = infer(tmp_path / "run", [tmp_path / "hr"], tmp_path / "out", {"factor": "1"})
    sizes = {Path(r["input"]).name: (r["size"], r["restored"]) for r in found["rows"]}
    assert sizes["2.png"] == ("101x97", "101x97")
    found = infer(tmp_path / "run", [tmp_path / "hr" / "0.png"], tmp_path / "one.png", {})
    assert found["rows"][0]["restored"] == "99x112"
    assert Image.open(tmp_path / "one.png").size == (112, 99)


def test_a_checkpoint_is_exported_and_judged_without_training(tmp_path: Path) -> None:
    torch.manual_seed(3)
    save_file(IMDN(8, 1, 2).state_dict(), tmp_path / "net.safetensors")
    told = recipe(student={"weights": str(tmp_path / "net.safetensors")}, settings={"train": False})
    result = run(told, folder=tmp_path / "run", progress=False)
    assert result.summary["stages"] == [s for s in result.summary["stages"] if s["kind"] == "judge"]
    kept = load_file(tmp_path / "run" / "artifact" / "model.safetensors")
    given = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in given.items())


def _start(folder: Path, told: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from stillhouse.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", str(told), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_killed_and_started_again_it_ends_the_same(tmp_path: Path) -> None:
    told = recipe(
        budget={"steps": 25},
        output={"checkpoint_minutes": 0.0},
        hardware={"threads": 1},
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(told))
    whole = _start(tmp_path / "whole", file)
    assert whole.wait(timeout=120) == 0

    folder = tmp_path / "cut"
    stage = folder / "stages" / "student"
    killed = _start(folder, file)
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline:
        if any(int(p.stem.split("-")[1]) >= 5 for p in stage.glob("step-*.state")):
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    killed.wait(timeout=60)
    assert not (folder / "artifact" / "artifact.json").exists(), "it finished before the kill"
    again = _start(folder, file)
    assert again.wait(timeout=120) == 0
    first = (tmp_path / "whole" / "artifact" / "model.safetensors").read_bytes()
    assert (folder / "artifact" / "model.safetensors").read_bytes() == first


# With real data ----------------------------------------------------------------------------


def test_the_recipe_of_the_demonstration_is_the_sheets(data_root: Path) -> None:
    told = load_recipe(Path(__file__).resolve().parents[2] / "recipes" / "imdn.yaml")
    assert told.budget.steps == 1000
    assert told.budget.batch == 8
    planned = plan(told)
    assert planned["models"]["student"]["parameters"] == 122_100
    assert planned["data"]["input"] == (3, 24, 24)
    assert planned["data"]["rows"] == {"train": 800, "val": 20, "test": 5}


@pytest.mark.slow
def test_published_weights_reach_their_figure_on_set5(
    data_root: Path, golden_weights: Path, tmp_path: Path
) -> None:
    told = load_recipe(
        {
            "method": "imdn",
            "data": {"name": "set5"},
            "student": {
                "model": "stillhouse:imdn",
                "weights": str(golden_weights / "imdn_x2.safetensors"),
            },
            "settings": {"train": False},
            "budget": {"steps": 1},
        }
    )
    result = run(told, folder=tmp_path / "run", progress=False)
    figures = result.sides["distilled"]["0"]
    assert figures["psnr_y"] == pytest.approx(37.996, abs=5e-4)
    assert figures["ssim_y"] == pytest.approx(0.9605, abs=5e-5)
    assert figures["psnr_y_8bit"] == pytest.approx(37.911, abs=5e-4)
    assert figures["psnr_y"] - figures["gain_y"] == pytest.approx(33.68, abs=0.02)
    assert figures["parameters"] == 694_404
