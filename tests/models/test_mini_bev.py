from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model
from stillhouse.models.mini_bev import LiftSplat, MiniBEV, Pillars
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.cameras import project

GRID = Grid((-8.0, -8.0, -3.0, 8.0, 8.0, 2.0), (1.0, 1.0))
FACTS = {"categories": ["car", "truck", "pedestrian"], "grid": GRID.plain()}


def cloud(rows=2, most=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    points = torch.rand(rows, most, 4, generator=rng) * 20 - 10
    points[..., 2] = points[..., 2] / 5
    return points, torch.tensor([most, most - 12][:rows])


def ring(views=2, size=(32, 48)):
    intrinsics = torch.tensor([[24.0, 0, 24], [0, 24, 16], [0, 0, 1]]).expand(1, views, 3, 3)
    poses = torch.zeros(1, views, 4, 4)
    for view in range(views):
        yaw = torch.tensor(2 * torch.pi * view / views)
        forward = torch.stack([yaw.cos(), yaw.sin(), torch.tensor(0.0)])
        right = torch.stack([yaw.sin(), -yaw.cos(), torch.tensor(0.0)])
        poses[0, view, :3, :3] = torch.stack([right, torch.tensor([0, 0, -1.0]), forward], 1)
        poses[0, view, 3, 3] = 1
    return torch.rand(1, views, 3, *size), intrinsics, poses


@pytest.mark.parametrize("sensors", [["lidar"], ["camera"], ["lidar", "camera"]])
def test_any_sensors_end_in_maps_of_one_shape(sensors):
    net = MiniBEV(**FACTS, sensors=sensors, width=8, widths=(8, 8, 8), velocity=True)
    points, count = cloud(1)
    images, intrinsics, cameras = ring()
    out = net(points, count, images, intrinsics, cameras)["head"][0]
    assert {k: v.shape[1] for k, v in out.items()} == {
        "hm": 3, "reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2,
    }  # fmt: skip
    assert all(v.shape[-2:] == (8, 8) for v in out.values())
    assert {"low", "high"} == set(net.taps)
    sum(v.sum() for v in out.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_padding_and_the_order_of_points_change_nothing():
    net = Pillars(GRID, 6).eval()
    points, count = cloud()
    found = net(points, count)
    changed = points.clone()
    changed[1, count[1] :] = 3.0
    torch.testing.assert_close(net(changed, count), found)
    mixed = points.clone()
    mixed[0] = points[0, torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    torch.testing.assert_close(net(mixed, count), found)
    outside = torch.cat([points, torch.full((2, 1, 4), 50.0)], 1)
    torch.testing.assert_close(net(outside, count), found)


def test_a_point_lights_its_own_cell_row_y_column_x():
    net = Pillars(GRID, 4).eval()
    net.smooth = torch.nn.Identity()
    torch.nn.init.constant_(net.layer.weight, 0.5)
    points = torch.tensor([[[5.2, -3.7, 0.1, 0.9], [5.4, -3.6, 0.1, 0.9]]])
    lit = net(points, torch.tensor([2]))[0].amax(0).nonzero().tolist()
    assert lit == [[4, 13]]


def test_nothing_seen_is_an_empty_map_with_a_gradient():
    net = Pillars(GRID, 4)
    out = net(torch.zeros(2, 1, 4), torch.tensor([0, 0]))
    assert out.shape == (2, 4, 16, 16)
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_what_is_lifted_lands_where_it_projects_to():
    net = LiftSplat(GRID, 4, (1.0, 7.0, 7), 8)
    _, intrinsics, poses = ring()
    cells, inside = net._cells(intrinsics, poses, (4, 6))
    assert cells.shape == (2, 7, 4 * 6)
    centres = torch.stack([cells % 16, cells // 16], -1) + 0.5
    for view in range(2):
        for depth in range(7):
            kept = inside[view, depth]
            ground = GRID.metres(centres[view, depth][kept].float())
            flat = torch.cat([ground, torch.zeros(len(ground), 1)], 1)
            pixels, away = project(flat, intrinsics[0, view], poses[0, view])
            column = (torch.arange(24) % 6)[kept] * 8 + 4
            # Within a cell: half of it away in depth, and beside, along a slope below 1.
            assert (away - (depth + 1)).abs().max() <= 0.75
            assert ((pixels[:, 0] - column).abs() * away / 24).max() <= 1.0


def test_images_reach_only_the_cells_that_a_camera_looks_at():
    net = LiftSplat(GRID, 4, (1.0, 7.0, 7), 8).eval()
    net.smooth = torch.nn.Identity()
    images, intrinsics, poses = ring(1)
    found = net(images, intrinsics, poses)[0].abs().sum(0)
    assert found[:, :8].sum() == 0  # behind the only camera
    assert found[:, 8:].sum() > 0


def test_what_cannot_be_is_told():
    with pytest.raises(ModelError, match=r"radar.*lidar"):
        MiniBEV(**FACTS, sensors=["radar"])
    with pytest.raises(ModelError, match="three widths"):
        MiniBEV(**FACTS, widths=(8, 8))
    with pytest.raises(ModelError, match="no images"):
        MiniBEV(**FACTS, sensors=["camera"])(*cloud())
    with pytest.raises(ModelError, match="no points"):
        MiniBEV(**FACTS)(images=torch.zeros(1))


def test_it_is_built_by_what_the_data_says():
    net = load_model("stillhouse:mini_bev", options={"width": 8}, about={"facts": FACTS})
    assert net.head.branches["hm"].out_channels == 3
    assert net.grid == GRID


def test_in_double_precision():
    net = MiniBEV(**FACTS, sensors=["lidar", "camera"], width=4, widths=(4, 4, 4)).double()
    points, count = cloud(1)
    images, intrinsics, cameras = (value.double() for value in ring())
    out = net(points.double(), count, images, intrinsics, cameras)
    assert out["head"][0]["hm"].dtype == torch.float64
