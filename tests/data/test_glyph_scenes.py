"""Glyph scenes: the same everywhere, boxes that fit the ink, domains, novel classes, touching."""

from __future__ import annotations

import pytest
import torch

from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, StillhouseError
from stillhouse.parts.boxes import iou

SMALL = {"train": 6, "held_out": 3, "test": 4, "side": 64, "glyph": [12, 24]}


def opened(**options):
    return open_data("glyph-scenes", options={**SMALL, **options}).judging()


def test_the_same_options_give_the_same_scenes_whatever_the_seed():
    first = open_data("glyph-scenes", seed=0, options=SMALL)
    again = open_data("glyph-scenes", seed=9, options=SMALL)
    assert first.fingerprint() == again.fingerprint()
    assert opened(scene_seed=1).fingerprint() != first.fingerprint()
    assert opened(corruption="fog").fingerprint() != first.fingerprint()


def test_boxes_are_tight_around_the_ink_that_is_seen():
    splits = opened(instances=True, overlap=0.0)
    batch = splits["train"].read(torch.arange(6), None)
    assert batch["x"].shape == (6, 3, 64, 64)
    assert 0 <= batch["x"].min() < batch["x"].max() <= 1
    for boxes, labels, held in zip(
        batch["boxes"], batch["target"], batch["instances"], strict=True
    ):
        assert 1 <= len(boxes) == len(labels) <= 5
        assert held.max() == len(boxes)
        for number, box in enumerate(boxes.tolist(), 1):
            rows, columns = (held == number).nonzero(as_tuple=True)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [float(v) for v in tight] == box


def test_weather_moves_no_box_and_changes_every_image():
    clean, foggy = (opened(corruption=kind)["test"] for kind in ("none", "fog"))
    for a, b in zip(clean.boxes, foggy.boxes, strict=True):
        assert torch.equal(a, b)
    changed = (clean.images.float() - foggy.images.float()).abs().mean((1, 2, 3))
    assert bool((changed > 4).all())


@pytest.mark.parametrize("kind", ["blur", "night", "mixed"])
def test_other_weather(kind):
    splits = opened(corruption=kind)
    clean = opened()
    assert not torch.equal(splits["train"].images, clean["train"].images)
    if kind == "night":
        assert splits["train"].images.float().mean() < 0.6 * clean["train"].images.float().mean()


def test_novel_digits_are_there_without_a_box_until_the_test():
    options = {"digits": [0, 1, 2, 3], "novel": [1, 3], "train": 20, "test": 20}
    splits = opened(**options)
    assert splits.about["categories"] == ["0", "2", "1", "3"]
    assert splits.about["novel"] == ["1", "3"]
    assert set(torch.cat(splits["train"].labels).tolist()) == {0, 1}
    assert set(torch.cat(splits["test"].labels).tolist()) == {0, 1, 2, 3}
    known = opened(**{**options, "novel": []})
    assert torch.equal(known["train"].images, splits["train"].images)


def test_pairs_of_a_class_touch():
    splits = opened(touching=2, objects=[4, 5], side=96, overlap=0.3, instances=True)
    found = 0
    for boxes, labels in zip(splits["train"].boxes, splits["train"].labels, strict=True):
        for i in range(0, len(boxes) - 1, 2):
            beside = abs(float(boxes[i, 2] - boxes[i + 1, 0])) <= 1
            found += bool(beside and labels[i] == labels[i + 1])
    assert found >= 10  # two pairs in six scenes, but for places that were taken


def test_boxes_of_a_scene_do_not_cover_each_other():
    for boxes in opened(overlap=0.0, objects=[4, 5])["train"].boxes:
        assert iou(boxes, boxes).fill_diagonal_(0).max() == 0


def test_test_digits_and_train_digits_are_other_scans():
    from stillhouse.data.glyph_scenes import _glyphs

    held = {role: _glyphs(role, list(range(10)))[0] for role in ("train", "val", "test")}
    rows = {role: {tuple(g.flatten().tolist()) for g in own} for role, own in held.items()}
    assert len(held["test"]) == 360
    assert len(held["val"]) == 180
    assert not rows["train"] & rows["test"]
    assert not rows["val"] & rows["test"]


def test_grounds_of_two_domains_are_different(tmp_path):
    import numpy as np
    from PIL import Image

    for number in range(20):
        level = np.full((70, 80, 3), 12 * number, dtype=np.uint8)
        Image.fromarray(level).save(tmp_path / f"{number:02d}.png")
    grey = {"grounds": str(tmp_path), "objects": [0, 0], "train": 40}
    first, second = opened(**grey, part=[0, 0.5]), opened(**grey, part=[0.5, 1])
    levels = [set(s["train"].images.flatten(1)[:, 0].tolist()) for s in (first, second)]
    assert max(levels[0]) < min(levels[1])
    tested = set(first["test"].images.flatten(1)[:, 0].tolist())
    assert not tested & levels[0]  # every fifth photograph is kept for the test


def test_options_that_cannot_be_are_told():
    with pytest.raises(StillhouseError, match="smaller number first"):
        opened(glyph=[30, 10])
    with pytest.raises(StillhouseError, match="0 to 9"):
        opened(digits=[1, 11])
    with pytest.raises(DataError, match="every digit is novel"):
        opened(digits=[1, 2], novel=[1, 2])
    with pytest.raises(DataError, match="grounds"):
        opened(grounds="nowhere/photos.zip")
