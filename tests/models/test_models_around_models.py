"""Networks that hold another: enlarged images, and a teacher that is confused on purpose."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model

ABOUT = {"classes": list("abcdef"), "input": [1, 12, 12]}


def test_a_model_sees_its_images_enlarged():
    pytest.importorskip("torchvision")
    options = {"model": "torchvision:mobilenet_v2", "pixels": 40, "options": {"width_mult": 0.25}}
    net = load_model("stillhouse:resized", options=options, about=ABOUT).eval()
    seen = []
    net.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = net(torch.rand(2, 1, 12, 12))
    assert logits.shape == (2, 6)
    assert seen[0].shape == (2, 3, 40, 40)
    net(torch.rand(2, 3, 40, 40))
    assert seen[1].shape == (2, 3, 40, 40)
    with pytest.raises(ModelError, match="at least 1 pixel"):
        load_model("stillhouse:resized", options={**options, "pixels": 0}, about=ABOUT)
    with pytest.raises(ModelError, match="needs the option 'pixels'"):
        load_model("stillhouse:resized", options={"model": "stillhouse:mlp"}, about=ABOUT)


def test_a_confused_model_shares_the_probability_of_a_group():
    options = {"model": "stillhouse:small_cnn", "groups": [[1, 3], [0, 2, 5]]}
    net = load_model("stillhouse:confused", options=options, about=ABOUT).eval()
    images = torch.rand(4, 1, 12, 12)
    with torch.no_grad():
        clear, shared = net.model(images).softmax(-1), net(images).softmax(-1)
    torch.testing.assert_close(shared[:, 1], (clear[:, 1] + clear[:, 3]) / 2)
    torch.testing.assert_close(shared[:, 0], clear[:, [0, 2, 5]].sum(-1) / 3)
    torch.testing.assert_close(shared[:, 4], clear[:, 4])
    for groups in ([[1, 9]], [[1, 2], [2, 3]]):
        with pytest.raises(ModelError, match="different classes 0 to 5"):
            load_model("stillhouse:confused", options={**options, "groups": groups}, about=ABOUT)
