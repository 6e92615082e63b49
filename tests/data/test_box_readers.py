"""Readers of boxes: COCO's JSON, VOC's XML, one draw for image and boxes, real data as check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import read_rows
from stillhouse.clock import Views
from stillhouse.data.box_source import BoxSource
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, RecipeError


def picture(path: Path, width: int, height: int, box) -> None:
    """Black, with a white rectangle (left, top, right, bottom)."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(folder: Path, count: int = 6) -> Path:
    images, annotations = [], []
    for i in range(count):
        box = (10 + i, 5, 30 + i, 25)
        picture(folder / "img" / f"{i}.png", 60, 40, box)
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 60, "height": 40})
        annotations.append({"id": i, "image_id": 100 + i, "category_id": 7 if i % 2 else 3,
                            "bbox": [box[0], box[1], 20, 20], "iscrowd": int(i == 2)})  # fmt: skip
    table = {"images": images, "annotations": annotations,
             "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}  # fmt: skip
    path = folder / "train.json"
    path.write_text(json.dumps(table))
    return path


def lit(image: torch.Tensor) -> list[float]:
    """The rectangle that is white in (3, H, W)."""
    rows, columns = (image[0] > 0.5).nonzero(as_tuple=True)
    return [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def coco_options(folder: Path, **more):
    return {"images": str(folder / "img"), "annotations": str(coco(folder)), "val": 0, **more}


def test_coco_boxes_lie_where_the_image_says(tmp_path):
    splits = open_data("coco-json", options=coco_options(tmp_path, test=0))
    assert splits.about["categories"] == ["dog", "cat"]  # by id
    batch = read_rows(splits["train"], torch.arange(6), None)
    assert batch["x"].shape == (6, 3, 40, 60)
    for image, boxes in zip(batch["x"], batch["boxes"], strict=True):
        assert boxes.tolist() == [lit(image)]
    assert [t.tolist() for t in batch["target"]] == [[0], [1]] * 3
    assert [bool(f[0]) for f in batch["crowd"]] == [i == 2 for i in range(6)]
    assert [bool(f[0]) for f in batch["ignored"]] == [i == 2 for i in range(6)]


def test_a_mirrored_reading_moves_image_and_boxes_alike(tmp_path):
    splits = open_data("coco-json", options=coco_options(tmp_path, test=0, flip=True))
    mirrored = 0
    for epoch in range(4):
        batch = read_rows(splits["train"], torch.arange(6), Views(3, epoch))
        again = read_rows(splits["train"], torch.tensor([4]), Views(3, epoch))
        assert torch.equal(again["x"][0], batch["x"][4])  # the batch does not matter
        for row, (image, boxes) in enumerate(zip(batch["x"], batch["boxes"], strict=True)):
            assert boxes.tolist() == [lit(image)]
            mirrored += lit(image)[0] != 10 + row
    assert 6 <= mirrored <= 18


def test_reduced_images_have_reduced_boxes(tmp_path):
    splits = open_data("coco-json", options=coco_options(tmp_path, test=0, longest=32))
    batch = read_rows(splits["train"], torch.arange(1), None)
    assert batch["x"].shape[-2:] == (21, 32)
    torch.testing.assert_close(
        batch["boxes"][0], torch.tensor([lit(batch["x"][0])]), atol=1.0, rtol=0
    )


def test_classes_can_be_chosen_and_test_is_held_out(tmp_path):
    splits = open_data("coco-json", options=coco_options(tmp_path, categories=["cat"], test=2))
    assert splits.about["categories"] == ["cat"]
    assert (len(splits["train"]), splits.peek("test")) == (4, 2)
    assert sum(len(t) for t in splits["train"].labels) < 4  # dogs are gone


def test_a_folder_of_unlabelled_images_beside_a_labelled_test(tmp_path):
    held = coco(tmp_path / "held")
    for i in range(3):
        picture(tmp_path / "new" / f"u{i}.png", 50 + i, 40, (2, 2, 9, 9))
    options = {"images": str(tmp_path / "new"), "test_annotations": str(held), "val": 0,
               "test_images": str(tmp_path / "held" / "img")}  # fmt: skip
    splits = open_data("coco-json", options=options)
    batch = read_rows(splits["train"], torch.arange(3), None)
    assert isinstance(batch["x"], list)  # of different sizes
    assert all(len(b) == 0 for b in batch["boxes"])
    assert splits.peek("test") == 6


def voc(folder: Path, count: int = 4, splits: bool = False) -> Path:
    marks = folder / "Annotations"
    marks.mkdir(parents=True)
    for i in range(count):
        picture(folder / "JPEGImages" / f"p{i}.png", 50, 30, (4, 6, 20, 16 + i))
        (marks / f"p{i}.xml").write_text(
            f"<annotation><size><width>50</width><height>30</height></size><object>"
            f"<name>{'bus' if i % 2 else 'ant'}</name><difficult>{int(i == 3)}</difficult><bndbox>"
            f"<xmin>5</xmin><ymin>7</ymin><xmax>20</xmax><ymax>{16 + i}</ymax></bndbox></object>"
            "</annotation>"
        )
    if splits:
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("p0\np1\n")
        (lists / "test.txt").write_text("p2  1\np3 -1\n")
    return folder


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path):
    splits = open_data("voc-xml", options={"path": str(voc(tmp_path, splits=True)), "val": 0})
    splits = splits.judging()
    assert splits.about["categories"] == ["ant", "bus"]
    for role, wanted in (("train", [[False], [False]]), ("test", [[False], [True]])):
        batch = read_rows(splits[role], torch.arange(2), None)
        for image, boxes in zip(batch["x"], batch["boxes"], strict=True):
            assert boxes.tolist() == [lit(image)]
        assert [f.tolist() for f in batch["ignored"]] == wanted


def test_images_without_xml_are_kept_when_asked(tmp_path):
    root = voc(tmp_path)
    (root / "Annotations" / "p1.xml").unlink()
    options = {"path": str(root), "val": 0, "test": 0}
    with pytest.raises(DataError, match=r"1 images have no XML.*p1.xml"):
        open_data("voc-xml", options=options)
    splits = open_data("voc-xml", options={**options, "unlabelled": True})
    assert sorted(len(b) for b in splits["train"].boxes) == [0, 1, 1, 1]


def test_bad_tables_are_told(tmp_path):
    path = coco(tmp_path)
    table = json.loads(path.read_text())
    images = str(tmp_path / "img")

    def opened(**changes):
        path.write_text(json.dumps({**table, **changes}))
        return open_data("coco-json", options={"images": images, "annotations": str(path)})

    with pytest.raises(DataError, match=r"'9.png' is not in"):
        opened(images=[{"id": 1, "file_name": "9.png", "width": 5, "height": 5}])
    with pytest.raises(DataError, match="of image 1, which 'images' does not list"):
        opened(annotations=[{"id": 4, "image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}])
    path.write_text("{}")
    with pytest.raises(DataError, match="it has no images, annotations, categories"):
        open_data("coco-json", options={"images": images, "annotations": str(path)})
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"no 'cot'.*cat"):
        open_data("coco-json", options={"images": images, "annotations": str(path),
                                        "categories": ["cot"]})  # fmt: skip
    with pytest.raises(DataError, match="one split at least"):
        open_data("coco-json", options={"images": images})
    options = {"images": images, "annotations": str(path), "test_annotations": str(path), "test": 2}
    with pytest.raises(RecipeError, match="has a test split"):
        open_data("coco-json", options=options)
    root = voc(tmp_path / "voc")
    (root / "Annotations" / "p0.xml").write_text("<annotation><size>")
    with pytest.raises(DataError, match=r"p0.xml is not of VOC's format"):
        open_data("voc-xml", options={"path": str(root)})


def test_boxes_that_cannot_be_are_told_by_image():
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    good, label = torch.tensor([[1.0, 1.0, 4.0, 4.0]]), torch.tensor([0])
    with pytest.raises(DataError, match=r"image '1': box 0 is \[5.0, 1.0, 4.0, 4.0\]"):
        BoxSource(image, [good, good + torch.tensor([4.0, 0, 0, 0])], [label, label])
    with pytest.raises(DataError, match=r"\[3\] is not in 0 .. 1"):
        BoxSource(image, [good, good], [label, label + 3], categories=2)
    with pytest.raises(DataError, match="1 boxes and 2 labels"):
        BoxSource(image, [good, good], [label, torch.tensor([0, 0])])


# ----------------------------------------------------------------------------- real data
def test_penn_fudan_boxes_follow_from_the_masks(data_root):
    splits = open_data("penn-fudan", options={"longest": 128, "val": 10}).judging()
    assert (len(splits["train"]), len(splits["test"])) == (110, 50)
    whole = sum(len(b) for role in splits for b in _source(splits[role]).boxes)
    assert whole >= 423
    batch = read_rows(splits["test"], torch.arange(3), None)
    for boxes, held in zip(batch["boxes"], batch["instances"], strict=True):
        for number, box in enumerate(boxes, 1):
            rows, columns = (held == number).nonzero(as_tuple=True)
            tight = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert float((tight - box).abs().max()) <= 2.0


def _source(source):
    return getattr(source, "source", source)


def test_coco128_written_as_coco_reads_back_the_same(data_root, tmp_path):
    read = open_data("coco128", options={"val": 0})
    source = read["train"]
    names = read.about["categories"]
    assert len(names) == 80
    assert sum(len(b) for b in source.boxes) == 929
    rows = range(12)
    images, annotations = [], []
    (tmp_path / "img").mkdir()
    for i in rows:
        content = source.images.listing.content(i)
        (tmp_path / "img" / source.names[i]).write_bytes(content)
        height, width = source.images.listing.sizes[i]
        images.append({"id": i, "file_name": source.names[i], "width": width, "height": height})
        for (left, top, right, bottom), label in zip(
            source.boxes[i].tolist(), source.labels[i].tolist(), strict=True
        ):
            annotations.append({"id": len(annotations), "image_id": i, "category_id": label + 1,
                                "bbox": [left, top, right - left, bottom - top]})  # fmt: skip
    kinds = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    table = {"images": images, "annotations": annotations, "categories": kinds}
    (tmp_path / "a.json").write_text(json.dumps(table))
    options = {"images": str(tmp_path / "img"), "annotations": str(tmp_path / "a.json")}
    again = open_data("coco-json", options={**options, "val": 0, "test": 0})["train"]
    for i in rows:
        torch.testing.assert_close(again.boxes[i], source.boxes[i], atol=1e-3, rtol=0)
        assert torch.equal(again.labels[i], source.labels[i])
    ours = read_rows(again, torch.tensor([5]), None)["x"]
    assert torch.equal(ours, read_rows(source, torch.tensor([5]), None)["x"])


def test_a_published_detector_finds_the_objects_that_coco128_says(data_root):
    """Reader and figures against a detector that others trained, in their own format."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from torchvision.ops import batched_nms

    from stillhouse.metrics.detection import Detections

    session = onnxruntime.InferenceSession(str(data_root / "fastestdet_coco" / "FastestDet.onnx"))
    source = open_data("coco128", options={"val": 0}).judging()["test"]
    metric = Detections(80)
    for row in range(40):
        batch = read_rows(source, torch.tensor([row]), None)
        image, (height, width) = batch["x"][0], batch["x"][0].shape[-2:]
        small = torch.nn.functional.interpolate(image[None], size=(352, 352), mode="bilinear")
        out = torch.from_numpy(session.run(None, {"input.1": small.flip(1).numpy()})[0])[0]
        grid = torch.arange(22.0)
        x, y = (grid + out[1].tanh()) / 22, (grid[:, None] + out[2].tanh()) / 22
        w, h = out[3].sigmoid() / 2, out[4].sigmoid() / 2
        boxes = torch.stack([x - w, y - h, x + w, y + h], -1).reshape(-1, 4)
        boxes = boxes * torch.tensor([width, height, width, height])
        best, labels = out[5:].max(0)
        scores = (out[0] ** 0.6 * best**0.4).flatten()
        kept = batched_nms(boxes, scores, labels.flatten(), 0.5)
        kept = kept[scores[kept] > 0.01]
        found = (boxes[kept], scores[kept], labels.flatten()[kept])
        metric.add(*found, batch["boxes"][0], batch["target"][0])
    figures = metric.compute()
    assert figures["ap50"] > 0.15  # it reaches 0.25 on all of COCO
    assert figures["ap50_large"] > figures["ap50_small"]
    wrong = Detections(80)
    wrong.add(boxes[kept].flip(1), scores[kept], labels.flatten()[kept], batch["boxes"][0],
              batch["target"][0])  # fmt: skip
    assert wrong.compute()["ap50"] == 0
