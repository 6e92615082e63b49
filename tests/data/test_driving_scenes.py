from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.clock import Views
from stillhouse.data.bev_frames import BevAugment, BevSource, Frames
from stillhouse.data.driving_world import (
    CATEGORIES,
    GROUND_Z,
    SURFACES,
    Sensors,
    ego_pose,
    make_scene,
    render,
)
from stillhouse.data.ray_casting import FAR, GROUND, SKY, Solids, cast
from stillhouse.data.registry import open_data
from stillhouse.errors import OptionError
from stillhouse.parts.boxes import corners, points_in_boxes, points_per_box
from stillhouse.parts.cameras import apply_pose, inverse_pose, project, visible
from stillhouse.teacher import Ragged

SMALL = {"train": 3, "held": 1, "test": 2, "beams": 16, "azimuths": 120, "image": [32, 80]}


def solids(boxes=(), cylinders=()):
    return Solids(
        np.array(boxes, np.float32).reshape(-1, 7),
        np.array(cylinders, np.float32).reshape(-1, 5),
        GROUND_Z,
    )


def ray(*direction):
    return np.array([direction], np.float32)


# ------------------------------------------------------------------------------- rays
def test_rays_meet_what_stands_before_them():
    scene = solids([(10, 0, 0, 4, 2, 2, 0)], [(0, 5, 0, 0.5, 2)])
    origin = np.zeros(3, np.float32)
    front = cast(origin, ray(1, 0, 0), scene)
    assert front.distance[0] == pytest.approx(8)
    assert front.normal[0].tolist() == [-1, 0, 0]
    side = cast(origin, ray(0, 1, 0), scene)
    assert (side.distance[0], side.solid[0]) == (pytest.approx(4.5), 1)
    assert side.normal[0].tolist() == pytest.approx([0, -1, 0])
    up = cast(origin, ray(-1, 0, 0.1), scene)
    assert (up.distance[0], up.solid[0]) == (FAR, SKY)
    down = cast(origin, ray(-1, 0, -1), scene)
    assert down.solid[0] == GROUND
    assert down.distance[0] == pytest.approx(1.8)


def test_a_turned_box_is_met_on_its_own_faces():
    hits = cast(np.zeros(3, np.float32), ray(1, 0, 0), solids([(10, 0, 0, 2, 6, 2, np.pi / 2)]))
    assert hits.distance[0] == pytest.approx(7, abs=1e-4)
    # A box all around the eye is not met from within; its far side is not seen.
    inside = cast(np.zeros(3, np.float32), ray(1, 0, 0.01), solids([(0, 0, 0, 4, 4, 4, 0)]))
    assert inside.solid[0] == SKY


def test_culling_by_azimuth_loses_no_hit():
    rng = np.random.default_rng(0)
    scene = solids(
        [(x, y, 0, 3, 2, 3, t) for x, y, t in rng.uniform(-15, 15, (12, 3)) if abs(x) > 4],
        [(x, y, 0, 0.4, 3) for x, y in rng.uniform(-15, 15, (6, 2)) if abs(x) > 2],
    )
    rays = Sensors(beams=8, azimuths=90).rays()
    whole = cast(np.zeros(3, np.float32), rays, scene)
    one_by_one = [cast(np.zeros(3, np.float32), r[None], scene) for r in rays]
    assert [int(h.solid[0]) for h in one_by_one] == whole.solid.tolist()
    # Each solid alone, and the nearest of all of them.
    alone = []
    for number in range(len(scene.boxes)):
        alone.append(cast(np.zeros(3, np.float32), rays, solids([scene.boxes[number]])).distance)
    nearest = np.min(alone, axis=0)
    met = whole.solid < len(scene.boxes)
    assert np.allclose(whole.distance[met], np.minimum(nearest, whole.distance)[met])


# ------------------------------------------------------------------------------- world
def frames_of(count=4, **settings):
    sensors = Sensors(beams=32, azimuths=360, noise=0.0, dropout=0.0, **settings)
    rng = np.random.default_rng(3)
    scene = make_scene(rng, 20.0)
    return scene, sensors, [render(scene, sensors, 0.5 * t, rng) for t in range(count)]


def test_points_of_movers_lie_in_their_boxes_and_nowhere_else():
    for scene_seed in range(4):
        rng = np.random.default_rng(scene_seed)
        frame = render(make_scene(rng, 20.0), Sensors(noise=0.0, cameras=0), 0.0, rng)
        boxes = torch.from_numpy(frame.boxes)
        grown = boxes + torch.tensor([0, 0, 0, 0.01, 0.01, 0.01, 0, 0, 0])
        inside = points_in_boxes(torch.from_numpy(frame.points), grown)
        moving = torch.from_numpy(frame.surfaces >= SURFACES.index(CATEGORIES[0]))
        assert inside.any(0)[moving].all()
        for number, label in enumerate(frame.labels):
            surface = torch.from_numpy(frame.surfaces)[inside[number] & moving]
            assert (surface == SURFACES.index(CATEGORIES[label])).all()


def test_cameras_see_a_mover_where_its_box_projects():
    _, sensors, frames = frames_of(1)
    frame = frames[0]
    intrinsics = torch.from_numpy(sensors.intrinsics()).double()
    found = 0
    for view, pose in enumerate(sensors.poses()):
        shown = frame.image_surfaces[view] >= SURFACES.index(CATEGORIES[0])
        covered = np.zeros_like(shown)
        for box in frame.boxes:
            pixels, depth = project(
                corners(torch.from_numpy(box[None]).double())[0],
                intrinsics,
                torch.from_numpy(pose).double(),
            )
            if (depth > 0.5).all():
                low, high = pixels.min(0).values.floor(), pixels.max(0).values.ceil()
                rows = slice(max(0, int(low[1])), max(0, int(high[1])))
                columns = slice(max(0, int(low[0])), max(0, int(high[0])))
                covered[rows, columns] = True
        assert not (shown & ~covered).any()
        found += int(shown.sum())
    assert found > 50


def test_lidar_and_cameras_agree_on_what_is_where():
    _, sensors, frames = frames_of(1)
    points = torch.from_numpy(frames[0].points).double()
    surfaces = torch.from_numpy(frames[0].surfaces)
    agreed = seen = 0
    for view, pose in enumerate(sensors.poses()):
        pixels, depth = project(
            points, torch.from_numpy(sensors.intrinsics()).double(), torch.from_numpy(pose).double()
        )
        inside = visible(pixels, depth, sensors.image)
        column, row = pixels[inside].long().unbind(-1)
        there = torch.from_numpy(frames[0].image_surfaces[view])[row, column]
        agreed += int((there == surfaces[inside]).sum())
        seen += int(inside.sum())
    assert agreed / seen > 0.93  # cameras stand beside the LiDAR, edges differ


def test_poses_carry_what_stands_to_one_world():
    scene, _, frames = frames_of(4, cameras=0)
    walls = []
    for frame in frames:
        points = torch.from_numpy(frame.points[frame.surfaces == SURFACES.index("wall")])
        there = apply_pose(torch.from_numpy(frame.pose), points[:, :3].double())
        boxes = torch.from_numpy(scene.walls).double()
        boxes[:, 3:6] += 0.02
        walls.append(points_in_boxes(there, boxes).any(0).float().mean())
    assert min(walls) == 1
    assert not np.allclose(frames[0].pose, frames[3].pose)
    # Movers go on at their speed, in the world.
    start, end = (
        apply_pose(torch.from_numpy(f.pose), torch.from_numpy(f.boxes[:, :3]).double())
        for f in (frames[0], frames[2])
    )
    wanted = torch.from_numpy(scene.speeds).double()
    torch.testing.assert_close(end[:, :2] - start[:, :2], wanted, rtol=0, atol=1e-4)
    turned = (
        torch.from_numpy(frames[2].boxes[:, 7:9])
        @ torch.from_numpy(ego_pose(scene, 1.0)[:2, :2].T).float()
    )
    torch.testing.assert_close(turned, wanted.float(), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------- data set
def test_scenes_are_read_with_boxes_that_have_points():
    splits = open_data("driving_scenes", options=SMALL)
    assert [splits.peek(role) for role in ("train", "val", "test")] == [3, 1, 2]
    batch = splits["train"].read(torch.arange(3), None)
    view = batch["x"]
    assert view["points"].shape[0] == 3
    assert view["images"].shape == (3, 4, 3, 32, 80)
    assert 0 <= view["images"].min() < view["images"].max() <= 1
    counted = points_per_box(view["points"], batch["boxes"])
    assert (batch["seen"] >= counted)[batch["valid"]].all()
    assert (batch["seen"][batch["valid"]] >= 1).all()
    assert batch["valid"].any(1).all()
    assert splits.about["categories"] == list(CATEGORIES)


def test_the_cache_gives_the_same_scenes_and_options_others(monkeypatch, tmp_path):
    first = open_data("driving_scenes", options=SMALL)["train"].fingerprint
    assert open_data("driving_scenes", options=SMALL, seed=5)["train"].fingerprint == first
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    assert open_data("driving_scenes", options=SMALL)["train"].fingerprint == first
    for change in ({"scene_seed": 1}, {"beams": 8}, {"turn": 3.0}, {"image": [32, 64]}):
        other = open_data("driving_scenes", options={**SMALL, **change})
        assert other["train"].fingerprint != first


def test_sequences_keep_tracks_and_surfaces():
    options = {**SMALL, "train": 2, "frames": 3, "surfaces": True, "cameras": 2, "field": 110.0}
    source = open_data("driving_scenes", options=options)["train"]
    batch = source.read(torch.arange(6), None)
    assert batch["scene"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["moment"].tolist() == [0, 1, 2] * 2
    assert torch.equal(batch["tracks"][0], batch["tracks"][2])
    assert batch["image_surfaces"].shape == (6, 2, 32, 80)
    count = int(batch["x"]["point_count"][1])
    assert (batch["surfaces"][1, :count] >= 0).all()
    assert (batch["surfaces"][1, count:] == -1).all()


def test_lidar_only_reads_no_images_and_cameras_only_no_points():
    lidar = open_data("driving_scenes", options={**SMALL, "sensors": ["lidar"]})
    assert set(lidar["val"].read(torch.arange(1), None)["x"]) == {"points", "point_count"}
    camera = open_data("driving_scenes", options={**SMALL, "sensors": ["camera"]})
    batch = camera["val"].read(torch.arange(1), None)
    assert batch["x"]["point_count"].tolist() == [0]
    assert batch["valid"].any()


def test_an_unknown_sensor_is_told():
    with pytest.raises(OptionError, match="sensors"):
        open_data("driving_scenes", options={"sensors": ["radar"]})
    with pytest.raises(OptionError, match="azimuths"):
        open_data("driving_scenes", options={"azimuth": 3})


# ------------------------------------------------------------------------------- one draw
def test_one_draw_serves_points_boxes_cameras_and_poses():
    splits = open_data("driving_scenes", options=SMALL)
    plain = splits["train"].source if hasattr(splits["train"], "source") else splits["train"]
    frames = plain.frames.with_cloud("complete", plain.frames.clouds["x"])
    source = BevSource(frames, BevAugment(True, 180.0), "test")
    rows = torch.arange(3)
    before, after = source.read(rows, None), source.read(rows, Views(7, 2))
    again = source.read(rows.flip(0), Views(7, 2))
    assert torch.equal(after["boxes"], again["boxes"].flip(0))
    assert not torch.equal(before["boxes"], after["boxes"])
    for row in range(3):
        valid = before["valid"][row]
        inside = [
            points_in_boxes(b["x"]["points"][row].double(), _grown(b["boxes"][row][valid]))
            for b in (before, after)
        ]
        assert (inside[0] == inside[1]).float().mean() > 0.9999
        # A view with another cloud is moved by the same draw.
        assert torch.equal(after["complete"]["points"][row], after["x"]["points"][row])
        for view in range(4):
            pixels = [
                project(
                    b["boxes"][row, :, :3].double(),
                    b["x"]["intrinsics"][row, view].double(),
                    b["x"]["cameras"][row, view].double(),
                )
                for b in (before, after)
            ]
            ahead = pixels[0][1] > 1
            torch.testing.assert_close(pixels[0][0][ahead], pixels[1][0][ahead], rtol=0, atol=1e-2)
        # What is in the sequence's world stays there.
        there = [
            apply_pose(b["pose"][row].double(), b["boxes"][row, :, :3].double())
            for b in (before, after)
        ]
        torch.testing.assert_close(there[0], there[1], rtol=0, atol=1e-4)
    assert torch.allclose(inverse_pose(after["pose"]) @ after["pose"], torch.eye(4).double())


def _grown(boxes):
    return boxes.double() + torch.tensor([0, 0, 0, 0.05, 0.05, 0.05, 0, 0, 0]).double()


def test_a_sample_alone_is_a_row_of_the_batch():
    source = open_data("driving_scenes", options=SMALL)["val"]
    sample = source[0, None]
    batch = source.read(torch.arange(1), None)
    assert torch.equal(sample["boxes"], batch["boxes"][0])
    assert torch.equal(sample["x"]["images"], batch["x"]["images"][0])


def test_frames_survive_the_disk():
    frames = Frames(
        {"x": Ragged(torch.randn(5, 4), torch.tensor([0, 2, 5]))},
        *(torch.zeros(2, 1, 9), torch.zeros(2, 1).long(), torch.ones(2, 1).bool()),
        *(torch.ones(2, 1).long(), torch.zeros(2, 1).long()),
        *(torch.zeros(2).long(), torch.arange(2), torch.eye(4).expand(2, 4, 4)),
    )
    again = Frames.of(frames.tensors())
    assert torch.equal(again.clouds["x"].values, frames.clouds["x"].values)
    assert again.images is None
    assert len(again) == 2
