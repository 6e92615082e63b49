"""GridNet around any detector, its loss and figures, and what is deployed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, ModelError
from stillhouse.models.mini_bev import MiniBEV
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.centre_maps import centre_targets, class_maps
from stillhouse.tasks import open_task
from stillhouse.tasks.driving import Detecting, GridNet, detection_loss, heads_of

OPTIONS = {
    "train": 3, "held": 1, "test": 2, "beams": 8, "azimuths": 60, "cameras": 2,
    "image": [16, 32], "cell": 1.6,
}  # fmt: skip


@pytest.fixture
def task():
    return open_task("driving", open_data("driving_scenes", options=OPTIONS))


def perfect(boxes, labels, valid, grid, classes):
    """A head that says exactly what is there."""
    heat = class_maps(boxes, labels, valid, grid, classes, min_radius=0, min_overlap=0.99)
    head = {"hm": torch.logit(heat.clamp(1e-6, 1 - 1e-6))}
    place = grid.cells(boxes).floor().long()
    rows = torch.arange(len(boxes))[:, None].expand(boxes.shape[:2])
    for name, values in centre_targets(boxes, grid).items():
        maps = torch.zeros(len(boxes), values.shape[-1], *grid.shape)
        kept = valid
        maps[rows[kept], :, place[..., 1][kept], place[..., 0][kept]] = values[kept]
        head[name] = maps
    return head


def some_boxes(grid):
    boxes = torch.zeros(2, 3, 9)
    boxes[0, 0] = torch.tensor([3.3, -4.1, -1.0, 4.4, 1.9, 1.6, 0.4, 2.0, 1.0])
    boxes[0, 1] = torch.tensor([-12.0, 9.2, -1.0, 0.7, 0.7, 1.7, -2.0, 0.0, 0.0])
    boxes[1, 0] = torch.tensor([20.0, 20.0, -0.5, 7.5, 2.5, 3.0, 3.0, 0.0, 0.0])
    boxes[1, 1] = torch.tensor([90.0, 0.0, -1.0, 4.4, 1.9, 1.6, 0.0, 0.0, 0.0])  # beyond the grid
    labels = torch.tensor([[0, 2, 0], [1, 0, 0]])
    valid = torch.tensor([[True, True, False], [True, True, False]])
    return boxes, labels, valid


# ------------------------------------------------------------------------------- loss
def test_a_head_that_is_right_has_hardly_a_loss_and_is_decoded(task):
    grid = task.grid.strided(2)
    boxes, labels, valid = some_boxes(grid)
    inside = valid & grid.inside(boxes)
    head = perfect(boxes, labels, inside, grid, 3)
    targets = {"boxes": boxes, "labels": labels, "valid": valid}
    terms = detection_loss([head], targets, grid)
    assert terms["task/boxes"] < 1e-5
    off = {**head, "height": head["height"] + 1}
    assert detection_loss([off], targets, grid)["task/boxes"] == pytest.approx(0.25, abs=1e-4)
    metric = task.metrics()["detection"]
    batch = {**targets, "valid": inside, "seen": torch.full((2, 3), 20)}
    metric.update({"head": [head], "grid": task.grid}, batch)
    figures = metric.compute()
    assert figures["map"] == pytest.approx(1.0, abs=1e-6)
    assert figures["translation_error"] < 1e-4


def test_classes_of_several_heads_follow_one_another(task):
    grid = task.grid.strided(2)
    boxes, labels, valid = some_boxes(grid)
    inside = valid & grid.inside(boxes)
    parts = [
        perfect(boxes, labels, inside & (labels == 0), grid, 1),
        perfect(boxes, labels - 1, inside & (labels > 0), grid, 2),
    ]
    targets = {"boxes": boxes, "labels": labels, "valid": valid}
    assert detection_loss(parts, targets, grid)["task/boxes"] < 1e-5
    metric = task.metrics()["detection"]
    metric.update(
        {"head": parts, "grid": task.grid},
        {**targets, "valid": inside, "seen": torch.full((2, 3), 20)},
    )
    assert metric.compute()["map"] == pytest.approx(1.0, abs=1e-6)


def test_a_batch_without_boxes_still_has_a_loss(task):
    net = task.net(MiniBEV(**task.about["facts"], width=4, widths=(4, 4, 4)))
    batch = task.splits["train"].read(torch.arange(2), None)
    batch["valid"] = torch.zeros_like(batch["valid"])
    terms = task.loss(net(batch["x"]), batch)
    assert terms["task/heat"] > 0
    assert terms["task/boxes"] == 0
    sum(terms.values()).backward()


# ------------------------------------------------------------------------------- any detector
class Foreign(nn.Module):
    """A detector as other code bases have it: one dictionary in, nests of tasks out."""

    def __init__(self, grid, form="nest", axes="yx"):
        super().__init__()
        self.grid, self.form, self.axes = grid, form, axes
        self.pts_middle_encoder = nn.Conv2d(1, 5, 1)
        self.pts_backbone = nn.Conv2d(5, 7, 3, 2, 1)
        self.pts_bbox_head = ForeignHead(form)

    def forward(self, batch_dict):
        points = batch_dict["points"]
        height, width = Grid.of(self.grid).shape
        cells = Grid.of(self.grid).cells(points).floor().long()
        inside = Grid.of(self.grid).inside(points)
        maps = torch.zeros(len(points), 1, height, width)
        rows = torch.arange(len(points))[:, None].expand(points.shape[:2])
        maps[rows[inside], 0, cells[..., 1][inside], cells[..., 0][inside]] = 1
        if self.axes == "xy":
            maps = maps.transpose(-1, -2)
        found = self.pts_bbox_head(self.pts_backbone(self.pts_middle_encoder(maps)))
        return torch.zeros(1) if self.form == "tapped" else found


class ForeignHead(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        widths = {"heatmap": 1, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
        self.first = nn.ModuleDict({k: nn.Conv2d(7, w, 1) for k, w in widths.items()})
        self.second = nn.ModuleDict(
            {k: nn.Conv2d(7, 2 if k == "heatmap" else w, 1) for k, w in widths.items()}
        )

    def forward(self, x):
        tasks = [{k: layer(x) for k, layer in task.items()} for task in (self.first, self.second)]
        if self.form == "openpcdet":
            names = {"heatmap": "hm", "reg": "center", "height": "center_z"}
            return {"pred_dicts": [{names.get(k, k): v for k, v in t.items()} for t in tasks]}
        return tuple([task] for task in tasks)


TAPS = {"low": "pts_middle_encoder", "high": "pts_backbone"}


@pytest.mark.parametrize("form", ["nest", "openpcdet", "tapped"])
def test_a_foreign_detector_plugs_in_by_aliases(task, form):
    taps = {**TAPS, **({"head": "pts_bbox_head"} if form == "tapped" else {})}
    net = task.net(Foreign(task.about["grid"], form), taps)
    batch = task.splits["train"].read(torch.arange(2), None)
    task.check(net, None)
    out = net(batch["x"])
    assert out["taps"]["low"].shape == (2, 5, 32, 32)
    assert out["taps"]["high"].shape == (2, 7, 16, 16)
    assert out["heat"].shape == (2, 3, 16, 16)
    assert out["regression"].shape == (2, 2 * 10, 16, 16)
    assert "head" not in out["taps"]
    sum(task.loss(out, batch).values()).backward()
    assert net.module.pts_middle_encoder.weight.grad is not None


def test_maps_of_other_axes_are_turned(task):
    plain = Foreign(task.about["grid"])
    turned = Foreign(task.about["grid"], axes="xy")
    turned.load_state_dict(plain.state_dict())
    for layer in (turned.pts_backbone,):
        layer.weight.data = layer.weight.data.transpose(-1, -2).contiguous()
    batch = task.splits["train"].read(torch.arange(1), None)
    a, b = (GridNet(m, grid=task.grid, taps=TAPS)(batch["x"]) for m in (plain, turned))
    torch.testing.assert_close(a["heat"], b["heat"])
    torch.testing.assert_close(a["taps"]["low"], b["taps"]["low"])


def test_what_no_head_is_found_in_is_told():
    with pytest.raises(ModelError, match="tap 'head'"):
        heads_of({"logits": torch.zeros(1)})
    with pytest.raises(ModelError, match="Tensor"):
        heads_of(torch.zeros(1))


def test_detectors_that_do_not_fit_are_told(task):
    facts = dict(task.about["facts"])
    two = MiniBEV(**{**facts, "categories": ["car", "truck"]}, width=4, widths=(4, 4, 4))
    with pytest.raises(ModelError, match=r"2 classes.*3: car, truck, pedestrian"):
        task.check(task.net(two), None)
    with pytest.raises(ModelError, match="teacher Linear"):
        task.check(None, task.net(nn.Linear(2, 2)))
    module = Foreign(task.about["grid"])
    module.axes = "yz"
    with pytest.raises(ModelError, match="'yx' or 'xy'"):
        task.net(module)
    with pytest.raises(ModelError, match="pts_midle"):
        task.net(Foreign(task.about["grid"]), {"low": "pts_midle"})


# ------------------------------------------------------------------------------- deployed
def test_frames_in_boxes_out(task, tmp_path):
    grid = task.grid
    torch.manual_seed(0)
    net = task.net(
        MiniBEV(**task.about["facts"], sensors=["lidar", "camera"], width=4, widths=(4, 4, 4))
    )
    predictor = task.predictor(net)
    view = task.splits["train"].read(torch.arange(1), None)["x"]
    arrays = {
        "points": view["points"][0].numpy(),
        "images": (view["images"][0] * 255).byte().numpy(),
        "intrinsics": view["intrinsics"][0].numpy(),
        "cameras": view["cameras"][0].numpy(),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = predictor.predict([arrays], score=0.0)[0]
    assert found
    assert set(found[0]) == {"category", "score", "box"}
    told = predictor.infer([tmp_path], tmp_path / "out" / "boxes.jsonl", {"score": 0.0})
    assert told["frames"] == 1
    line = json.loads((tmp_path / "out" / "boxes.jsonl").read_text())
    assert line["file"] == "a.npz"
    assert line["boxes"] == json.loads(json.dumps(found))
    with torch.no_grad():
        out = net.eval()(view)
    assert len(net.decode(out, Detecting(least_score=0.0))[0]["boxes"]) == len(found)
    assert net.grid == grid


def test_clouds_are_read_by_their_columns(task, tmp_path):
    net = task.net(MiniBEV(**task.about["facts"], width=4, widths=(4, 4, 4)))
    predictor = task.predictor(net)
    cloud = np.random.default_rng(0).normal(size=(33, 5)).astype(np.float32)
    cloud.tofile(tmp_path / "sweep.bin")
    assert predictor.infer([tmp_path / "sweep.bin"], None, {"columns": 5})["frames"] == 1
    with pytest.raises(DataError, match="columns=5"):
        predictor.infer([tmp_path / "sweep.bin"], None, {})
    with pytest.raises(DataError, match=r"column'.*columns"):
        predictor.infer([tmp_path / "sweep.bin"], None, {"column": 5})
    with pytest.raises(DataError, match="no file"):
        predictor.infer([tmp_path / "nowhere.bin"], None, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        predictor.infer([tmp_path / "empty"], None, {})
    with pytest.raises(DataError, match="points"):
        predictor.predict([{"cloud": cloud}])
