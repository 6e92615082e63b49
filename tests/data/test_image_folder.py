from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.batch import read_rows
from stillhouse.clock import Views
from stillhouse.data import image_folder, open_data
from stillhouse.errors import DataError, RecipeError


def picture(path: pathlib.Path, *, size=(20, 12), seed=0, mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "pets"
    for number in range(12):
        picture(root / "cat" / f"{number:02d}.png", seed=number)
        picture(root / "dog" / "deep" / f"{number:02d}.jpg", seed=100 + number, size=(9, 14))
    (root / "dog" / "notes.txt").write_text("not an image")
    (root / ".hidden").mkdir()
    return root


def opened(folder: pathlib.Path, **options):
    return open_data(
        "image_folder", seed=0, options={"path": str(folder), "image_size": 8, **options}
    )


def test_classes_shapes_and_splits(folder):
    splits = opened(folder, val=4)
    assert splits.about["classes"] == ["cat", "dog"]
    assert splits.about["input"] == [3, 8, 8]
    assert {r: splits.peek(r) for r in splits} == {"train": 15, "test": 5, "val": 4}
    batch = read_rows(splits["train"], torch.arange(15), None)
    assert batch["x"].shape == (15, 3, 8, 8)
    assert 0 <= float(batch["x"].min()) < float(batch["x"].max()) <= 1
    assert set(batch["target"].tolist()) == {0, 1}
    assert splits.about["hash_of"] == "content"


def test_split_folders_are_used(folder, tmp_path):
    for role in ("train", "valid", "test"):
        shutil.copytree(folder, tmp_path / "set" / role)
    splits = opened(tmp_path / "set")
    assert {r: splits.peek(r) for r in splits} == {"train": 24, "val": 24, "test": 24}
    picture(tmp_path / "set" / "test" / "bird" / "a.png")
    with pytest.raises(DataError, match="train has no class 'bird'"):
        opened(tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "test" / "bird")
    with pytest.raises(RecipeError, match=r"'test'.*has a test split"):
        opened(tmp_path / "set", test=3)
    shutil.rmtree(tmp_path / "set" / "train")
    with pytest.raises(DataError, match="no 'train'"):
        opened(tmp_path / "set")


def test_the_centre_is_cut_out_without_augmentation(folder):
    path = folder / "cat" / "00.png"
    splits = opened(folder, val=0, image_size=12)
    source = splits["train"]
    row = source.files.index(path) if path in source.files else None
    if row is None:
        source = splits.judging()["test"]
        row = source.files.index(path)
    whole = np.asarray(Image.open(path))
    expected = torch.from_numpy(whole[:, 4:16].copy()).permute(2, 0, 1) / 255.0
    assert torch.allclose(source[row, None]["x"], expected, atol=1e-6)


def test_reading_does_not_depend_on_batch_or_threads(folder):
    views = Views(3, epoch=1)
    splits = opened(folder, val=0, augment="crop+flip")
    threads = opened(folder, val=0, augment="crop+flip", workers=3)
    whole = read_rows(splits["train"], torch.arange(19), views)
    order = torch.tensor([7, 0, 7])
    for source in (splits["train"], threads["train"]):
        part = read_rows(source, order, views)
        assert torch.equal(part["x"], whole["x"][order])
        assert torch.equal(part["id"], whole["id"][order])
    assert not torch.equal(read_rows(splits["train"], order, None)["x"], whole["x"][order])
    assert not torch.equal(read_rows(splits["train"], order, Views(3, 2))["x"], whole["x"][order])
    assert splits.fingerprint() == threads.fingerprint()


def test_single_samples_are_augmented_by_their_generator(folder):
    source = opened(folder, val=0, augment="crop")["train"]

    def sample(seed):
        return source[2, torch.Generator().manual_seed(seed)]["x"]

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_crops_stay_inside_and_keep_their_share(folder):
    source = opened(folder, val=0, augment="crop", crop_area=0.5)["train"]
    rng = np.random.default_rng(0)
    shares = []
    for numbers in rng.random((500, 5)):
        left, top, right, bottom = source._box((40, 30), numbers.tolist())
        assert 0 <= left < right <= 40 + 1e-9
        assert 0 <= top < bottom <= 30 + 1e-9
        shares.append((right - left) * (bottom - top) / 1200)
    # Only parts that would reach over the border are smaller than asked for.
    assert min(shares) > 0.4
    assert max(shares) <= 1 + 1e-9


def test_ids_follow_the_file_not_its_position(folder):
    first = opened(folder, val=0)["train"]
    known = dict(zip(first.files, first.ids.tolist()))
    assert len(set(known.values())) == len(known)
    picture(folder / "cat" / "000_first.png", seed=5)
    second = opened(folder, val=0)["train"]
    shared = [f for f in second.files if f in known]
    assert len(shared) > 10
    assert all(known[f] == second.id_of(second.files.index(f)) for f in shared)
    assert first.fingerprint != second.fingerprint


def test_hash_and_fingerprint_follow_the_content(folder):
    before = opened(folder)
    path = folder / "dog" / "deep" / "03.jpg"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1  # of the same length
    path.write_bytes(content)
    after = opened(folder)
    assert before.about["hash"] != after.about["hash"]
    assert before.fingerprint() != after.fingerprint()


def test_large_folders_are_hashed_by_their_heads(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "_WHOLE", 100)
    assert "the first 65536 bytes" in opened(folder).about["hash_of"]


def test_grey_reading(folder):
    splits = opened(folder, channels=1, val=0)
    assert read_rows(splits["train"], torch.arange(2), None)["x"].shape == (2, 1, 8, 8)
    assert len(splits.about["mean"]) == len(splits.about["std"]) == 1


def test_a_subset_of_classes_and_labels(folder):
    picture(folder / "bird" / "a.png")
    picture(folder / "bird" / "b.png")
    splits = opened(folder, classes=["dog", "cat"], per_class=6, val=0, label_fraction=0.5)
    assert splits.about["classes"] == ["dog", "cat"]
    assert (splits.peek("train"), splits.peek("unlabelled")) == (6, 6)
    batch = read_rows(splits["unlabelled"], torch.arange(6), Views(0))
    assert "target" not in batch


def test_unreadable_images_are_told_by_path_before_training(folder):
    (folder / "cat" / "05.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cat/05\.png cannot be read as an image"):
        opened(folder)


def test_images_that_break_are_told_by_path(folder):
    source = opened(folder, val=0)["train"]
    path = source.files[3]
    path.write_bytes(path.read_bytes()[:200])  # the header is whole, the pixels are not
    with pytest.raises(DataError, match=rf"{path.name} cannot be read as an image"):
        source[3, None]
    # The first rows are read when the data is opened.
    with pytest.raises(DataError, match=rf"{path.name} cannot be read as an image"):
        opened(folder, val=0)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ("none", {"path": "/no/such/folder"}, DataError, "no folder /no/such/folder"),
        ("none", {"resize": 6}, RecipeError, "shorter side of 6 is smaller than the image_size"),
        ("none", {"colour": 1}, RecipeError, "no option 'colour'"),
        ("empty class", {}, DataError, r"emu holds no images \(\.png"),
        ("one class", {}, DataError, "1 folders; one folder per class"),
    ],
)
def test_what_cannot_be_is_told(folder, change, options, error, message):
    if change == "empty class":
        (folder / "emu").mkdir()
    if change == "one class":
        shutil.rmtree(folder / "dog")
    with pytest.raises(error, match=message):
        opened(folder, **options)
    with pytest.raises(RecipeError, match="needs the option 'path'"):
        open_data("image_folder", seed=0)


def test_labels_by_a_list_of_files(folder):
    """A list of the images that keep their labels; validation is carved off the others."""
    root, place = folder.parent / "set", folder.parent / "few.txt"
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "test")
    place.write_text("cat/00.png\ndeep/03.jpg\n")
    splits = opened(root, val=4, label_list=str(place))
    counts = {"train": 2, "unlabelled": 18, "val": 4, "test": 24}
    assert {role: splits.peek(role) for role in splits} == counts
    found = read_rows(splits["train"], torch.arange(2), None)
    assert found["target"].tolist() == [0, 1]
    assert "target" not in read_rows(splits["unlabelled"], torch.arange(2), None)
    place.write_text("cat/77.png")
    with pytest.raises(DataError, match=r"'cat/77.png' is no row of image_folder train"):
        opened(root, label_list=str(place))
    with pytest.raises(RecipeError, match="label_fraction and label_list both say"):
        opened(root, label_list=str(place), label_fraction=0.5)
