"""The ground and boxes on it: grids, sampling, corners, cameras, Gaussians, decoding."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.parts.bev_grid import Grid, sample_maps
from stillhouse.parts.boxes import (
    corners,
    ground_corners,
    into_box,
    moved,
    nine_points,
    out_of_box,
    points_in_boxes,
    points_per_box,
    wrapped,
)
from stillhouse.parts.cameras import not_hidden, on_ground, pixel_rays, project, visible
from stillhouse.parts.centre_maps import (
    at_centres,
    centre_targets,
    circle_nms,
    class_maps,
    decode_centres,
    gaussian_mask,
    gaussian_radius,
)

# Not square: exchanged axes show at once.
GRID = Grid((0.0, -5.0, -2.0, 20.0, 5.0, 2.0), (1.0, 1.0))


def box(x=10.0, y=2.0, length=4.0, width=2.0, yaw=0.0, z=0.0, height=1.5):
    return torch.tensor([x, y, z, length, width, height, yaw], dtype=torch.float64)


def ramp(height=10, width=20):
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([columns + 0.5, rows + 0.5])[None]


# ------------------------------------------------------------------------------- grid
def test_a_ramp_returns_the_place_that_is_sampled():
    places = torch.tensor([[[3.7, -2.2], [19.4, 4.4], [0.5, 0.0], [12.0, 3.3]]]).double()
    found = sample_maps(ramp(), places, GRID)
    torch.testing.assert_close(found, GRID.cells(places), rtol=0, atol=1e-12)


def test_a_map_of_any_resolution_is_sampled_in_metres():
    fine = Grid(GRID.range, (0.5, 0.25))
    places = torch.tensor([[[3.7, -2.2], [12.0, 3.3]]]).double()
    maps = ramp(*fine.shape)
    torch.testing.assert_close(sample_maps(maps, places, GRID), fine.cells(places))
    assert GRID.over(maps) == fine


def test_beyond_the_map_there_is_nothing():
    maps = torch.ones(1, 1, 10, 20, dtype=torch.float64)
    places = torch.tensor([[[-0.5, 0.0], [0.0, 0.0], [25.0, 0.0], [10.0, 5.0]]]).double()
    found = sample_maps(maps, places, GRID)[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 0.0, 0.5]).double())


def test_inside_leaves_out_the_far_border():
    places = torch.tensor([[0.0, -5.0], [19.99, 4.99], [20.0, 0.0], [5.0, 5.0], [-0.01, 0.0]])
    assert GRID.inside(places).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(GRID.metres(GRID.cells(places)), places)


@pytest.mark.parametrize(
    "given",
    [
        {"range": [0, 0, 0, 1, 1], "cell": 1},
        {"range": [0, 0, 0, 1, 1, 1]},
        {"range": [0, 0, 0, -1, 1, 1], "cell": 1},
        {"range": [0, 0, 0, 1, 1, 1], "cell": 0.3},
    ],
)
def test_a_grid_that_cannot_be_is_told(given):
    with pytest.raises(ModelError):
        Grid.of(given)


def test_a_grid_survives_as_plain_values():
    assert Grid.of(GRID.plain()) == GRID
    assert GRID.strided(2).shape == (5, 10)


# ------------------------------------------------------------------------------- boxes
def test_nine_points_of_an_upright_box():
    found = {tuple(p) for p in nine_points(box(10, 7)).tolist()}
    assert found == {(x, y) for x in (8.0, 10.0, 12.0) for y in (6.0, 7.0, 8.0)}


def test_a_quarter_turn_swaps_length_and_width():
    turned = {tuple(p) for p in nine_points(box(10, 7, yaw=math.pi / 2)).round(decimals=9).tolist()}
    swapped = {tuple(p) for p in nine_points(box(10, 7, 2.0, 4.0)).round(decimals=9).tolist()}
    assert turned == swapped


def test_canonical_map_of_a_turned_box():
    boxes = torch.stack([box(10, 0, yaw=math.pi / 2)])
    points = torch.tensor([[10.0, 1.0, 0.0]]).double()
    own = into_box(points, boxes)
    torch.testing.assert_close(own[0, 0], torch.tensor([1.0, 0.0, 0.0]).double())
    torch.testing.assert_close(out_of_box(own, boxes)[0], points, rtol=0, atol=1e-12)


def test_points_on_the_border_lie_inside():
    boxes = torch.stack([box(), box(z=5.0)])
    points = torch.tensor([[12.0, 3.0, 0.75], [12.01, 3.0, 0.0], [10.0, 2.0, 5.0]]).double()
    assert points_in_boxes(points, boxes).tolist() == [[True, False, False], [False, False, True]]
    present = torch.tensor([True, True, False])
    assert points_per_box(points, boxes, present).tolist() == [1, 0]


def test_eight_corners_stand_above_the_four():
    found = corners(box(z=1.0, height=2.0, yaw=0.3))
    ground = ground_corners(box(yaw=0.3))
    torch.testing.assert_close(found[:4, :2], ground)
    torch.testing.assert_close(found[4:, :2], ground)
    assert found[:4, 2].tolist() == [0.0] * 4
    assert found[4:, 2].tolist() == [2.0] * 4


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_moved_boxes_keep_their_points(sign):
    rng = torch.Generator().manual_seed(0)
    boxes = torch.stack([box(3, 1, yaw=0.7), box(-4, 2, yaw=-2.0)])[None]
    boxes = torch.cat([boxes, torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]).double()], -1)
    points = torch.randn(1, 500, 3, generator=rng).double() * 4
    angle, mirror = torch.tensor([0.9]).double(), torch.tensor([sign]).double()
    after = moved(boxes, angle, mirror)
    mirrored = points * torch.tensor([1.0, sign, 1.0]).double()
    c, s = math.cos(0.9), math.sin(0.9)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]]).double()
    there = mirrored @ turn.T
    assert torch.equal(points_in_boxes(points, boxes), points_in_boxes(there, after))
    # The velocity turns with its box.
    along = torch.atan2(boxes[..., 8], boxes[..., 7]) - boxes[..., 6]
    later = torch.atan2(after[..., 8], after[..., 7]) - after[..., 6]
    torch.testing.assert_close(wrapped(later), wrapped(along * sign))


# ------------------------------------------------------------------------------- cameras
def camera(yaw=0.0):
    pose = torch.eye(4).double()
    forward = torch.tensor([math.cos(yaw), math.sin(yaw), 0]).double()
    right = torch.tensor([math.sin(yaw), -math.cos(yaw), 0]).double()
    pose[:3, :3] = torch.stack([right, torch.tensor([0, 0, -1.0]).double(), forward], 1)
    pose[:3, 3] = torch.tensor([0.2, -0.1, 1.6])
    intrinsics = torch.tensor([[80.0, 0, 80], [0, 80, 32], [0, 0, 1]]).double()
    return intrinsics, pose


def test_what_is_lifted_is_projected_where_it_came_from():
    intrinsics, pose = camera(0.4)
    rays = pixel_rays(intrinsics, (64, 160), 8)
    assert rays.shape == (8 * 20, 3)
    assert (rays[:, 2] == 1).all()
    points = (7.5 * rays) @ pose[:3, :3].T + pose[:3, 3]
    pixels, depth = project(points, intrinsics, pose)
    torch.testing.assert_close(depth, torch.full_like(depth, 7.5))
    torch.testing.assert_close(pixels[0], torch.tensor([4.0, 4.0]).double())
    torch.testing.assert_close(pixels[21], torch.tensor([12.0, 12.0]).double())
    assert visible(pixels, depth, (64, 160)).all()


def test_pixels_meet_the_ground_where_it_projects_to_them():
    intrinsics, pose = camera()
    points = torch.tensor([[6.0, 1.0, 0.0], [15.0, -4.0, 0.0]]).double()
    pixels, _ = project(points, intrinsics, pose)
    torch.testing.assert_close(on_ground(intrinsics, pose, pixels, 0.0), points)
    above = on_ground(intrinsics, pose, torch.tensor([[80.0, 10.0]]).double(), 0.0)
    assert above.isnan().all()


def test_a_point_behind_another_is_hidden():
    pixels = torch.tensor([[10.0, 10.0], [12.0, 11.0], [60.0, 10.0], [13.0, 9.0]])
    depth = torch.tensor([5.0, 9.0, 9.0, 5.2])
    inside = torch.ones(4, dtype=torch.bool)
    assert not_hidden(pixels, depth, inside).tolist() == [True, False, True, True]
    inside[0] = False
    assert not_hidden(pixels, depth, inside).tolist() == [False, False, True, True]


# ------------------------------------------------------------------------------- centres
def test_radius_of_known_sizes():
    sizes = torch.tensor([[10.0, 4.0], [20.0, 20.0], [3.0, 3.0]]).double()
    found = gaussian_radius(sizes[:, 0], sizes[:, 1])
    wanted = torch.tensor([1.586, 5.466, 0.820]).double()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_the_mask_is_one_at_centres_and_keeps_the_larger():
    boxes = torch.stack([box(5.5, 0.5, 10, 4), box(7.5, 0.5, 10, 4), box(50, 0)])[None].float()
    valid = torch.ones(1, 3, dtype=torch.bool)
    mask = gaussian_mask(boxes, valid, GRID)
    assert mask.shape == (1, 10, 20)
    assert mask[0, 5, 5] == mask[0, 5, 7] == 1
    side = math.exp(-1 / (2 * 0.5**2))  # radius 1, sigma 1/2
    assert mask[0, 5, 6] == pytest.approx(side)
    assert mask[0, 5, 8] == pytest.approx(side)
    assert mask[0, 5, 3] == 0
    assert (mask > 0).sum() == 9 + 9 - 3
    assert gaussian_mask(boxes[:, :0], valid[:, :0], GRID).sum() == 0


def test_what_targets_say_is_what_decoding_finds():
    boxes = torch.stack([box(4.3, -2.2, yaw=2.5, z=0.4), box(15.8, 3.1, 0.8, 0.7, yaw=-0.4)])
    boxes = torch.cat([boxes, torch.tensor([[1.0, -2.0], [0.5, 0.0]]).double()], -1)[None].float()
    labels, valid = torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    heat = class_maps(boxes, labels, valid, GRID, 2)
    head = {"hm": torch.logit(heat.clamp(1e-4, 1 - 1e-4))}
    place = GRID.cells(boxes).floor().long()[0]
    for name, values in centre_targets(boxes, GRID).items():
        maps = torch.zeros(1, values.shape[-1], *GRID.shape)
        maps[0, :, place[:, 1], place[:, 0]] = values[0].T
        torch.testing.assert_close(at_centres(maps, boxes, GRID), values)
        head[name] = maps
    found = decode_centres(head, GRID, first_label=3, least_score=0.5)[0]
    order = found["labels"].argsort()
    assert found["labels"][order].tolist() == [3, 4]
    torch.testing.assert_close(found["boxes"][order], boxes[0, [1, 0]], rtol=0, atol=1e-5)
    head["iou"] = torch.full((1, 1, *GRID.shape), -1.0)  # the overlap is said to be 0
    assert len(decode_centres(head, GRID, least_score=0.5)[0]["boxes"]) == 0
    with pytest.raises(ModelError, match="rot"):
        decode_centres({k: v for k, v in head.items() if k != "rot"}, GRID)


def test_circle_nms_drops_the_weaker_of_a_class():
    boxes = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.6, 0.0], [1.4, 0.0]])
    labels = torch.tensor([0, 0, 1, 0])
    kept = circle_nms(boxes, labels, torch.tensor([1.0, 1.0]))
    assert kept.tolist() == [0, 2, 3]
