"""Images with label maps: CamVid, users' folders, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import Batch
from stillhouse.clock import Views
from stillhouse.data.augment_scenes import AugmentScenes
from stillhouse.data.label_maps import resized_labels
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, RecipeError, StillhouseError


# ----------------------------------------------------------------------------- augmentation
def scenes(rows: int = 6, size: tuple[int, int] = (24, 32)) -> Batch:
    """Images whose red channel says their label, 20 levels apart."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (rows, 4, 4), generator=rng)
    labels = labels.repeat_interleave(size[0] // 4, 1).repeat_interleave(size[1] // 4, 2)
    image = (labels.unsqueeze(1) * 20).expand(-1, 3, -1, -1).to(torch.uint8).contiguous()
    return Batch(id=torch.arange(rows), x=image, target=labels.to(torch.int16))


def test_image_and_labels_are_moved_alike():
    batch = scenes()
    moved = AugmentScenes()(batch, Views(3))
    assert moved["x"].dtype == torch.float32
    assert moved["target"].dtype == torch.int16
    assert moved["target"].shape == batch["target"].shape
    known = moved["target"] != 255
    said = (moved["x"][:, 0] * 255 / 20).round().long()
    same = (said == moved["target"])[known].float().mean()
    assert same > 0.9  # but for interpolated rims
    assert 0.05 < (~known).float().mean() < 0.6  # scenes that were made smaller
    assert not torch.equal(moved["target"], batch["target"])


def test_a_sample_is_augmented_by_its_id_and_draw_alone():
    batch, augment = scenes(), AugmentScenes()
    whole = augment(batch, Views(3))
    part = augment(batch.select(torch.tensor([4, 1])), Views(3))
    assert torch.equal(whole["target"][[4, 1]], part["target"])
    torch.testing.assert_close(whole["x"][[4, 1]], part["x"])
    assert not torch.equal(augment(batch, Views(3, epoch=1))["target"], whole["target"])


def test_scale_one_only_flips():
    batch = scenes()
    moved = AugmentScenes(scale=(1.0, 1.0))(batch, Views(0))
    for row in range(6):
        plain, mirrored = batch["target"][row], batch["target"][row].flip(-1)
        assert torch.equal(moved["target"][row], plain) or torch.equal(
            moved["target"][row], mirrored
        )
    assert not torch.equal(moved["target"], batch["target"])


def test_a_fixed_enlargement_shows_a_window_of_that_share():
    labels = torch.arange(16).view(1, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2)
    batch = Batch(id=torch.tensor([0]), x=torch.zeros(1, 3, 32, 32), target=labels)
    seen = AugmentScenes(scale=(2.0, 2.0), flip=False)(batch, Views(1))["target"]
    assert 4 <= len(seen.unique()) <= 9
    assert (seen != 255).all()
    shrunk = AugmentScenes(scale=(0.5, 0.5), flip=False)(batch, Views(1))["target"]
    assert (shrunk != 255).float().mean() == pytest.approx(0.25, abs=0.03)
    assert len(shrunk[shrunk != 255].unique()) == 16


def test_what_cannot_be_augmented_is_told():
    with pytest.raises(DataError, match="0 < least <= largest"):
        AugmentScenes(scale=(2.0, 1.0))
    batch = Batch(id=torch.arange(1), x=torch.zeros(1, 3, 4, 4), target=torch.zeros(1, 2, 2))
    with pytest.raises(DataError, match="cannot be augmented alike"):
        AugmentScenes()(batch, Views(0))


def test_labels_are_reduced_to_one_of_their_own_values():
    labels = torch.tensor([[[0, 0, 9, 9], [0, 0, 9, 9]]])
    assert resized_labels(labels, (1, 2)).tolist() == [[[0, 9]]]


# ----------------------------------------------------------------------------------- camvid
def test_camvid_is_there_with_its_splits(data_root):
    splits = open_data("camvid", options={"image_size": [90, 120]})
    assert {role: splits.peek(role) for role in splits} == {"train": 367, "val": 101, "test": 233}
    assert len(splits.about["classes"]) == 11
    assert splits.about["input"] == [3, 90, 120]
    assert splits.edition == "camvid (240x180, jpeg)"
    batch = splits["train"].read(torch.arange(5), None)
    assert batch["x"].shape == (5, 3, 90, 120)
    assert 0.0 <= batch["x"].min() < batch["x"].max() <= 1.0
    values = set(batch["target"].unique().tolist())
    assert values <= {*range(11), 255}
    assert 255 in values
    # the sky is at the top, the road at the bottom
    sky, road = splits.about["classes"].index("Sky"), splits.about["classes"].index("Road")
    top, bottom = batch["target"][:, :20], batch["target"][:, -20:]
    assert (top == sky).sum() > (bottom == sky).sum()
    assert (bottom == road).sum() > (top == road).sum()
    with pytest.raises(StillhouseError, match="opens only while"):
        splits["test"]


def test_camvid_at_its_own_size_and_bad_options(data_root):
    splits = open_data("camvid", options={"augment": "flip"})
    assert splits.about["input"] == [3, 180, 240]
    plain = splits["train"].read(torch.arange(12), None)
    turned = splits["train"].read(torch.arange(12), Views(0))
    assert not torch.equal(plain["x"], turned["x"])
    with pytest.raises(RecipeError, match="image_size"):
        open_data("camvid", options={"image_size": [90]})
    with pytest.raises(RecipeError, match="augment"):
        open_data("camvid", options={"augment": "rotate"})


# ------------------------------------------------------------------------------ own folders


def scene_files(root: Path, image: str, labels: str, names, *, values=(0, 1, 255)) -> None:
    """JPEG images and indexed PNGs under these patterns of names."""
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        maps = np.zeros((20, 30), dtype=np.uint8)
        maps[:, 10:20], maps[:, 20:] = values[1], values[2]
        maps[:, :10] = values[0]
        one, two = root / image.format(name), root / labels.format(name)
        one.parent.mkdir(parents=True, exist_ok=True)
        two.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(one)
        indexed = Image.fromarray(maps, mode="P")
        indexed.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
        indexed.save(two)


OPTIONS = {"classes": ["ground", "thing"], "image_size": [10, 15], "val": 0}


def test_the_layout_of_voc(tmp_path):
    names = [f"2007_{n}" for n in range(6)]
    scene_files(tmp_path, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", names)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for role, part in (("train", names[:3]), ("val", names[3:5]), ("test", names[5:])):
        (lists / f"{role}.txt").write_text("\n".join(part) + "\n")
    splits = open_data("segmentation_folder", options={"path": str(tmp_path), **OPTIONS})
    assert {role: splits.peek(role) for role in splits} == {"train": 3, "val": 2, "test": 1}
    batch = splits["train"].read(torch.arange(2), None)
    assert batch["x"].shape == (2, 3, 10, 15)
    assert batch["target"][0, 0].tolist() == [0] * 5 + [1] * 5 + [255] * 5
    (lists / "train.txt").write_text("2007_0\n2007_99\n")
    with pytest.raises(DataError, match="has no image '2007_99'"):
        open_data("segmentation_folder", options={"path": str(tmp_path), **OPTIONS})


def test_the_layout_of_cityscapes_with_its_suffixes_and_values(tmp_path):
    for role, names in (("train", ["aachen/a_0", "aachen/a_1"]), ("val", ["bonn/b_0"])):
        scene_files(
            tmp_path, f"leftImg8bit/{role}/{{}}_leftImg8bit.png",
            f"gtFine/{role}/{{}}_gtFine_labelIds.png", names, values=(7, 26, 0),
        )  # fmt: skip
    # beside the label maps lie others that are not meant
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(
        tmp_path / "gtFine/train/aachen/a_0_gtFine_color.png"
    )
    options = {
        **OPTIONS, "path": str(tmp_path), "image_suffix": "_leftImg8bit",
        "mask_suffix": "_gtFine_labelIds", "label_map": {7: "ground", 26: "thing"}, "test": 1,
    }  # fmt: skip
    splits = open_data("segmentation_folder", options=options)
    assert {role: splits.peek(role) for role in splits} == {"train": 1, "val": 1, "test": 1}
    row = splits["train"].read(torch.arange(1), None)["target"][0, 0]
    assert row.tolist() == [0] * 5 + [1] * 5 + [255] * 5
    with pytest.raises(RecipeError, match="no class is called 'thng'; did you mean 'thing'"):
        open_data(
            "segmentation_folder",
            options={**options, "label_map": {7: "thng"}},
        )


def test_splits_outside_and_no_splits_at_all(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for role, count in (("train", 4), ("test", 2)):
        scene_files(first, f"{role}/images/{{}}.png", f"{role}/masks/{{}}.png", range(count))
    options = {**OPTIONS, "val": 1}
    (first / "classes.txt").write_text("ground\nthing\n")
    splits = open_data(
        "segmentation_folder",
        options={"path": str(first), "image_size": [10, 15], "val": 1, "augment": "scale+flip"},
    )
    assert {role: splits.peek(role) for role in splits} == {"train": 3, "val": 1, "test": 2}
    batch = splits["train"].read(torch.arange(3), Views(0))
    assert batch["x"].shape == (3, 3, 10, 15)
    scene_files(second, "images/{}.png", "labels/{}.png", range(10))
    splits = open_data("segmentation_folder", options={"path": str(second), **options})
    assert {role: splits.peek(role) for role in splits} == {"train": 7, "val": 1, "test": 2}
    one = splits["train"][0, None]
    assert torch.equal(one["x"], splits["train"].read(torch.arange(1), None)["x"][0])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda r: (r / "masks/0.png").unlink(), "has no label map '0'"),
        (lambda r: Image.new("RGB", (30, 20)).save(r / "masks/0.png"), "colour image"),
        (lambda r: (r / "masks/0.png").write_bytes(b"no"), "cannot be read as a label map"),
        (lambda r: Image.new("L", (30, 20), 9).save(r / "masks/0.png"), "holds 9; there are 2"),
        (lambda r: (r / "masks").rename(r / "mask"), "no folder of masks"),
        (lambda r: Image.new("L", (5, 5)).save(r / "masks/0.png"), "must be of one size"),
    ],
)
def test_what_is_wrong_in_a_folder_is_told(tmp_path, spoil, told):
    scene_files(tmp_path, "images/{}.png", "masks/{}.png", range(4))
    spoil(tmp_path)

    def read() -> None:
        splits = open_data("segmentation_folder", options={"path": str(tmp_path), **OPTIONS})
        splits["train"].read(torch.arange(len(splits["train"])), None)
        splits.judging()["test"].read(torch.arange(1), None)

    with pytest.raises(DataError, match=told):
        read()


def test_classes_must_be_named(tmp_path):
    scene_files(tmp_path, "images/{}.png", "masks/{}.png", range(4))
    with pytest.raises(DataError, match=r"there is no file classes\.txt"):
        open_data("segmentation_folder", options={"path": str(tmp_path)})
    with pytest.raises(DataError, match="every pixel is ignored"):
        open_data(
            "segmentation_folder",
            options={"path": str(tmp_path), **OPTIONS, "label_map": {77: "thing"}},
        )
    with pytest.raises(RecipeError, match="classes 0 to 1"):
        open_data(
            "segmentation_folder",
            options={"path": str(tmp_path), **OPTIONS, "label_map": {0: 5}},
        )


def test_weights_of_the_classes_are_told_to_the_task():
    options = {"side": 16, "classes": 3, "class_weights": [1.0, 2.0, 0.5]}
    about = open_data("generated-scenes", seed=0, options=options).about
    assert about["class_weights"] == [1.0, 2.0, 0.5]
    assert "class_weights" not in open_data("generated-scenes", seed=0, options={}).about
    for wrong, told in (
        ([1.0, 2.0], "has 2 numbers, the data 3 classes: class 0"),
        ([1.0, -1.0, 1.0], "none below 0 and not all 0"),
        ([0.0, 0.0, 0.0], "none below 0 and not all 0"),
    ):
        with pytest.raises(StillhouseError, match=told):
            open_data("generated-scenes", seed=0, options={**options, "class_weights": wrong})
