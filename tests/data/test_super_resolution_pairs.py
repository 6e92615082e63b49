from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import Shuffled, read_rows
from stillhouse.clock import Views
from stillhouse.data import open_data
from stillhouse.data.image_files import ImageFiles, decode_image
from stillhouse.data.super_resolution import (
    RandomPatches,
    WholeImages,
    decoded_pairs,
    make_pair,
    open_super_resolution,
    turned,
)
from stillhouse.errors import DataError, RecipeError
from stillhouse.parts.degrade import downscale


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "hr"
    (place / "more").mkdir(parents=True)
    Image.fromarray(photograph(40, 36, 1)).save(place / "b.png")
    Image.fromarray(photograph(33, 50, 2)).save(place / "more" / "c.PNG")
    Image.fromarray(photograph(36, 36, 3)[:, :, 0]).save(place / "a_grey.png")
    (place / "notes.txt").write_text("no image")
    (place / ".hidden.png").write_bytes(b"")
    return place


# Files -------------------------------------------------------------------------------------


def test_images_of_a_folder_and_a_zip_are_found_alike(folder: Path, tmp_path: Path) -> None:
    names = ("a_grey.png", "b.png", os.path.join("more", "c.PNG"))
    assert ImageFiles.find(folder).names == names
    packed = tmp_path / "hr.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    found = ImageFiles.find(packed)
    assert found.names == names
    assert dict(found.read()) == dict(ImageFiles.find(folder).read())
    first, second = decoded_pairs(folder, 2), decoded_pairs(packed, 2)
    assert first.content == second.content
    for i in range(3):
        np.testing.assert_array_equal(first.lr(i), second.lr(i))


def test_grey_transparent_and_deep_images_become_rgb(tmp_path: Path) -> None:
    grey = photograph(8, 9)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    made = decode_image(tmp_path / "grey.png")
    np.testing.assert_array_equal(made, np.repeat(grey[:, :, None], 3, 2))

    rgba = np.concatenate([photograph(8, 9, 4), np.full((8, 9, 1), 7, np.uint8)], axis=2)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "rgba.png"), rgba[:, :, :3])

    deep = grey.astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "deep.png")[:, :, 0], grey)


def test_damaged_images_are_named(folder: Path) -> None:
    (folder / "z.png").write_bytes(b"not a png")
    with pytest.raises(DataError, match=r"z\.png cannot be read as an image"):
        decoded_pairs(folder, 2)
    good = (folder / "b.png").read_bytes()
    (folder / "z.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"z\.png cannot be read as an image"):
        decoded_pairs(folder, 2)


def test_missing_and_empty_places_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or zip"):
        ImageFiles.find(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no images \(\.png"):
        ImageFiles.find(tmp_path)
    (tmp_path / "file.zip").write_text("text")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        ImageFiles.find(tmp_path / "file.zip")


# Pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_pairs_fit_and_are_reduced_as_matlab_does(folder: Path, scale: int) -> None:
    store = decoded_pairs(folder, scale)
    assert store.names == ["a_grey.png", "b.png", os.path.join("more", "c.PNG")]
    for index, name in enumerate(store.names):
        original = decode_image(folder / name)
        height, width = (side - side % scale for side in original.shape[:2])
        np.testing.assert_array_equal(store.hr(index), original[:height, :width])
        expected = original if scale == 1 else downscale(original[:height, :width], scale)
        np.testing.assert_array_equal(store.lr(index), expected)


def test_any_factor_when_the_input_is_enlarged(folder: Path) -> None:
    store = decoded_pairs(folder, 2.5, enlarge=True)
    for index in range(3):
        assert store.lr(index).shape == store.hr(index).shape
        assert not np.array_equal(store.lr(index), store.hr(index))
    with pytest.raises(DataError, match=r"whole number >= 1, not 2\.5"):
        decoded_pairs(folder, 2.5)


def test_given_low_resolution_images_are_used(folder: Path, tmp_path: Path) -> None:
    lr = tmp_path / "lr"
    lr.mkdir()
    for name, size in (("a_greyx2", (18, 18)), ("b_LR", (20, 18)), ("cx2", (16, 25))):
        Image.fromarray(photograph(*size, 9)).save(lr / f"{name}.png")
    store = decoded_pairs(folder, 2, lr=lr)
    np.testing.assert_array_equal(store.lr(1), photograph(20, 18, 9))
    assert store.content != decoded_pairs(folder, 2).content

    Image.fromarray(photograph(16, 24, 9)).save(lr / "cx2.png")
    with pytest.raises(DataError, match="16x24 does not fit 32x50 at scale 2; 16x25 would"):
        decoded_pairs(folder, 2, lr=lr)
    (lr / "cx2.png").unlink()
    with pytest.raises(DataError, match="no low-resolution image for"):
        decoded_pairs(folder, 2, lr=lr)
    Image.fromarray(photograph(16, 25, 9)).save(lr / "cx2.png")
    Image.fromarray(photograph(16, 25, 9)).save(lr / "c_LR.png")
    with pytest.raises(DataError, match="stand for the same image"):
        decoded_pairs(folder, 2, lr=lr)


def test_too_small_images_are_named() -> None:
    with pytest.raises(DataError, match=r"tiny \(2x9\) is too small for scale 3"):
        make_pair(photograph(2, 9), 3, name="tiny")


def test_decoding_happens_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded_pairs(folder, 2)

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("stillhouse.data.super_resolution.decode_image", never)
    assert len(decoded_pairs(folder, 2)) == 3


def test_a_changed_folder_is_decoded_again(folder: Path) -> None:
    before = decoded_pairs(folder, 2)
    Image.fromarray(photograph(40, 36, 77)).save(folder / "b.png")
    after = decoded_pairs(folder, 2)
    assert after.content != before.content
    assert not np.array_equal(after.hr(1), before.hr(1))


def test_a_damaged_cache_is_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected = np.array(decoded_pairs(folder, 2, cache=cache).lr(0))
    pixels = next(cache.glob("*.pixels"))
    pixels.write_bytes(pixels.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        again = decoded_pairs(folder, 2, cache=cache)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(again.lr(0), expected)


# Sources -----------------------------------------------------------------------------------


def test_whole_images_are_read_whole(folder: Path) -> None:
    source = WholeImages(decoded_pairs(folder, 2), 2)
    sample = source[2, torch.Generator()]
    assert sample["x"].shape == (3, 16, 25)
    assert sample["target"].shape == (3, 32, 50)
    assert sample["x"].dtype == torch.float32
    assert 0 <= float(sample["x"].min()) < float(sample["x"].max()) <= 1
    assert source.name_of(1) == "b.png"


def find_patch(image: np.ndarray, patch: torch.Tensor) -> set[tuple[int, int, tuple[bool, ...]]]:
    """All ways in which a patch may have been cut and turned."""
    target = (patch * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    side = target.shape[0]
    ways = [(h, v, t) for h in (False, True) for v in (False, True) for t in (False, True)]
    found = set()
    for y in range(image.shape[0] - side + 1):
        for x in range(image.shape[1] - side + 1):
            for way in ways:
                if np.array_equal(turned(image[y : y + side, x : x + side], *way), target):
                    found.add((y, x, way))
    return found


def test_patches_are_paired_in_place_and_turn(folder: Path) -> None:
    store = decoded_pairs(folder, 2)
    source = RandomPatches(store, 2, 16, repeats=4)
    assert len(source) == 12
    batch = source.read(torch.arange(12), Views(5))
    assert batch["x"].shape == (12, 3, 8, 8)
    assert batch["target"].shape == (12, 3, 16, 16)
    ways = set()
    for row in range(12):
        low = find_patch(store.lr(row % 3), batch["x"][row])
        high = find_patch(store.hr(row % 3), batch["target"][row])
        assert len(low) == len(high) == 1
        ((y, x, way),) = low
        assert high == {(2 * y, 2 * x, way)}
        ways.add(way)
    assert len(ways) >= 4


def test_patches_depend_on_the_chance_alone(folder: Path) -> None:
    source = RandomPatches(decoded_pairs(folder, 2), 2, 16, repeats=4)
    whole = source.read(torch.arange(12), Views(5, epoch=2))
    part = source.read(torch.tensor([7, 3]), Views(5, epoch=2))
    assert torch.equal(part["x"], whole["x"][[7, 3]])
    assert torch.equal(part["id"], torch.tensor([7, 3]))
    assert not torch.equal(source.read(torch.arange(12), Views(5, epoch=3))["x"], whole["x"])
    assert not torch.equal(source.read(torch.arange(12), Views(6, epoch=2))["x"], whole["x"])
    before = torch.random.get_rng_state()
    first = source[3, torch.Generator().manual_seed(1)]
    second = source[3, torch.Generator().manual_seed(1)]
    assert torch.equal(first["target"], second["target"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_turns_are_even_and_places_reach_the_borders(folder: Path) -> None:
    source = RandomPatches(decoded_pairs(folder, 2), 2, 32, repeats=1)
    numbers = torch.cat([Views(1, e).uniform(torch.arange(3), "patch", 5) for e in range(300)])
    assert ((numbers[:, 2:] < 0.5).float().mean(0) - 0.5).abs().max() < 0.06
    store = source.store
    height = store.lr(1).shape[0]
    places = {int(u * (height - 16 + 1)) for u in numbers[:, 0].tolist()}
    assert places == set(range(height - 16 + 1))


def test_without_chance_patches_are_central(folder: Path) -> None:
    store = decoded_pairs(folder, 2)
    source = RandomPatches(store, 2, 16)
    batch = read_rows(source, torch.tensor([1]), None)
    y, x = (20 - 8) // 2, (18 - 8) // 2
    expected = torch.from_numpy(np.array(store.lr(1)[y : y + 8, x : x + 8])).permute(2, 0, 1)
    assert torch.equal(batch["x"][0], expected.float() / 255)
    assert torch.equal(source[1, None]["x"], batch["x"][0])


def test_flips_and_transpose() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(turned(image, True, False, False), image[:, ::-1])
    np.testing.assert_array_equal(turned(image, False, True, False), image[::-1])
    np.testing.assert_array_equal(turned(image, False, False, True), image.swapaxes(0, 1))
    both = turned(turned(image, True, True, True), False, False, True)
    np.testing.assert_array_equal(both, image[::-1, ::-1])


@pytest.mark.parametrize(
    ("patch", "words"),
    [(15, "multiple of 2"), (40, r"'a_grey\.png' \(36x36\) is smaller than a patch of 40")],
)
def test_patches_that_do_not_fit_are_told(folder: Path, patch: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        RandomPatches(decoded_pairs(folder, 2), 2, patch)


# Splits ------------------------------------------------------------------------------------


def test_held_out_images_are_whole_and_not_trained_on(folder: Path) -> None:
    splits = open_super_resolution(folder, patch=16, val=1, repeats=3, test=folder)
    assert len(splits["train"]) == 6
    assert len(splits["val"]) == 1
    held = int(splits["val"].rows[0])
    assert held not in splits["train"].rows
    assert (
        splits["val"][0, None]["target"].shape[1:] == splits["val"].source.store.hr(held).shape[:2]
    )
    assert splits.peek("test") == 3
    assert splits.about["scale"] == 2
    assert splits.about["input"] == (3, 8, 8)
    again = open_super_resolution(folder, patch=16, val=1, repeats=3, test=folder)
    assert again.fingerprint() == splits.fingerprint() == splits.about["hash"]
    other = open_super_resolution(folder, patch=20, val=1, repeats=3, test=folder)
    assert other.fingerprint() != splits.fingerprint()
    with pytest.raises(DataError, match=r"cannot hold out 3 of 3 images of .* for 'val'"):
        open_super_resolution(folder, patch=16, val=3)


def test_enlarged_input_has_scale_one(folder: Path) -> None:
    splits = open_super_resolution(folder, scale=1.5, enlarge=True, patch=16)
    assert splits.about["scale"] == 1
    assert splits.about["factor"] == 1.5
    batch = splits["train"].read(torch.arange(3), Views(0))
    assert batch["x"].shape == batch["target"].shape == (3, 3, 16, 16)


def test_patches_go_through_an_order(folder: Path) -> None:
    splits = open_super_resolution(folder, patch=16, repeats=4)
    order = Shuffled(splits["train"], 5)
    rows = order.epoch(0, lambda: torch.Generator().manual_seed(0))
    batch = order.read(rows[0], Views(3))
    assert batch["x"].shape == (5, 3, 8, 8)
    assert torch.equal(batch["id"], rows[0])


def test_own_photographs_by_name(folder: Path) -> None:
    options = {"images": str(folder), "patch": 16, "held_out_test": 1, "repeats": 2}
    splits = open_data("photographs", options={**options, "held_out": 1})
    assert len(splits["train"]) == 2
    parts = [splits["val"].rows.tolist(), splits.judging()["test"].rows.tolist()]
    assert sorted([*parts[0], *parts[1], *splits["train"].rows]) == [0, 1, 2]
    splits = open_data("photographs", options=options)
    assert len(splits["train"]) == 4
    with pytest.raises(DataError, match="either 'test_images'"):
        open_data("photographs", options={"images": str(folder), "patch": 16})
    seven = open_data("photographs", options=options, seed=7)
    assert seven.fingerprint() == splits.fingerprint()
    with pytest.raises(RecipeError, match="needs the option 'images'"):
        open_data("photographs")
    with pytest.raises(DataError, match="either 'held_out' or 'val_images'"):
        open_data("photographs", options={**options, "held_out": 1, "val_images": str(folder)})
    with pytest.raises(DataError, match="no such folder or zip"):
        open_data("photographs", options={"images": "absent", "held_out_test": 1})


def test_bsd100_and_set5(data_root: Path) -> None:
    splits = open_data("bsd100", options={"repeats": 2})
    assert len(splits["train"]) == 160
    assert len(splits["val"]) == 20
    with pytest.raises(DataError, match="opens only"):
        splits["test"]
    test = splits.judging()["test"]
    assert len(test) == 5
    baby = test[0, None]
    assert baby["target"].shape == (3, 512, 512)
    assert baby["x"].shape == (3, 256, 256)
    assert open_data("set5").judging()["test"].fingerprint == test.fingerprint
    train = splits["train"]
    assert not set(train.rows) & set(splits["val"].rows.tolist())


def test_reduction_of_set5_is_the_published_one(data_root: Path, golden) -> None:
    case = golden("imdn").case("bicubic")
    test = open_data("set5").judging()["test"]
    wanted, side = case["hr"], case["lr_dataset"]
    for index in range(5):
        hr = test.store.hr(index)
        rows, columns = np.nonzero(
            (hr[:, :, 0] == wanted[0, 0, 0]) & (hr[:, :, 1] == wanted[0, 0, 1])
        )
        for y, x in zip(rows.tolist(), columns.tolist(), strict=True):
            if np.array_equal(hr[y : y + wanted.shape[0], x : x + wanted.shape[1]], wanted):
                lr = test.store.lr(index)[y // 2 :, x // 2 :][: side.shape[0], : side.shape[1]]
                np.testing.assert_array_equal(lr, side)
                return
    pytest.fail("the crop of the reference vectors is in none of the five images")


def test_missing_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"super_resolution/bsd100_hr\.zip") as caught:
        open_data("bsd100")
    assert "how to get it" in str(caught.value)
