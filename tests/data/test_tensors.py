from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stillhouse.batch import read_rows
from stillhouse.clock import Views
from stillhouse.data import open_data
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError, RecipeError

RNG = np.random.default_rng(0)


def write(tmp_path, **arrays):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    return path


def opened(path, seed=0, **options):
    return open_data("tensors", seed=seed, options={"path": str(path), **options})


def images(count=40, dtype=np.uint8):
    return RNG.integers(0, 256, (count, 8, 8, 3)).astype(dtype)


def test_images_in_either_order(tmp_path):
    x = images()
    labels = np.arange(40) % 4
    path = write(
        tmp_path,
        train_images=x,
        train_labels=labels,
        test_x=x.transpose(0, 3, 1, 2),
        test_y=labels,
        classes=np.array(["a", "b", "c", "d"]),
    )
    splits = opened(path, val=0, augment="crop+flip").judging()
    assert splits.about["classes"] == ["a", "b", "c", "d"]
    assert splits.about["input"] == [3, 8, 8]
    train = read_rows(splits["train"], torch.arange(40), None)
    test = read_rows(splits["test"], torch.arange(40), None)
    assert torch.equal(train["x"], test["x"])
    assert float(train["x"].max()) <= 1
    assert np.allclose(splits.about["mean"], x.mean((0, 1, 2)) / 255, atol=1e-5)
    augmented = read_rows(splits["train"], torch.arange(40), Views(0))
    assert not torch.equal(augmented["x"], train["x"])
    assert torch.equal(read_rows(splits["test"], torch.arange(40), Views(0))["x"], test["x"])


def test_whole_numbers_of_a_sensor_are_series(tmp_path):
    raw = RNG.integers(-16384, 16384, (40, 6, 30)).astype(np.int16)
    path = write(
        tmp_path,
        train_x=raw,
        train_other=raw[:, :2],
        train_clip=images()[:, None],
        train_y=[0, 1] * 20,
    )
    splits = opened(path, test=0.25, val=0)
    batch = read_rows(splits["train"], torch.arange(30), None)
    assert batch["x"].dtype == batch["other"].dtype == torch.float32
    assert splits.about["input"] == [6, 30]
    told = splits.about["views"]
    for view in ("x", "other"):
        own = batch[view].double()
        assert np.allclose(told[view]["mean"], own.mean((0, 2)))
        assert np.allclose(told[view]["std"], own.std((0, 2), correction=0))
    assert told["clip"] == {}


def test_grey_images_get_a_channel(tmp_path):
    path = write(tmp_path, images=images()[..., 0], labels=np.arange(40) % 2)
    assert opened(path).about["input"] == [1, 8, 8]


def test_vectors_and_tokens(tmp_path):
    path = write(tmp_path, x=RNG.normal(size=(50, 6)), target=np.arange(50) % 3)
    splits = opened(path)
    assert {r: splits.peek(r) for r in splits} == {"train": 36, "val": 4, "test": 10}
    assert splits.about["classes"] == ["0", "1", "2"]
    assert "mean" not in splits.about
    assert read_rows(splits["train"], torch.arange(3), None)["x"].dtype == torch.float32
    path = write(tmp_path, x=RNG.integers(0, 9, (50, 6)), target=np.arange(50) % 3)
    assert read_rows(opened(path)["train"], torch.arange(3), None)["x"].dtype == torch.int64


def test_the_test_rows_do_not_move_with_the_seed(tmp_path):
    path = write(tmp_path, x=RNG.normal(size=(50, 6)), target=np.arange(50) % 3)
    first, second = opened(path, seed=0).judging(), opened(path, seed=1).judging()
    assert first["test"].fingerprint == second["test"].fingerprint
    assert first["val"].fingerprint != second["val"].fingerprint


def test_safetensors_with_names_and_further_views(tmp_path):
    path = tmp_path / "mine.safetensors"
    arrays = {
        "train_x": torch.rand(20, 4, dtype=torch.float16),
        "train_weak": torch.rand(20, 4),
        "train_target": torch.arange(20, dtype=torch.int32) % 2,
        "unlabelled_x": torch.rand(7, 4),
        "val_x": torch.rand(6, 4),
        "val_target": torch.arange(6) % 2,
        "test_x": torch.rand(6, 4),
        "test_target": torch.arange(6) % 2,
    }
    save_file(arrays, path, metadata={"classes": json.dumps(["no", "yes"])})
    splits = opened(path)
    assert splits.about["classes"] == ["no", "yes"]
    assert {r: splits.peek(r) for r in splits} == {
        "train": 20, "val": 6, "test": 6, "unlabelled": 7,
    }  # fmt: skip
    batch = read_rows(splits["train"], torch.arange(3), None)
    assert set(batch) == {"id", "draw", "x", "weak", "target"}
    assert batch["x"].dtype == torch.float32
    assert "target" not in read_rows(splits["unlabelled"], torch.arange(3), None)


def test_targets_that_are_no_classes_pass_through(tmp_path):
    path = write(tmp_path, x=RNG.normal(size=(50, 6)), target=RNG.normal(size=(50, 2)))
    splits = opened(path, subset=30)
    assert "classes" not in splits.about
    assert splits.peek("train") + splits.peek("val") == 30
    assert read_rows(splits["train"], torch.arange(3), None)["target"].dtype == torch.float32
    with pytest.raises(RecipeError, match=r"'per_class': .*has no class labels"):
        opened(path, per_class=3)


def test_subsets_and_classes(tmp_path):
    path = write(tmp_path, x=RNG.normal(size=(60, 2)), target=np.arange(60) % 3)
    splits = opened(path, classes=[2, 0], per_class=10, val=0)
    assert torch.bincount(labels_of(splits["train"])).tolist() == [10, 10]


def test_hash_and_fingerprint_follow_the_content(tmp_path):
    x = RNG.normal(size=(50, 6))
    first = opened(write(tmp_path, x=x, target=np.arange(50) % 3))
    x[7, 1] += 1
    second = opened(write(tmp_path, x=x, target=np.arange(50) % 3))
    assert first.about["hash"] != second.about["hash"]
    assert first.fingerprint() != second.fingerprint()


NAN = RNG.normal(size=(20, 2))
NAN[13, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": NAN, "y": np.arange(20) % 2},
            r"mine\.npz, split 'train', view 'x', row 13: holds nan",
        ),
        ({"x": np.zeros((20, 2)), "y": np.zeros(20, int)}, "all 20 labels are 0; at least two"),
        ({"x": np.zeros((20, 2)), "y": np.arange(20) - 1}, "row 0: the label -1 is out of range"),
        (
            {"x": np.zeros((20, 2)), "y": np.arange(20) % 3, "classes": np.array(["a", "b"])},
            "row 2: the label 2 is out of range; there are 2 classes",
        ),
        (
            {"train_x": np.zeros((9, 2)), "train_y": np.arange(9) % 2,
             "test_x": np.zeros((9, 2)), "test_y": np.arange(9)},
            "split 'test', row 2: the label 2",
        ),
        ({"x": np.zeros((20, 2)), "y": np.arange(19)}, "differ in length"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "it is empty"),
        (
            {"train_xs": np.zeros((4, 2)), "train_y": np.arange(4)},
            "no array 'train_x'; did you mean 'train_xs'",
        ),
        ({"test_x": np.zeros((4, 2))}, "no training data"),
        ({"x": np.array(["a", "b"])}, "holds <U1, no numbers"),
        (
            {"train_x": np.zeros((9, 2)), "test_x": np.zeros((9, 3))},
            r"split 'test': x is \(3,\) a row, train has \(2,\)",
        ),
        ({"x": np.zeros((4, 2)), "images": np.zeros((4, 2))}, "second array for the view 'x'"),
        ({"x": np.zeros((4, 2)), "y": np.arange(4) % 2, "train_y": np.arange(4)}, "second array"),
    ],
)  # fmt: skip
def test_unusable_files_are_told(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path, **arrays))


def test_other_mistakes(tmp_path):
    path = write(tmp_path, x=np.zeros((20, 2)), y=np.arange(20) % 2, test_x=np.zeros((4, 2)))
    with pytest.raises(RecipeError, match=r"'test'.*has a test split"):
        opened(path, test=5)
    with pytest.raises(RecipeError, match=r"'augment': .*no images but \(20, 2\)"):
        opened(path, augment="crop")
    (tmp_path / "pickled.npz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pickled\.npz cannot be read"):
        opened(tmp_path / "pickled.npz")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.npz or \.safetensors file is needed"):
        opened(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match=r"b\.safetensors cannot be read"):
        opened(tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="no file"):
        opened(tmp_path / "mine.npy")


def test_pickles_are_not_opened(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, x=np.array([{"a": 1}, None], dtype=object))
    with pytest.raises(DataError, match=r"evil\.npz: the array 'x' holds Python objects.*pickle"):
        opened(path)


def test_the_root_s_own_npz_files_can_be_read(data_root):
    splits = opened("mnist5k/mnist5k.npz", subset=100)
    assert splits.about["input"] == [1, 28, 28]
