"""A class-conditional UNet2DModel of diffusers, from a tiny random config, and its scheduler."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from stillhouse import catalogue
from stillhouse.errors import MissingExtra, ModelError, StillhouseError
from stillhouse.exporting import export_artifact
from stillhouse.launch import run
from stillhouse.models.diffusers_unet import DiffusersUNet, schedule_of
from stillhouse.models.loading import load_model
from stillhouse.parts.noise import NoiseSchedule
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given

diffusers = pytest.importorskip("diffusers")

TINY: dict[str, Any] = {
    "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1,
    "norm_num_groups": 4, "num_class_embeds": 5, "add_attention": False,
}  # fmt: skip
SCHEDULER = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
Sfd: Any = catalogue.load("sfd")


def tiny(**changes: Any):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**TINY, **changes})


def folder_of(place, unet=None, scheduler=None, **index):
    (unet or tiny()).save_pretrained(place / "unet")
    made = scheduler or diffusers.DDPMScheduler(**SCHEDULER)
    made.save_pretrained(place / "scheduler")
    told = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], **index}
    (place / "model_index.json").write_text(json.dumps(told))
    return place


def recipe_of(**changes: Any):
    given = {**Sfd.example(0), **changes}
    given["settings"] = {**given["settings"], **changes.get("settings", {})}
    return load_recipe(given)


def test_the_schedule_is_that_of_the_scheduler():
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = diffusers.DDPMScheduler(beta_schedule=kind)
        ours = schedule_of(dict(scheduler.config)).alphas_cumprod
        torch.testing.assert_close(ours.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        schedule_of({}).alphas_cumprod, NoiseSchedule.linear().alphas_cumprod, rtol=1e-4, atol=1e-7
    )


def test_a_pipeline_folder_is_opened_as_a_model(tmp_path):
    unet = tiny()
    place = folder_of(tmp_path, unet)
    made = load_model(str(place), about={"classes": 4, "input": (1, 4, 4)})
    assert isinstance(made, DiffusersUNet)
    assert (made.classes, made.null, made.shape) == (4, 4, (1, 4, 4))
    x, t, c = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    expected = unet(x, t, class_labels=c).sample
    torch.testing.assert_close(made(x, t, c), expected)
    kept = diffusers.DDPMScheduler(**SCHEDULER).alphas_cumprod
    torch.testing.assert_close(made.schedule.abar(440).float(), kept[440])
    alone = load_model(str(place / "unet"), about={"classes": 4})
    torch.testing.assert_close(alone(x, t, c), expected)


def test_it_is_built_from_configs_and_says_how(tmp_path):
    made = DiffusersUNet.wrapping(tiny(), diffusers.DDPMScheduler(**SCHEDULER), classes=4)
    told = json.loads(json.dumps(made.rebuilt()))
    again = load_model(told["id"], options=told["options"])
    again.load_state_dict(made.state_dict())
    x, t, c = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    torch.testing.assert_close(again(x, t, c), made(x, t, c))
    assert torch.equal(again.schedule.alphas_cumprod, made.schedule.alphas_cumprod)


def test_without_an_embedding_for_no_class_there_is_no_guidance(tmp_path):
    made = DiffusersUNet.wrapping(tiny(num_class_embeds=4), classes=4)
    assert made.null is None
    assert made.label_dropout == 0.0
    place = folder_of(tmp_path / "p", tiny(num_class_embeds=4))
    recipe = recipe_of(teacher=str(place), settings={"guidance": 1.0})
    with pytest.raises(StillhouseError, match="guidance"):
        run(recipe, folder=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("unet", "told"),
    [
        ({"num_class_embeds": None}, "not asked by class labels"),
        ({"num_class_embeds": 9}, "9 class embeddings, the data 4 classes"),
        ({"out_channels": 2}, "learned variance"),
    ],
)
def test_other_networks_are_refused(unet, told):
    with pytest.raises(ModelError, match=told):
        DiffusersUNet.wrapping(tiny(**unet), classes=4)


def test_other_predictions_and_pipelines_are_refused(tmp_path):
    with pytest.raises(ModelError, match="v_prediction"):
        schedule_of({"prediction_type": "v_prediction"})
    velocity = diffusers.DDPMScheduler(prediction_type="v_prediction")
    place = folder_of(tmp_path / "v", scheduler=velocity)
    with pytest.raises(ModelError, match="epsilon"):
        load_model(str(place), about={"classes": 4})
    text = folder_of(tmp_path / "t", text_encoder=["transformers", "CLIPTextModel"])
    with pytest.raises(ModelError, match=r"text_encoder.*class-conditional UNet2DModel"):
        load_model(str(text), about={"classes": 4})
    lone = tmp_path / "lone"
    tiny().save_pretrained(lone)
    with pytest.raises(ModelError, match=r"scheduler_config\.json"):
        load_model(str(lone), about={"classes": 4})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ModelError, match="UNet2DConditionModel"):
        load_model(str(tmp_path / "c"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match="generative"):
        DiffusersUNet(config=TINY)


def test_a_class_is_forgotten_from_a_pipeline_and_the_generator_goes_back(tmp_path):
    place = folder_of(tmp_path / "pipeline")
    result = run(recipe_of(teacher=str(place)), folder=tmp_path / "run", progress=False)
    for path in place.rglob("*.safetensors"):
        path.unlink()  # the artifact needs nothing of it
    from stillhouse.opening import open_artifact

    artifact = open_artifact(tmp_path / "run")
    assert isinstance(artifact.module.module, DiffusersUNet)
    images = artifact.predict([1, 2])
    told = export_artifact(tmp_path / "run", "diffusers", tmp_path / "out")
    assert told["largest_difference"] < 1e-5
    back = diffusers.UNet2DModel.from_pretrained(str(tmp_path / "out" / "unet")).eval()
    kept = diffusers.DDPMScheduler.from_pretrained(
        str(tmp_path / "out" / "scheduler")
    ).alphas_cumprod[440]
    from stillhouse.clock import generator

    noise = torch.randn(2, 1, 4, 4, generator=generator("infer", 0))
    with torch.no_grad():
        found = back((1 - kept).sqrt() * noise, 440, class_labels=torch.tensor([1, 2])).sample
    theirs = ((1 / kept - 1).sqrt() * (noise - found) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(torch.stack(images), theirs, rtol=1e-3, atol=1e-4)
    assert "440" in (tmp_path / "out" / "README.md").read_text()
    assert result.sides["distilled"]["0"]["nfe"] == 1.0
    read = DiffusersUNet(folder=str(tmp_path / "out"), classes=4)
    assert read.null == 4


def test_a_folder_among_the_options_brings_weights_too(tmp_path):
    place = folder_of(tmp_path / "pipeline")
    teacher = {"model": "stillhouse:diffusers-unet", "options": {"folder": str(place)}}
    run(recipe_of(teacher=teacher), folder=tmp_path / "run", progress=False)
    assert "knows nothing" not in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_unet_is_handed_in_as_an_object(tmp_path):
    recipe = recipe_of(teacher="given")
    result = run(recipe, folder=tmp_path, progress=False, given=Given(teacher=tiny()))
    assert result.sides["teacher"]["0"]["nfe"] == 2.0
    assert isinstance(result.artifact.module.module, DiffusersUNet)


def test_a_fresh_one_is_trained_by_the_recipe(tmp_path):
    teacher = {
        "model": "stillhouse:diffusers-unet",
        "options": {"config": {k: v for k, v in TINY.items() if k != "num_class_embeds"}},
        "train": {"steps": 2, "batch": 8, "lr": 1e-3, "optimizer": "adam"},
    }
    result = run(recipe_of(teacher=teacher), folder=tmp_path, progress=False)
    assert result.artifact.module.null == 4


def test_other_models_have_no_diffusers_folder(tmp_path):
    run(recipe_of(), folder=tmp_path, progress=False)
    with pytest.raises(ModelError, match="UNet2DModel"):
        export_artifact(tmp_path, "diffusers")
