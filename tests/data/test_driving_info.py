"""Real frames against their own calibration and annotations."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stillhouse.data.driving_info import read_info, resized
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError
from stillhouse.parts.boxes import corners, points_per_box
from stillhouse.parts.cameras import project, visible

KITTI = "lidar/kitti/000008.json"
NUSCENES = "lidar/nuscenes/n015-2018-07-24-11-22-45+0800.json"


def told(root, name):
    return json.loads((root / name).read_text())["data_list"][0]


def test_kitti_boxes_project_onto_their_annotated_rectangles(data_root):
    frame = read_info(data_root / KITTI, "kitti")[0]
    raw = [e for e in told(data_root, KITTI)["instances"] if e["bbox_label_3d"] >= 0]
    assert len(frame.boxes) == len(raw) == 6
    tall, wide = frame.images[0].shape[:2]
    assert (tall, wide) == (375, 1242)
    for box, entry in zip(frame.boxes, raw, strict=True):
        pixels, depth = project(corners(box[None])[0], frame.intrinsics[0], frame.cameras[0])
        assert (depth > 0).all()
        limit = torch.tensor([wide, tall]).double()
        low = pixels.min(0).values.clamp_min(0)
        high = torch.minimum(pixels.max(0).values, limit)
        found = torch.cat([low, high])
        # Annotated by hand, to the pixel or two.
        torch.testing.assert_close(found, torch.tensor(entry["bbox"]).double(), rtol=0, atol=2.0)


def test_kitti_points_lie_in_the_boxes_as_counted(data_root):
    frame = read_info(data_root / KITTI, "kitti")[0]
    found = points_per_box(frame.points.double(), frame.boxes)
    # Counted in the camera's tilted frame: a few at the borders differ.
    torch.testing.assert_close(found.double(), frame.counted.double(), rtol=0.08, atol=3)
    assert found.sum() > 4900


def test_nuscenes_boxes_project_exactly_as_annotated(data_root):
    frame = read_info(data_root / NUSCENES, "nuscenes")[0]
    raw = told(data_root, NUSCENES)
    assert len(frame.images) == 6
    checked = 0
    for view, name in enumerate(frame.camera_names):
        pixels, depth = project(frame.boxes[:, :3], frame.intrinsics[view], frame.cameras[view])
        for entry in raw["cam_instances"][name]:
            centre = torch.tensor(entry["center_2d"]).double()
            place = (depth - entry["depth"]).abs().argmin()
            torch.testing.assert_close(pixels[place], centre, rtol=0, atol=0.01)
            checked += 1
    assert checked == 84


def test_nuscenes_points_lie_in_the_boxes_as_counted(data_root):
    frame = read_info(data_root / NUSCENES, "nuscenes")[0]
    found = points_per_box(frame.points.double(), frame.boxes)
    assert (found == frame.counted).float().mean() > 0.85
    assert abs(int(found.sum() - frame.counted.sum())) < 30


def test_nuscenes_points_fall_into_no_one_or_two_cameras(data_root):
    frame = read_info(data_root / NUSCENES, "nuscenes")[0]
    seen = torch.zeros(len(frame.points), dtype=torch.int64)
    for view, image in enumerate(frame.images):
        pixels, depth = project(frame.points.double(), frame.intrinsics[view], frame.cameras[view])
        seen += visible(pixels, depth, image.shape[:2])
    counts = [int((seen == k).sum()) for k in range(4)]
    assert sum(counts[:3]) == len(frame.points)
    assert counts[1] > counts[2] > 0
    assert counts[0] > 0


def test_smaller_images_keep_their_calibration(data_root):
    frame = read_info(data_root / NUSCENES, "nuscenes")[0]
    images, scaled = resized(frame, (90, 320))
    assert images[0].shape == (90, 320, 3)
    box = frame.boxes[:, :3]
    before, depth = project(box, frame.intrinsics[0], frame.cameras[0])
    after, _ = project(box, scaled[0], frame.cameras[0])
    ahead = depth > 1
    wanted = before[ahead] * torch.tensor([320 / 1600, 90 / 900]).double()
    torch.testing.assert_close(after[ahead], wanted)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("kitti_frames", (1, 1, 3, 96, 320)), ("nuscenes_frames", (1, 6, 3, 144, 256))],
)
def test_frames_open_as_data(data_root, name, shape):
    splits = open_data(name)
    assert "same frames" in splits.edition
    batch = splits["train"].read(torch.arange(1), None)
    assert batch["x"]["images"].shape == shape
    assert batch["valid"].sum() >= 4
    assert batch["boxes"].shape[-1] == 9


def test_what_is_wrong_with_a_file_is_told(data_root, tmp_path):
    with pytest.raises(DataError, match=r"category 'car'.*Car"):
        open_data("kitti_frames", options={"categories": ["car"]})
    with pytest.raises(DataError, match="no file"):
        open_data("kitti_frames", options={"path": "nowhere.json"})
    copy = tmp_path / "frame.json"
    shutil.copy(data_root / KITTI, copy)
    with pytest.raises(DataError, match=r"cloud .*000008\.bin"):
        open_data("kitti_frames", options={"path": str(copy)})
    shutil.copy(data_root / "lidar/kitti/000008.bin", tmp_path)
    with pytest.raises(DataError, match="image"):
        open_data("kitti_frames", options={"path": str(copy)})
    with pytest.raises(DataError, match="nuscenes"):
        read_info(copy, "nuscenes")
    copy.write_text("{}")
    with pytest.raises(DataError, match="information file"):
        read_info(copy, "kitti")


def test_without_the_data_it_is_said_where_was_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="mmdetection3d"):
        open_data("nuscenes_frames")
