"""digits, cifar10, fashion_mnist, mnist5k, digit_pairs: on the real root, and converted."""

from __future__ import annotations

import io
import pathlib
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import read_rows
from stillhouse.clock import Views
from stillhouse.data import cifar10, digits, fashion_mnist, image_arrays, mnist5k, open_data
from stillhouse.data.image_arrays import moments, resized
from stillhouse.data.roots import cache_root
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError

SMALL_CIFAR = {"subset": {"train": 60, "test": 20}, "val": 10}


def read(splits, role, rows, views=None):
    return read_rows(splits[role], torch.tensor(rows), views)


# Real data ---------------------------------------------------------------------------------


def test_digits_need_no_root(monkeypatch):
    monkeypatch.delenv("STILLHOUSE_DATA", raising=False)
    splits = open_data("digits", seed=0)
    assert {role: splits.peek(role) for role in splits} == {"train": 1293, "val": 144, "test": 360}
    assert splits.about["input"] == [1, 8, 8]
    assert splits.about["classes"] == list("0123456789")
    batch = read(splits, "train", [0, 1])
    assert batch["x"].shape == (2, 1, 8, 8)
    assert float(batch["x"].max()) == 1.0
    mean, std = moments(splits["train"].source.views["x"])
    assert splits.about["mean"] == mean
    assert splits.about["std"] == std
    opened = splits.judging()["test"]
    assert torch.bincount(labels_of(opened)).min() >= 34
    # The test split does not move with the seed.
    assert opened.fingerprint == open_data("digits", seed=9).judging()["test"].fingerprint


def test_digits_are_those_of_load_digits_with_every_grey_level(monkeypatch):
    from sklearn.datasets import load_digits

    table = digits.embedded_table()
    images, labels = load_digits(return_X_y=True)
    assert np.array_equal(table[:, :-1], images)
    assert np.array_equal(table[:, -1], labels)
    first = open_data("digits", seed=0, options={"val": 0})
    assert torch.equal(
        (first["train"].views["x"].double() * 16 / 255).round().to(torch.uint8).unique(),
        torch.arange(17, dtype=torch.uint8),
    )
    # Where the package keeps its file elsewhere, the public function gives the same.
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    assert open_data("digits", seed=0, options={"val": 0}).fingerprint() == first.fingerprint()


def test_cifar10_of_the_root(data_root):
    started = time.perf_counter()
    splits = open_data("cifar10", seed=0, options=SMALL_CIFAR)
    assert time.perf_counter() - started < 20
    assert splits.edition == "cifar10 (jpeg copy)"
    assert {role: splits.peek(role) for role in splits} == {"train": 50, "val": 10, "test": 20}
    assert splits.about["input"] == [3, 32, 32]
    assert splits.about["classes"][3] == "cat"
    assert splits.about["selection"] == (
        "60 of 50,000 train rows, 20 of 10,000 test rows, subset seed 0"
    )
    batch = read(splits, "train", [0, 7])
    with np.load(data_root / "cifar10" / "cifar10_jpg.npz", allow_pickle=False) as stored:
        blob, offsets = stored["train_blob"], stored["train_off"]
        for row, number in enumerate(batch["id"].tolist()):
            piece = blob[offsets[number] : offsets[number + 1]].tobytes()
            pixels = np.asarray(Image.open(io.BytesIO(piece)))
            expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255.0
            assert torch.allclose(batch["x"][row], expected)
            assert int(batch["target"][row]) == int(stored["train_labels"][number])
    # A small part is decoded alone and leaves nothing behind.
    assert not (cache_root() / "decoded").exists()


def test_cifar10_mean_and_std_are_those_of_the_data(data_root):
    splits = open_data("cifar10", seed=0, options={"subset": {"train": 500, "test": 10}, "val": 0})
    mean, std = moments(splits["train"].views["x"])
    assert np.allclose(mean, splits.about["mean"], atol=0.03)
    assert np.allclose(std, splits.about["std"], atol=0.03)


def test_cifar10_test_ids_are_not_train_ids(data_root):
    splits = open_data("cifar10", seed=0, options=SMALL_CIFAR).judging()
    ids = torch.cat([read(splits, r, range(splits.peek(r)))["id"] for r in splits])
    assert len(ids.unique()) == 80
    assert int(read(splits, "test", range(20))["id"].min()) >= 50_000


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("digits", {"augment": "crop"}, (1, 8, 8)),
        ("mnist5k", {"augment": True, "subset": 200}, (1, 28, 28)),
        ("fashion_mnist", {"augment": "crop+flip", "per_class": 20}, (1, 28, 28)),
        ("cifar10", {"augment": True, **SMALL_CIFAR}, (3, 32, 32)),
        ("digit_pairs", {"augment": "crop", "subset": 300}, (1, 28, 56)),
    ],
)
def test_reading_does_not_depend_on_the_batch(data_root, name, options, shape):
    splits = open_data(name, seed=0, options=options)
    views = Views(3, epoch=1)
    whole = read(splits, "train", range(40), views)
    assert whole["x"].shape[1:] == shape
    order = [31, 2, 2, 17]
    part = read(splits, "train", order, views)
    for key in ("x", "id", "target"):
        assert torch.equal(part[key], whole[key][torch.tensor(order)])
    again = read(open_data(name, seed=0, options=options), "train", range(40), views)
    assert torch.equal(again["x"], whole["x"])
    plain = read(splits, "train", range(40))
    assert not torch.equal(plain["x"], whole["x"])
    assert float(whole["x"].min()) >= 0
    assert float(whole["x"].max()) <= 1


@pytest.mark.parametrize("name", ["mnist5k", "fashion_mnist"])
def test_grey_sets_of_the_root(data_root, name):
    splits = open_data(name, seed=0)
    with np.load(data_root / name / f"{name}.npz", allow_pickle=False) as stored:
        rows = stored["train_images"].shape[0]
        assert splits.peek("train") + splits.peek("val") == rows
        assert splits.peek("test") == len(stored["test_labels"])
        batch = read(splits, "train", range(5))
        for image, number, target in zip(batch["x"], batch["id"], batch["target"]):
            assert torch.allclose(image[0], torch.tensor(stored["train_images"][number]) / 255)
            assert int(target) == int(stored["train_labels"][number])
    mean, std = moments(splits["train"].source.views["x"])
    assert np.allclose(mean, splits.about["mean"], atol=0.02)
    assert np.allclose(std, splits.about["std"], atol=0.02)
    assert "own copy" not in splits.edition


def test_image_size_channels_and_classes(data_root):
    options = {"image_size": 14, "channels": 3, "classes": [7, 2], "per_class": 30}
    splits = open_data("mnist5k", seed=0, options=options)
    assert splits.about["input"] == [3, 14, 14]
    assert len(splits.about["mean"]) == 3
    assert splits.about["classes"] == ["7", "2"]
    batch = read(splits, "train", range(4))
    assert batch["x"].shape == (4, 3, 14, 14)
    assert torch.equal(batch["x"][:, 0], batch["x"][:, 2])


def test_digit_pairs_are_pairs_of_unshared_digits(data_root):
    splits = open_data("digit_pairs", seed=0).judging()
    sizes = {role: splits.peek(role) for role in splits}
    assert sizes == {"train": 10_000, "val": 1_000, "test": 2_000}
    assert torch.bincount(labels_of(splits["train"])).tolist() == [100] * 100
    assert splits.about["classes"][37] == "37"
    with np.load(data_root / "mnist5k" / "mnist5k.npz", allow_pickle=False) as stored:
        known = {
            image.tobytes(): int(label)
            for image, label in zip(stored["train_images"], stored["train_labels"])
        }
    halves = {}
    for role in ("train", "val"):
        views = splits[role].views
        pixels = views["x"].numpy()[:, 0]
        sides = [[np.ascontiguousarray(p[:, :28]).tobytes() for p in pixels]]
        sides.append([np.ascontiguousarray(p[:, 28:]).tobytes() for p in pixels])
        for place, (left, right) in enumerate(zip(*sides)):
            assert 10 * known[left] + known[right] == int(views["target"][place])
        halves[role] = set(sides[0]) | set(sides[1])
    assert not halves["train"] & halves["val"]
    # Another pair seed makes other pairs, another run's seed does not.
    same = open_data("digit_pairs", seed=5).fingerprint()
    assert same == splits.fingerprint()
    other = open_data("digit_pairs", seed=0, options={"pair_seed": 1})
    assert other.fingerprint() != same


# Content, copies, damage -------------------------------------------------------------------


def fake_cifar(rng: np.random.Generator, count: int = 40):
    return {
        role: (
            rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            np.arange(count) % 10,
        )
        for role in ("train", "test")
    }


@pytest.fixture
def own_root(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    for name in ("cifar10", "fashion_mnist", "mnist5k"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_converted_cifar10_is_lossless_and_named(own_root):
    made = fake_cifar(np.random.default_rng(0))
    cifar10.convert(made, own_root / "cifar10" / "cifar10_png.npz")
    splits = open_data("cifar10", seed=0, options={"val": 0})
    assert splits.edition == "cifar10 (original pixels)"
    expected = torch.from_numpy(made["train"][0]).permute(0, 3, 1, 2)
    assert torch.equal(splits["train"].views["x"], expected)
    assert labels_of(splits["train"]).tolist() == made["train"][1].tolist()


def test_whole_splits_are_decoded_once_and_checked(own_root, monkeypatch):
    cifar10.convert(fake_cifar(np.random.default_rng(0)), own_root / "cifar10" / "cifar10_png.npz")
    first = open_data("cifar10", seed=0, options={"val": 0})
    kept = sorted((cache_root() / "decoded").iterdir())
    assert len(kept) == 2

    def no_decoding(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(image_arrays, "decoded", no_decoding)
        again = open_data("cifar10", seed=0, options={"val": 0})
        part = open_data("cifar10", seed=0, options={"val": 0, "subset": {"train": 5}})
    assert first.fingerprint() == again.fingerprint()
    row = int(part["train"].ids[2])
    assert torch.equal(part["train"].views["x"][2], first["train"].views["x"][row])
    content = bytearray(kept[0].read_bytes())
    content[-5] ^= 1
    kept[0].write_bytes(content)
    assert open_data("cifar10", seed=0, options={"val": 0}).fingerprint() == first.fingerprint()


def test_fingerprint_and_hash_follow_the_content(own_root):
    path = own_root / "cifar10" / "cifar10_png.npz"
    made = fake_cifar(np.random.default_rng(0))
    cifar10.convert(made, path)
    first = open_data("cifar10", seed=0)
    made["train"][0][3, 5, 5, 0] ^= 1
    cifar10.convert(made, path)
    second = open_data("cifar10", seed=0)
    assert first.about["hash"] != second.about["hash"]
    assert first["train"].fingerprint != second["train"].fingerprint


def test_an_undecodable_image_is_told_by_row(own_root):
    path = own_root / "cifar10" / "cifar10_png.npz"
    cifar10.convert(fake_cifar(np.random.default_rng(0)), path)
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["train_blob"] = arrays["train_blob"].copy()
    start = arrays["train_off"][7]
    arrays["train_blob"][start : start + 8] = 0
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"cifar10_png\.npz, train: image 7 cannot be decoded"):
        open_data("cifar10", seed=0)


def test_damaged_files_are_told(own_root, data_root, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(own_root))
    path = own_root / "mnist5k" / "mnist5k.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"mnist5k\.npz cannot be read as an npz file"):
        open_data("mnist5k", seed=0)
    shutil.copy(data_root / "mnist5k" / "mnist5k.npz", path)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:300_000])
    with pytest.raises(DataError, match=r"mnist5k\.npz"):
        open_data("mnist5k", seed=0)
    np.savez(path, train_images=np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(DataError, match="has no array 'train_labels'; it holds train_images"):
        open_data("mnist5k", seed=0)


@pytest.mark.parametrize(
    ("labels", "images", "message"),
    [
        (np.array([0, 1, 2, 12]), None, "row 3: the label 12 is out of range; there are 10"),
        (np.array([0, 1, 2]), None, r"4 images but labels of shape \(3,\)"),
        (np.arange(4), np.zeros((4, 28, 28), np.float32), "float32 of shape"),
    ],
)
def test_wrong_content_is_told(own_root, labels, images, message):
    images = np.zeros((4, 28, 28), np.uint8) if images is None else images
    arrays = {
        "train_images": images, "train_labels": labels,
        "test_images": np.zeros((4, 28, 28), np.uint8), "test_labels": np.arange(4),
    }  # fmt: skip
    np.savez(own_root / "fashion_mnist" / "fashion_mnist.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data("fashion_mnist", seed=0)


def test_one_class_is_refused(own_root):
    arrays = {}
    for role in ("train", "test"):
        arrays[f"{role}_images"] = np.zeros((30, 28, 28), np.uint8)
        arrays[f"{role}_labels"] = np.full(30, 4)
    np.savez(own_root / "fashion_mnist" / "fashion_mnist.npz", **arrays)
    with pytest.raises(DataError, match="labels are 4; at least two classes"):
        open_data("fashion_mnist", seed=0)


def test_converted_fashion_mnist_round_trip(own_root):
    rng = np.random.default_rng(1)
    made = {
        role: (rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10)
        for role in ("train", "test")
    }
    fashion_mnist.convert(made, own_root / "fashion_mnist" / "fashion_mnist.npz")
    splits = open_data("fashion_mnist", seed=0, options={"val": 0})
    assert splits.edition == "fashion_mnist (whole, 30 + 30)"
    assert np.array_equal(splits["train"].views["x"][:, 0].numpy(), made["train"][0])


def test_converted_mnist_is_balanced_and_fixed(own_root):
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat(np.arange(10), 520))
    images = rng.integers(0, 256, (5200, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = labels
    path = own_root / "mnist5k" / "mnist5k.npz"
    mnist5k.convert(images, labels, path, origin="of the test")
    splits = open_data("mnist5k", seed=0, options={"val": 0}).judging()
    assert splits.edition == "mnist5k (of the test)"
    assert torch.bincount(labels_of(splits["train"])).tolist() == [400] * 10
    assert torch.bincount(labels_of(splits["test"])).tolist() == [100] * 10
    train = splits["train"].views
    assert torch.equal(train["x"][:, 0, 0, 0].long(), train["target"])
    before = path.read_bytes()
    mnist5k.convert(images, labels, path, origin="of the test")
    assert open_data("mnist5k", seed=0, options={"val": 0}).fingerprint() == splits.fingerprint()
    assert len(before) == len(path.read_bytes())


# Sizes and colours -------------------------------------------------------------------------


def test_whole_factors_are_block_means():
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    got = resized(images, 4, None)
    blocks = images.double().view(3, 1, 4, 2, 4, 2).mean((3, 5))
    assert torch.equal(got, blocks.round().to(torch.uint8))
    assert resized(images, 8, None).data_ptr() == images.data_ptr()
    assert resized(images, 5, None).shape == (3, 1, 5, 5)


def test_grey_and_colour():
    colour = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    grey = resized(colour, None, 1)
    for row in range(2):
        pillow = Image.fromarray(colour[row].permute(1, 2, 0).numpy()).convert("L")
        difference = grey[row, 0].int() - torch.from_numpy(np.array(pillow)).int()
        assert int(difference.abs().max()) <= 1
    again = resized(grey, None, 3)
    assert torch.equal(again, grey.repeat(1, 3, 1, 1))


def test_moments_equal_a_direct_computation():
    images = torch.randint(0, 256, (50, 3, 5, 4), dtype=torch.uint8)
    mean, std = moments(images)
    values = images.double() / 255
    assert np.allclose(mean, values.mean((0, 2, 3)), atol=1e-6)
    assert np.allclose(std, values.std((0, 2, 3), unbiased=False), atol=1e-6)
    assert moments(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)) == ([0.0], [1.0])
