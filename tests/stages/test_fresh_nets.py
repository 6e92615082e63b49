from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job
from stillhouse.models.convnet import ConvNet
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given
from stillhouse.stages.fresh_nets import (
    fresh_net,
    has_batch_statistics,
    layers_of,
    network_factory,
    redraw,
    tapped_net,
)

STUDENT = {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}}


def job(folder, student=STUDENT, given=None):
    recipe = {
        "method": "random-real",
        "data": {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8]}},
    }
    if student:
        recipe["student"] = student
    return open_job(load_recipe(recipe), folder, given=given)


def test_the_factory_draws_anew_each_time(tmp_path):
    make = network_factory(job(tmp_path))
    a, b = make(), make()
    assert isinstance(a, ConvNet)
    assert not torch.equal(a.classifier.weight, b.classifier.weight)


def test_a_module_given_as_object_is_copied_and_redrawn(tmp_path):
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
    before = own[0].weight.clone()
    opened = job(tmp_path, {"model": "given"}, Given(student=own))
    make = network_factory(opened)
    a, b = make(), make()
    assert not torch.equal(a[0].weight, b[0].weight)
    assert torch.equal(own[0].weight, before)
    assert fresh_net(opened, 0)(torch.randn(2, 3, 8, 8))["logits"].shape == (2, 4)


def test_what_cannot_be_drawn_anew_is_told(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="'scale' of Odd cannot be drawn anew"):
        redraw(Odd())
    with pytest.raises(RecipeError, match="add student"):
        network_factory(job(tmp_path, None))
    weighted = {**STUDENT, "weights": "somewhere.safetensors"}
    with pytest.raises(RecipeError, match=r"remove student\.weights"):
        network_factory(job(tmp_path, weighted))


def test_fresh_nets_read_network_input_space_and_are_functions_of_number_and_model(tmp_path):
    opened = job(tmp_path)
    net = fresh_net(opened, 3)
    assert net.mean is None
    same = fresh_net(job(tmp_path / "b"), 3)
    assert torch.equal(net.module.classifier.weight, same.module.classifier.weight)
    other = fresh_net(opened, 3, "stillhouse:resnet8")
    assert type(other.module).__name__ == "ResNetCifar"


def test_taps_are_those_of_the_recipe_else_of_the_architecture():
    x = torch.randn(2, 3, 8, 8)
    net = tapped_net(ConvNet(3, 4, 8, width=4, depth=2), {})
    assert layers_of(net) == ["act0", "act1"]
    assert list(net(x)["taps"]) == ["act0", "act1", "embed"]
    chosen = tapped_net(ConvNet(3, 4, 8, width=4, depth=2), {"low": "features.1"})
    assert layers_of(chosen) == ["low"]
    torch.testing.assert_close(chosen(x)["taps"]["embed"], chosen.module.embedding(x))
    with pytest.raises(ModelError, match="names no layers to match"):
        layers_of(tapped_net(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}))


def test_batch_statistics_are_seen():
    assert has_batch_statistics(ConvNet(3, 4, 8, width=4, depth=2, norm="batch"))
    assert not has_batch_statistics(ConvNet(3, 4, 8, width=4, depth=2))
