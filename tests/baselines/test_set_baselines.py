"""random-real, k-means and dm: what a distilled set is measured against."""

from __future__ import annotations

import pytest
import torch

from stillhouse import catalogue
from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.launch import open_job, side_recipe
from stillhouse.models.convnet import ConvNet
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
from stillhouse.stages.set_distillation import distilled_of
from stillhouse.teacher import Knowledge

NAMES = ("random-real", "k-means", "dm")


def made(entry: str, folder, **changes) -> DistilledSet:
    example = catalogue.load(entry).example(0)
    example["settings"] = {**example["settings"], **changes.pop("settings", {})}
    recipe = load_recipe({**example, **changes})
    job = open_job(recipe, folder)
    return distilled_of(open_method(recipe).run(job))


@pytest.mark.parametrize("entry", ["random-real", "k-means"])
def test_images_are_real_and_of_their_class(entry, tmp_path):
    found = made(entry, tmp_path, settings={"ipc": 2})
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    example = load_recipe(catalogue.load(entry).example(0))
    train = open_job(example, tmp_path / "other").splits["train"]
    rows = read_rows(train, torch.arange(len(train)), None)
    for image, label in zip(found.pixels(), found.labels, strict=True):
        own = rows["x"][rows["target"] == label]
        assert (own - image).flatten(1).abs().amax(1).min() < 1e-5


def test_dm_begins_with_the_images_of_random_real_and_moves_them(tmp_path):
    start = made("random-real", tmp_path / "a")
    found = made("dm", tmp_path / "b")
    assert found.images.shape == start.images.shape
    assert not torch.equal(found.images, start.images)
    unmoved = made("dm", tmp_path / "c", settings={"lr_img": 1e-30})
    torch.testing.assert_close(unmoved.images, start.images)


def test_dm_on_one_network_is_the_released_loss(golden, tmp_path):
    case = golden("dd_common").case("dm")
    tensors = {k: torch.from_numpy(v).double() for k, v in case.items()}
    names = sorted(k for k in case if k.startswith("w."))
    method = catalogue.load("dm")(
        catalogue.load("dm").Config(ipc=2, batch_real=4, augment="none", class_chunk=0)
    )

    class OneNet:
        def fresh(self, generator):
            from stillhouse.net import Net

            net = ConvNet(3, 3, 8, width=6, depth=2).double().requires_grad_(False)
            net.load_state_dict({n[len("w.00.") :]: tensors[n] for n in names})
            return Net(net, taps=net.taps)

    start = DistilledSet(tensors["syn"], torch.arange(3).repeat_interleave(2), ("a", "b", "c"))
    objective = method.objective(
        start, OneNet(), lambda c, n, g: tensors["real"][4 * c : 4 * c + n], ["act0", "act1"]
    )
    terms = objective(Batch(id=torch.arange(3)), Knowledge.none, Clock())
    terms["mmd"].backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(terms["mmd"].detach(), tensors["loss"], **close)
    torch.testing.assert_close(objective.pixels.grad, tensors["grad_syn"], **close)


@pytest.mark.parametrize("entry", NAMES)
def test_a_side_takes_over_the_settings_of_the_problem_only(entry):
    recipe = load_recipe(
        {
            **catalogue.load("datadam").example(0),
            "settings": {"ipc": 3, "judge_epochs": 5, "power": 2.0, "lr_img": 7.0},
        }
    )
    side = side_recipe(recipe, entry, 4)
    assert side.settings == {"ipc": 3, "judge_epochs": 5}
    assert side.seed == 4
    assert open_method(side).config.ipc == 3


def test_unknown_augmentation_is_told_before_anything_runs():
    with pytest.raises(RecipeError, match="did you mean 'flip'"):
        open_method(
            load_recipe(
                {
                    **catalogue.load("dm").example(0),
                    "settings": {"augment": "color_flp"},
                }
            )
        )


@pytest.mark.parametrize("entry", ["random-real", "dm"])
def test_mosaics_are_a_variant(entry, tmp_path):
    example = catalogue.load(entry).example(0)
    example["data"]["options"]["rows"] = 48
    found = made(entry, tmp_path / "a", data=example["data"], variant="mosaic")
    assert found.decode.factor == 2
    assert found.training_count == 16
    whole = made(entry, tmp_path / "b", data=example["data"])
    assert whole.training_count == 4
    assert not torch.equal(found.images, whole.images)
