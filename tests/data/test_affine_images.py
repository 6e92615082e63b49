"""Random affine changes of images."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Views
from stillhouse.data.affine_images import AffineImages
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, RecipeError


def batch(count: int = 6, size: int = 12) -> Batch:
    x = torch.zeros(count, 1, size, size)
    x[:, :, 4:8, 5:7] = 1.0
    return Batch(id=torch.arange(count) * 7, x=x)


def test_without_limits_nothing_changes():
    plain = batch()
    kept = AffineImages(turn=0, zoom=0, shear=0, shift=0)(plain, Views(0))
    torch.testing.assert_close(kept["x"], plain["x"])


def test_a_change_depends_on_id_and_draw_alone():
    change, plain = AffineImages(), batch()
    moved = change(plain, Views(3, epoch=1))["x"]
    part = change(plain.select(torch.tensor([4, 2])), Views(3, epoch=1))["x"]
    torch.testing.assert_close(part, moved[[4, 2]])
    assert not torch.allclose(moved, change(plain, Views(3, epoch=2))["x"])
    assert not torch.allclose(moved[0], moved[1])


def test_a_pure_shift_moves_by_pixels():
    change = AffineImages(turn=0, zoom=0, shear=0, shift=0.5)
    drawn = torch.full((1, 6), 0.5)
    drawn[0, 4] = 0.5 + 2 / 12  # a sixth of the width to the left
    rows = change.matrices(drawn)
    image = batch(1)["x"]
    grid = torch.nn.functional.affine_grid(rows, list(image.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    torch.testing.assert_close(moved[..., :-2], image[..., 2:], atol=1e-5, rtol=0)


def test_limits_hold():
    change = AffineImages(turn=15, zoom=0.2, shear=0.0, shift=0.1)
    rows = change.matrices(torch.rand(500, 6, generator=torch.Generator().manual_seed(0)))
    wide = (rows[:, 0, 0].square() + rows[:, 0, 1].square()).sqrt()
    assert wide.min() >= 0.818
    assert wide.max() <= 1.2215
    assert torch.atan2(-rows[:, 0, 1], rows[:, 0, 0]).abs().max() <= 15 * torch.pi / 180 + 1e-6
    assert rows[:, :, 2].abs().max() <= 0.2


def test_bytes_become_floats_and_data_is_centred():
    splits = open_data("digits", options={"image_size": 20, "canvas": 28, "augment": "affine"})
    assert splits.about["input"] == [1, 28, 28]
    plain = read_rows(splits["train"], torch.arange(5), None)["x"]
    assert not plain[..., :4].any()
    assert not plain[:, :, -4:].any()
    assert plain[..., 4:-4, 4:-4].any()
    moved = read_rows(splits["train"], torch.arange(5), Views(0))["x"]
    assert moved.dtype == torch.float32
    assert moved.shape == plain.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    assert not torch.equal(moved, plain)


def test_what_cannot_be_changed_is_told():
    with pytest.raises(DataError, match="at least 0"):
        AffineImages(turn=-1)
    with pytest.raises(DataError, match="cannot be augmented as an image"):
        AffineImages()(Batch(id=torch.arange(2), x=torch.zeros(2, 5)), Views(0))
    with pytest.raises(RecipeError, match="cropped and flipped"):
        open_data("image_folder", options={"path": ".", "augment": "affine"})
