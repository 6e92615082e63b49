"""The detection task: what it refuses, what it gives, COCO's results from an artifact."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import Batch
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, ModelError
from stillhouse.exporting import export_artifact
from stillhouse.launch import open_job, run
from stillhouse.models.detector_net import DetectorNet
from stillhouse.models.small_faster_rcnn import SmallFasterRCNN
from stillhouse.opening import open_artifact
from stillhouse.parts.corruptions import CORRUPTIONS, corrupted
from stillhouse.recipe import load_recipe
from stillhouse.tasks.detection import Detection, Detector, drawn_boxes

SCENES = {"train": 4, "held_out": 2, "test": 3, "side": 32, "objects": [1, 2], "glyph": [10, 16],
          "digits": [0, 1, 2]}  # fmt: skip
MODEL = {"channels": 8, "hidden": 16, "size": 32, "anchors": [12], "ratios": [1.0]}


def recipe(**more):
    return load_recipe({
        "method": "supervised", "task": "detection", "compare": [],
        "data": {"name": "glyph-scenes", "options": SCENES},
        "student": {"model": "stillhouse:small-faster-rcnn", "options": MODEL},
        "budget": {"steps": 3, "batch": 2, "lr": 1e-3}, **more,
    })  # fmt: skip


def task(**options) -> Detection:
    return Detection(open_data("glyph-scenes", options={**SCENES, **options}))


def test_any_baseline_runs_on_it_and_its_artifact_finds_objects(tmp_path):
    result = run(recipe(), folder=tmp_path / "run", progress=False)
    figures = next(iter(next(iter(result.sides.values())).values()))
    assert {"ap50", "ap50_voc11", "ap50_small", "missed_small"} <= set(figures)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "true boxes white" in page
    artifact = open_artifact(tmp_path / "run")
    image = np.zeros((40, 50, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    found = artifact.predict([image, torch.rand(1, 20, 30), Image.fromarray(image)], score=0.0)
    assert len(found) == 3
    assert all(len(f["boxes"]) == len(f["scores"]) == len(f["names"]) for f in found)
    summary = artifact.predictor.infer(
        [tmp_path / "a.png"], tmp_path / "out.json", {"score": 0.0, "limit": 4}
    )
    records = json.loads((tmp_path / "out.json").read_text())
    assert summary["detections"] == len(records) <= 4
    for record in records:
        left, top, width, height = record["bbox"]
        assert min(left, top) >= 0
        assert left + width <= 50.01
        assert top + height <= 40.01
        assert record["category"] == str(SCENES["digits"][record["category_id"] - 1])
    told = export_artifact(tmp_path / "run", "torch")
    assert told["largest_difference"] == 0
    with pytest.raises(ModelError, match="gives no tensor but lists"):
        export_artifact(tmp_path / "run", "onnx")
    artifact.predictor.infer([tmp_path], tmp_path / "shown", {})
    assert (tmp_path / "shown" / "a.png").exists()
    assert (tmp_path / "shown" / "detections.json").exists()


def test_other_categories_are_refused_before_training(tmp_path):
    with pytest.raises(ModelError, match=r"knows 5 categories.*has 3: 0, 1, 2"):
        task().check(DetectorNet(SmallFasterRCNN(5, **MODEL)), None)
    with pytest.raises(ModelError, match="student"):
        run(recipe(student={"model": "stillhouse:small-cnn"}), folder=tmp_path, progress=False)


def test_other_data_is_refused(tmp_path):
    student = {"model": "stillhouse:small-faster-rcnn", "options": {**MODEL, "categories": 10}}
    with pytest.raises(DataError, match="not for detection"):
        run(recipe(data="digits", student=student), folder=tmp_path, progress=False)


def test_bad_input_of_the_predictor_is_told(tmp_path):
    net = Detector(DetectorNet(SmallFasterRCNN(3, **MODEL)))
    with pytest.raises(DataError, match=r"\(2, 4, 4\) is no image"):
        net.predict([torch.zeros(2, 4, 4)])
    with pytest.raises(DataError, match="'score' must be a number"):
        net.predict([torch.zeros(3, 40, 40)], score="high")
    with pytest.raises(DataError, match=r"-o FILE.json"):
        net.infer([tmp_path], None, {})
    with pytest.raises(DataError, match="no file or folder"):
        net.infer([tmp_path / "nothing"], tmp_path / "o.json", {})


def test_ignored_boxes_do_not_train():
    own = task()
    net = own.net(SmallFasterRCNN(3, **MODEL)).train()
    images = torch.rand(1, 3, 32, 32)
    box, label = torch.tensor([[4.0, 4.0, 16.0, 16.0]]), torch.tensor([1])
    far = torch.tensor([[18.0, 18.0, 30.0, 30.0]])

    def losses(**batch):
        torch.manual_seed(0)
        return own.loss(net(images), Batch(x=images, **batch))

    alone = losses(boxes=[box], target=[label])
    both = {"boxes": [torch.cat([box, far])], "target": [torch.cat([label, label])]}
    spared = losses(**both, ignored=[torch.tensor([False, True])])
    taught = losses(**both)
    for name, value in alone.items():
        assert torch.equal(value, spared[name])
    assert any(not torch.equal(alone[name], taught[name]) for name in alone)


def test_drawing_has_a_panel_for_each_layer():
    image = torch.zeros(3, 30, 40)
    box, label = torch.tensor([[5.0, 5.0, 20.0, 20.0]]), torch.tensor([0])
    png = drawn_boxes(image, [(box, label, (255, 0, 0)), (box[:0], label[:0], (0, 255, 0))], ["a"])
    import io

    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
    assert shown.shape == (150, 404, 3)  # five times as large, four pixels between
    assert (shown[25, 30:90] == [255, 0, 0]).all()
    assert not (shown == [0, 255, 0]).all(-1).any()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_weather_keeps_the_size_and_the_range(kind):
    image = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0))
    views = [corrupted(image, kind, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) == (kind == "none")
    assert all(v.shape == image.shape and v.min() >= 0 and v.max() <= 1 for v in views)
    assert torch.equal(corrupted(image, kind, torch.Generator(), strength=0.0), image)


def test_unknown_weather_is_told():
    with pytest.raises(DataError, match=r"'fogg'.*fog"):
        corrupted(torch.zeros(3, 8, 8), "fogg", torch.Generator())


def test_a_run_on_it_is_the_same_twice(tmp_path):
    states = []
    for name in ("a", "b"):
        job = open_job(recipe(), tmp_path / name)
        from stillhouse.recipe_models import open_method

        artifact = open_method(job.recipe).run(job)
        states.append({k: v.clone() for k, v in artifact.module.state_dict().items()})
        job.log.close()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
