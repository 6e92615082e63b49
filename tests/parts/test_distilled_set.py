from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.errors import CheckpointError, DataError
from stillhouse.parts.distilled_set import Decode, DistilledSet, MeanStd
from stillhouse.parts.matrices import ZCA

CIFAR = MeanStd((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def example(**changes) -> DistilledSet:
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(6, 3, 8, 8, generator=generator)
    settings = {
        "images": CIFAR.transform(raw),
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "classes": ("cat", "dog/wolf", "ship"),
        "preprocessing": CIFAR,
        "provenance": {"method": "example", "seed": 0},
    }
    return DistilledSet(**(settings | changes))


def test_save_and_load_give_back_everything(tmp_path):
    logits = torch.randn(6, 3)
    made = example(
        label_logits=logits,
        lr=0.0123456789012345,
        decode=Decode(2, "nearest", 0.25),
        relabel={"teacher": "t", "epochs": 3},
    )
    read = DistilledSet.load(made.save(tmp_path / "set"))
    assert torch.equal(read.images, made.images)
    assert torch.equal(read.labels, made.labels)
    assert torch.equal(read.label_logits, logits)
    for name in ("classes", "lr", "preprocessing", "decode", "relabel", "provenance"):
        assert getattr(read, name) == getattr(made, name)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "distilled.json",
        "distilled.safetensors",
    ]


def test_a_whitened_set_keeps_its_matrices(tmp_path):
    real = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    zca = ZCA.fit(real)
    made = example(images=zca.transform(real[:6]), preprocessing=zca)
    read = DistilledSet.load(made.save(tmp_path))
    torch.testing.assert_close(read.pixels(), real[:6], rtol=0, atol=1e-4)


def test_damage_is_told(tmp_path):
    folder = example().save(tmp_path / "set")
    tensors = folder / "distilled.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="hash"):
        DistilledSet.load(folder)
    (folder / "distilled.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        DistilledSet.load(folder)
    with pytest.raises(CheckpointError, match="missing"):
        DistilledSet.load(tmp_path / "nowhere")


def test_later_formats_are_refused(tmp_path):
    folder = example().save(tmp_path)
    description = json.loads((folder / "distilled.json").read_text())
    (folder / "distilled.json").write_text(json.dumps(description | {"version": 99}))
    with pytest.raises(CheckpointError, match="later version"):
        DistilledSet.load(folder)


def test_counts_and_bytes():
    made = example()
    assert made.counts == [2, 2, 2]
    assert made.storage == {"pixels": 6 * 3 * 64 * 4, "labels": 6 * 8}
    soft = example(label_logits=torch.zeros(6, 3))
    assert soft.storage["labels"] == 6 * 8 + 6 * 3 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(6, 3, 8)}, r"\(N, C, H, W\)"),
        ({"labels": torch.tensor([0, 1, 0, 1, 2, 2])}, "class by class"),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, r"lie in 0\.\.2"),
        ({"labels": torch.zeros(6)}, "int64"),
        ({"label_logits": torch.zeros(6, 4)}, r"\(6, 3\)"),
        ({"images": torch.full((6, 3, 8, 8), float("nan"))}, "not finite"),
    ],
)
def test_what_does_not_fit_is_told(changes, message):
    with pytest.raises(DataError, match=message):
        example(**changes)


def test_pixels_undo_the_preprocessing_and_clip():
    made = example()
    raw = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.pixels(), raw, rtol=0, atol=1e-6)
    assert example(images=made.images + 100).pixels().max() == 1.0
    with pytest.raises(DataError, match="3 channels on images of 1"):
        CIFAR.transform(torch.zeros(1, 1, 4, 4))


def test_decode_cuts_tile_major_and_pads_what_does_not_divide():
    x = torch.randn(2, 3, 8, 8)
    assert Decode(1)(x) is x
    out = Decode(2, "nearest")(x)
    assert out.shape == (8, 3, 8, 8)
    assert torch.equal(out[2:4, :, ::2, ::2], x[:, :, :4, 4:])  # tile (0, 1) of both images
    assert torch.equal(out[4:6, :, ::2, ::2], x[:, :, 4:, :4])
    padded = Decode(2, "nearest", pad=0.5)(torch.zeros(1, 1, 33, 33))
    assert padded.shape == (4, 1, 33, 33)
    assert padded[3, 0, -1, -1] == 0.5
    assert padded[0].abs().sum() == 0
    images, labels, logits = example(
        decode=Decode(2), label_logits=torch.arange(18.0).reshape(6, 3)
    ).training_images()
    assert images.shape == (24, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] * 4
    assert torch.equal(logits[6:12], logits[:6])


def test_tensor_dataset_is_plain_and_independent():
    made = example()
    image, label = made.tensor_dataset()[3]
    assert torch.equal(image, made.images[3])
    assert label == 1
    image += 1
    assert not torch.equal(image, made.images[3])
    assert len(example(label_logits=torch.zeros(6, 3)).tensor_dataset()[0]) == 3


def test_image_folder_holds_the_pictures(tmp_path):
    made = example()
    root = made.export_image_folder(tmp_path)
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    assert files[2] == "1_dog-wolf/0000.png"
    assert len(files) == 6
    picture = np.asarray(Image.open(root / files[2]))
    expected = (made.pixels()[2].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(picture - expected).max() <= 1


def test_image_folder_is_readable_by_torchvision(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    grey = example(
        images=torch.rand(6, 1, 8, 8), preprocessing=None, classes=tuple(map(str, range(11)))
    )
    read = datasets.ImageFolder(grey.export_image_folder(tmp_path))
    assert [label for _, label in read] == [0, 0, 1, 1, 2, 2]


def test_picture_sheet_has_a_row_per_class():
    made = example()
    array = made.picture_array(gap=2, side=16)
    assert array.shape == (3 * 16 + 2 * 2, 2 * 16 + 2, 3)
    tile = array[18 : 18 + 16 : 2, 18 : 18 + 16 : 2]
    expected = (made.pixels()[3].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(tile - expected).max() <= 1
    assert array[16].min() == 255
    picture = Image.open(io.BytesIO(made.picture_sheet(per_class=1)))
    assert picture.format == "PNG"
    assert picture.size[0] < picture.size[1]
    grey = example(images=torch.rand(6, 1, 8, 8), preprocessing=None)
    assert grey.picture_array().shape[-1] == 3
    with pytest.raises(DataError, match="1 or 3 channels"):
        example(images=torch.rand(6, 2, 8, 8), preprocessing=None).picture_array()
