from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stillhouse as still
from stillhouse.batch import Splits, TensorSource
from stillhouse.errors import DataError, ModelError
from stillhouse.launch import infer
from stillhouse.net import Net
from stillhouse.tasks import open_task
from stillhouse.tasks.segmentation import Segmenter, coloured, palette


class Threshold(nn.Module):
    """Class 1 where the red channel is above a half, at half the size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red = nn.functional.avg_pool2d(x[:, :1], 2)
        return torch.cat([0.5 - red, red - 0.5], 1)


def splits(labels: torch.Tensor, images: torch.Tensor | None = None, **about) -> Splits:
    x = torch.rand(len(labels), 3, 8, 8) if images is None else images
    source = TensorSource({"x": x, "target": labels})
    return Splits({"train": source, "test": source}, "own", {"classes": ["a", "b"], **about})


def segmenter(**settings) -> Segmenter:
    return Segmenter(Net(Threshold()), {"classes": ["a", "b"], "ignore": 255, **settings})


def test_the_loss_of_a_batch_is_the_mean_of_its_pieces():
    labels = torch.randint(0, 2, (4, 8, 8))
    labels[0], labels[1, :3] = 255, 255
    task = open_task("segmentation", splits(labels))
    logits = torch.randn(4, 2, 4, 4)
    whole = task.loss({"logits": logits}, {"target": labels})["task"]
    pieces = [
        task.loss({"logits": logits[k : k + 1]}, {"target": labels[k : k + 1]})["task"]
        for k in range(4)
    ]
    torch.testing.assert_close(whole, torch.stack(pieces).mean())
    assert pieces[0] == 0  # nothing but ignored pixels, and no NaN


def test_the_data_says_what_is_ignored():
    labels = torch.full((2, 8, 8), 7)
    task = open_task("segmentation", splits(labels, ignore=7))
    assert task.loss({"logits": torch.randn(2, 2, 4, 4)}, {"target": labels})["task"] == 0


def test_classes_may_weigh_differently_in_both_heads():
    labels = torch.randint(0, 2, (3, 8, 8))
    labels[0, :2] = 255
    out = {"logits": torch.randn(3, 2, 4, 4), "aux": torch.randn(3, 2, 2, 2)}
    only = [
        open_task("segmentation", splits(labels, class_weights=weights)).loss(
            out, {"target": labels}
        )
        for weights in ([1.0, 0.0], [0.0, 1.0], [2.0, 5.0])
    ]
    plain = open_task("segmentation", splits(labels)).loss(out, {"target": labels})
    for name in ("task", "aux"):
        torch.testing.assert_close(only[0][name] + only[1][name], plain[name])
        torch.testing.assert_close(2 * only[0][name] + 5 * only[1][name], only[2][name])


def test_data_without_maps_is_told():
    with pytest.raises(DataError, match=r"targets of shape \(2,\); segmentation needs a label map"):
        open_task("segmentation", splits(torch.tensor([0, 1]))).check(None, None)
    with pytest.raises(DataError, match="must be of one size"):
        open_task("segmentation", splits(torch.zeros(2, 4, 4).long())).check(None, None)
    bare = Splits({}, "own", {})
    with pytest.raises(DataError, match="has no classes"):
        open_task("segmentation", bare).check(None, None)


def test_networks_are_checked():
    task = open_task("segmentation", splits(torch.zeros(2, 8, 8).long()))
    task.check(task.net(Threshold()), task.net(Threshold()))
    with pytest.raises(ModelError, match="the student Conv2d cannot read the data"):
        task.check(task.net(nn.Conv2d(1, 2, 1)), None)
    with pytest.raises(ModelError, match="the teacher Conv2d has 3 outputs"):
        task.check(None, task.net(nn.Conv2d(3, 3, 1)))


def test_label_maps_of_the_images_own_size():
    image = torch.zeros(3, 6, 20)
    image[0, :, 10:] = 1.0
    expected = torch.zeros(6, 20, dtype=torch.uint8)
    expected[:, 10:] = 1
    for size in ("own", "6x20", "12x40"):
        (found,) = segmenter(input=[3, 8, 8]).predict([image], size=size)
        assert found.shape == (6, 20)
        assert (found != expected).float().mean() < 0.06
    pixels = (image * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    both = segmenter().predict([pixels, Image.fromarray(pixels)])
    assert torch.equal(both[0], both[1])
    with pytest.raises(DataError, match="'trained', 'own' or HEIGHTxWIDTH"):
        segmenter().predict([image], size="large")
    with pytest.raises(DataError, match=r"must be \(H, W\) or \(H, W, 3\) uint8"):
        segmenter().predict([np.zeros((2, 2, 5))])


def test_label_maps_are_written_as_indexed_png(tmp_path: Path):
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    pixels = np.zeros((10, 12, 3), dtype=np.uint8)
    pixels[:, 6:, 0] = 255
    Image.fromarray(pixels).save(folder / "scene.jpg", quality=95)
    told = segmenter().infer([tmp_path / "in"], tmp_path / "out", {"overlay": True})
    assert told["inputs"] == 1
    assert told["rows"][0]["classes"] == "a 50 %, b 50 %"
    with Image.open(tmp_path / "out" / "deep" / "scene.png") as image:
        assert image.mode == "P"
        values = np.asarray(image)
        assert image.getpalette()[:6] == palette()[1:3].flatten().tolist()
    assert set(np.unique(values)) == {0, 1}
    assert (values[:, 7:] == 1).all()
    assert (tmp_path / "out" / "deep" / "scene.overlay.png").is_file()
    with pytest.raises(DataError, match="say where the label maps go"):
        segmenter().infer([tmp_path / "in"], None, {})


def test_colours_are_the_customary_ones():
    assert palette()[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette()[8].tolist() == [64, 0, 0]
    assert len({tuple(c) for c in palette().tolist()}) == 256
    shown = coloured(torch.tensor([[0, 255]]), 255)
    assert shown.tolist() == [[[128, 0, 0], [128, 128, 128]]]


def test_plain_modules_and_loaders_are_distilled(tmp_path: Path):
    class Small(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
            self.head = nn.Conv2d(width, 2, 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": self.head(self.body(x))}

    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (images[:, 0] > 0.5).long()
    data = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    result = still.distill(
        Small(8), Small(4), loader, loader, method="bpkd", classes=2, folder=tmp_path / "run",
        steps=3, lr=0.01, progress=False, settings={"radius": 1},
    )  # fmt: skip
    assert {"alone", "teacher"} < set(result.sides)
    assert all("trimap_miou_1px" in found["0"] for found in result.sides.values())
    assert result.artifact.predict([images[0]])[0].shape == (8, 8)


def test_the_command_line_writes_label_maps(tmp_path: Path):
    from stillhouse.launch import run
    from stillhouse.methods.dense.bpkd import BPKD
    from stillhouse.recipe import load_recipe

    run(load_recipe({**BPKD.example(), "compare": []}), folder=tmp_path / "run", progress=False)
    Image.fromarray(np.zeros((9, 7, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    infer(tmp_path / "run", [tmp_path / "a.png"], tmp_path / "labels.png", {})
    with Image.open(tmp_path / "labels.png") as image:
        assert image.size == (7, 9)
