from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views
from stillhouse.data.augment_images import AugmentImages, flipped, shifted
from stillhouse.data.image_arrays import ImageSource
from stillhouse.errors import DataError

VIEWS = Views(7, epoch=2)


def batch(count: int = 9, size: int = 8) -> Batch:
    x = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Batch(id=torch.arange(count) * 11, x=x)


def by_hand(image: torch.Tensor, dy: int, dx: int, padding: int) -> torch.Tensor:
    """out[i, j] = image[i + dy - padding, j + dx - padding], zero outside."""
    out = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for i in range(height):
        for j in range(width):
            row, column = i + dy - padding, j + dx - padding
            if 0 <= row < height and 0 <= column < width:
                out[..., i, j] = image[..., row, column]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(4, 3, 6, 9), (4, 6, 9)])
def test_shifted_equals_the_definition(dtype, shape):
    image = (torch.rand(shape) * 255).to(dtype)
    shifts = torch.tensor([[0, 0], [3, 3], [6, 1], [2, 6]])
    got = shifted(image, shifts, 3)
    for row, (dy, dx) in enumerate(shifts.tolist()):
        assert torch.equal(got[row], by_hand(image[row], dy, dx, 3))
    assert torch.equal(got[1], image[1])  # a shift of `padding` is none
    assert got.dtype == dtype


def test_flipped_mirrors_the_flagged_rows_only():
    image = torch.rand(3, 2, 4, 5)
    before = image.clone()
    got = flipped(image, torch.tensor([True, False, True]))
    assert torch.equal(got[0], image[0].flip(-1))
    assert torch.equal(got[1], image[1])
    assert torch.equal(image, before)


def test_a_sample_is_augmented_alike_in_any_batch():
    augment = AugmentImages(padding=2)
    whole = batch()
    got = augment(whole, VIEWS)["x"]
    order = torch.tensor([5, 0, 7])
    assert torch.equal(augment(whole.select(order), VIEWS)["x"], got[order])


def test_draws_differ_by_epoch_and_seed_and_repeat_when_asked():
    augment = AugmentImages(padding=2)
    data = batch(64)
    got = augment(data, VIEWS)["x"]
    assert torch.equal(got, augment(data, Views(7, epoch=2))["x"])
    assert not torch.equal(got, augment(data, Views(7, epoch=3))["x"])
    assert not torch.equal(got, augment(data, Views(8, epoch=2))["x"])
    # With finitely many draws, epoch 2 of 2 draws is epoch 0.
    assert torch.equal(
        augment(data, Views(7, epoch=2, draws=2))["x"], augment(data, Views(7, epoch=0))["x"]
    )


def test_one_draw_serves_every_view():
    data = batch(32)
    data["mask_image"] = (data["x"][:, 0] * 255).to(torch.uint8)
    got = AugmentImages(padding=3, names=("x", "mask_image"))(data, VIEWS)
    assert torch.equal(got["mask_image"], (got["x"][:, 0] * 255).to(torch.uint8))


def test_switching_flips_off_keeps_the_shifts():
    data = batch(32)
    both = AugmentImages(padding=2, flip=True)(data, VIEWS)["x"]
    crop = AugmentImages(padding=2, flip=False)(data, VIEWS)["x"]
    same = [torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(both, crop)]
    assert all(same)
    assert not torch.equal(both, crop)


def test_all_shifts_occur_about_equally_and_half_is_flipped():
    count = 4000
    marked = torch.zeros(count, 1, 5, 5)
    marked[:, 0, 2, 1] = 1.0
    got = AugmentImages(padding=1)(Batch(id=torch.arange(count), x=marked), VIEWS)["x"]
    rows, columns = got[:, 0].sum(2).argmax(1), got[:, 0].sum(1).argmax(1)
    for shift in (1, 2, 3):
        assert abs((rows == shift).float().mean() - 1 / 3) < 0.03
    # Column 1 moves to 0, 1, 2 or, mirrored, to 4, 3, 2.
    assert abs((columns < 2).float().mean() - 1 / 3) < 0.03
    assert abs((columns > 2).float().mean() - 1 / 3) < 0.03


def test_global_chance_is_left_alone():
    before = torch.get_rng_state()
    AugmentImages()(batch(), VIEWS)
    assert torch.equal(before, torch.get_rng_state())


def test_source_fingerprint_covers_the_augmentation():
    views = {"x": torch.zeros(4, 1, 8, 8)}
    prints = {
        TensorSource(views, augment=augment).fingerprint
        for augment in (
            None,
            AugmentImages(padding=2),
            AugmentImages(padding=3),
            AugmentImages(padding=2, flip=False),
        )
    }
    assert len(prints) == 4


def test_sources_read_augmented_only_with_a_chance():
    source = TensorSource({"x": batch(16)["x"]}, augment=AugmentImages(padding=2))
    rows = torch.arange(16)
    assert torch.equal(source.read(rows, None)["x"], source.views["x"])
    assert not torch.equal(source.read(rows, VIEWS)["x"], source.views["x"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_every_type_is_mirrored_alike(dtype):
    image = (torch.rand(5, 3, 4, 6) * 255).to(dtype)
    mirrored = torch.tensor([True, False, True, True, False])
    expected = torch.where(mirrored[:, None, None, None], image.flip(-1), image)
    assert torch.equal(flipped(image, mirrored), expected)


def test_bytes_and_floats_are_augmented_alike():
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    augment = AugmentImages(padding=2)
    views = {"x": pixels, "target": torch.arange(16), "name": [str(i) for i in range(16)]}
    fast, plain = ImageSource(views, augment=augment), TensorSource(views, augment=augment)
    rows = torch.tensor([3, 3, 15, 0])
    for chance in (None, VIEWS):
        got, expected = fast.read(rows, chance), plain.read(rows, chance)
        assert got.keys() == expected.keys()
        assert torch.equal(got["x"], expected["x"])
        assert torch.equal(got["target"], expected["target"])
        assert got["name"] == expected["name"]
    for seed in (None, 4):
        samples = []
        for source in (fast, plain):
            rng = None if seed is None else torch.Generator().manual_seed(seed)
            samples.append(source[2, rng])
        assert torch.equal(samples[0]["x"], samples[1]["x"])
        assert samples[0]["name"] == samples[1]["name"]
    assert fast.fingerprint == plain.fingerprint
    assert torch.equal(fast.views["x"], pixels)


def test_what_is_no_image_is_refused():
    data = Batch(id=torch.arange(2), x=torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"'x' cannot be augmented.*\(2, 5\)"):
        AugmentImages()(data, VIEWS)
    data = Batch(id=torch.arange(2), x=torch.zeros(2, 1, 4, 4), y=torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="differ in size"):
        AugmentImages(names=("x", "y"))(data, VIEWS)
    with pytest.raises(DataError, match="no view 'z'"):
        AugmentImages(names=("z",))(data, VIEWS)
    with pytest.raises(DataError, match="at least 0"):
        AugmentImages(padding=-1)
