"""Boxes: overlap, coding, flips; torchvision as the reference."""

from __future__ import annotations

import pytest
import torch

from stillhouse.parts.boxes import (
    areas,
    clipped,
    covered,
    decode,
    encode,
    flipped,
    iou,
    resized,
)


def boxes(count: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng, dtype=torch.float64) * 60
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=rng).double() * 40], 1)


def test_overlap_is_torchvisions():
    ops = pytest.importorskip("torchvision.ops")
    first, second = boxes(30, 0), boxes(20, 1)
    torch.testing.assert_close(iou(first, second), ops.box_iou(first, second))
    assert iou(first, first).diagonal().eq(1).all()
    assert iou(torch.zeros(0, 4), second.float()).shape == (0, 20)


def test_boxes_without_area_overlap_nothing_and_give_no_nan():
    thin = torch.tensor([[3.0, 3.0, 3.0, 9.0], [5.0, 5.0, 2.0, 9.0]])
    assert iou(thin, thin).eq(0).all()
    assert covered(thin, torch.tensor([[0.0, 0.0, 10.0, 10.0]])).eq(0).all()


def test_coding_is_torchvisions_and_its_own_inverse():
    coder = pytest.importorskip("torchvision.models.detection._utils").BoxCoder(
        weights=(10.0, 10.0, 5.0, 5.0)
    )
    start, goal = boxes(25, 2), boxes(25, 3)
    deltas = encode(goal, start)
    torch.testing.assert_close(deltas, coder.encode_single(goal, start))
    torch.testing.assert_close(decode(deltas, start), goal)
    large = torch.full((25, 4), 40.0, dtype=torch.float64)
    torch.testing.assert_close(decode(large, start), coder.decode_single(large, start))


def test_a_box_in_another_is_covered():
    inner, outer = torch.tensor([[2.0, 2.0, 4.0, 4.0]]), torch.tensor([[0.0, 0.0, 3.0, 8.0]])
    assert covered(inner, outer).item() == 0.5
    assert areas(outer).item() == 24


def test_flip_twice_and_resize_back():
    some = boxes(9, 4)
    torch.testing.assert_close(flipped(flipped(some, 80.0), 80.0), some)
    back = resized(resized(some, (40, 60), (80, 30)), (80, 30), (40, 60))
    torch.testing.assert_close(back, some)
    assert clipped(torch.tensor([[-3.0, 1.0, 50.0, 9.0]]), 8, 20).tolist() == [[0, 1, 20, 8]]
