"""UCI-HAR and BasicMotions: their rows, views, parts and cuts; damaged files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.batch import TensorSource, read_rows
from stillhouse.clock import Views
from stillhouse.data.basic_motions import read_ts
from stillhouse.data.registry import find_card, open_data
from stillhouse.data.series import Crop
from stillhouse.data.uci_har import CHANNELS, convert
from stillhouse.errors import DataError, OptionError, StillhouseError

VIEWS = {"x": ["body_gyro"], "other": ["total_acc"]}


def series_of(splits, role):
    source = splits.judging()[role]
    return read_rows(source, torch.arange(len(source)), None)


def test_uci_har_as_it_lies(data_root):
    splits = open_data("uci_har")
    assert [splits.peek(role) for role in ("train", "val", "test")] == [1999, 400, 950]
    assert splits.edition == "uci_har (3,350 windows)"
    assert splits.about["classes"][0] == "WALKING"
    assert splits.about["input"] == [9, 128]
    train, test = series_of(splits, "train"), series_of(splits, "test")
    assert train["x"].shape == (1999, 9, 128)
    assert torch.bincount(test["target"]).tolist() == [160, 152, 135, 158, 172, 173]
    stored = np.load(data_root / "har" / "uci_har_subset.npz")
    assert torch.equal(train["x"][7], torch.from_numpy(stored["train_x"][7].astype(np.float32)))
    assert torch.equal(test["target"], torch.from_numpy(stored["test_y"].astype(np.int64)))
    mean = torch.tensor(splits.about["views"]["x"]["mean"])
    torch.testing.assert_close(train["x"].double().mean((0, 2)), mean.double(), atol=1e-6, rtol=0)


def test_parts_are_disjoint_and_views_are_sensors(data_root):
    opened = {
        part: open_data("uci_har", options={"part": part, "views": VIEWS})
        for part in ("all", "pretrain", "rest")
    }
    sizes = {part: splits.peek("train") for part, splits in opened.items()}
    assert sizes == {"all": 1999, "pretrain": 800, "rest": 1199}
    whole, first, rest = (series_of(opened[p], "train") for p in ("all", "pretrain", "rest"))
    assert torch.equal(torch.cat([first["x"], rest["x"]]), whole["x"])
    assert whole["x"].shape[1] == whole["other"].shape[1] == 3
    assert opened["rest"].about["channels"]["other"] == [f"total_acc_{a}" for a in "xyz"]
    every = series_of(open_data("uci_har"), "train")
    assert torch.equal(every["x"][:, 3:6], whole["x"])
    assert torch.equal(every["x"][:, 6:], whole["other"])
    # no window is on two sides, also not its half
    other = series_of(opened["pretrain"], "val")["x"]
    for one in (rest["x"], other):
        ends = first["x"][-1, :, 64:]
        assert (one[:, :, :64] - ends).abs().amax((1, 2)).min() > 0.01


def test_one_cut_serves_all_views(data_root):
    splits = open_data("uci_har", options={"views": {"x": ["body_acc"], "y": ["body_acc"]},
                                           "crop": 100})  # fmt: skip
    source = splits["train"]
    rows = torch.arange(64)
    drawn = read_rows(source, rows, Views(3))
    assert drawn["x"].shape == (64, 3, 100)
    assert torch.equal(drawn["x"], drawn["y"])
    assert torch.equal(drawn["x"], read_rows(source, rows, Views(3))["x"])
    later = read_rows(source, rows, Views(3, 1))["x"]
    assert not torch.equal(drawn["x"], later)
    plain = read_rows(source, rows, None)["x"]
    whole = read_rows(open_data("uci_har", options={"views": {"x": ["body_acc"]}})["train"],
                      rows, None)["x"]  # fmt: skip
    assert torch.equal(plain, whole[:, :, 14:114])
    starts = [
        [torch.equal(cut, row[:, s : s + 100]) for s in range(29)].index(True)
        for cut, row in zip(drawn["x"], whole, strict=True)
    ]
    assert min(starts) < 5
    assert max(starts) > 23
    val = splits["val"]
    assert torch.equal(read_rows(val, rows, Views(1))["x"], read_rows(val, rows, None)["x"])


def test_a_cut_without_spare_points_is_the_whole():
    source = TensorSource({"x": torch.randn(3, 2, 8)})
    batch = source.read(torch.arange(3), None)
    assert torch.equal(Crop(8, ["x"])(batch, Views(0))["x"], source.views["x"])


def test_basic_motions_as_it_lies(data_root):
    splits = open_data("basic_motions")
    # of 10 recordings of each activity 8 are train and 2 val, each of 6 windows
    assert [splits.peek(role) for role in ("train", "val", "test")] == [192, 48, 240]
    assert splits.edition == "basic_motions (aeon 1.6.0)"
    assert splits.about["classes"] == ["Standing", "Running", "Walking", "Badminton"]
    train = series_of(splits, "train")
    assert train["x"].shape == (192, 6, 50)
    assert torch.equal(train["x"][0, :, 10:], train["x"][1, :, :40])
    assert abs(float(train["x"][0, 0, 0]) - 0.079106) < 1e-6
    parts = {p: open_data("basic_motions", options={"part": p}).peek("train")
             for p in ("pretrain", "rest")}  # fmt: skip
    assert parts == {"pretrain": 72, "rest": 120}
    whole = open_data("basic_motions", options={"window": 100})
    assert series_of(whole, "test")["x"].shape == (40, 6, 100)


def test_what_is_known_of_the_sets():
    for name in ("uci_har", "basic_motions"):
        card = find_card(name)
        assert card.tasks == ("representation",)
        assert card.licence


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"views": {"x": ["body_gyr"]}}, "body_gyro"),
        ({"views": {"y": ["body_gyro"]}}, "called x"),
        ({"views": {"x": ["body_gyro"], "target": ["total_acc"]}}, "other names"),
        ({"crop": 200}, "windows of 128"),
        ({"part": "first"}, "pretrain"),
        ({"crp": 64}, "crop"),
    ],
)
def test_options_that_do_not_fit_are_told(data_root, options, told):
    with pytest.raises(StillhouseError, match=told) as found:
        open_data("uci_har", options=options)
    text = str(getattr(found.value, "wrong", "")) + str(found.value)
    assert told in text


def made_archive(path: Path, *, nested: bool, without: str = "") -> None:
    inner = path.with_suffix(".inner.zip") if nested else path
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(inner, "w") as made:
        for role, rows in (("train", 12), ("test", 5)):
            base = f"UCI HAR Dataset/{role}"
            for channel in CHANNELS:
                text = "\n".join(" ".join(f"{v: .7e}" for v in rng.normal(size=128))
                                 for _ in range(rows))  # fmt: skip
                if channel != without:
                    made.writestr(f"{base}/Inertial Signals/{channel}_{role}.txt", text)
            made.writestr(f"{base}/y_{role}.txt", "\n".join(str(1 + n % 6) for n in range(rows)))
    if nested:
        with zipfile.ZipFile(path, "w") as made:
            made.write(inner, "UCI HAR Dataset.zip")


@pytest.mark.parametrize("nested", [False, True])
def test_the_published_archive_is_converted(tmp_path, monkeypatch, nested):
    archive = tmp_path / "published.zip"
    made_archive(archive, nested=nested)
    target = tmp_path / "root" / "har" / "uci_har.npz"
    target.parent.mkdir(parents=True)
    convert(archive, target)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path / "root"))
    splits = open_data("uci_har")
    assert splits.edition == "uci_har (all windows)"
    assert [splits.peek(role) for role in ("train", "val", "test")] == [9, 2, 5]
    assert series_of(splits, "train")["target"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_an_archive_that_lacks_a_sensor_is_told(tmp_path):
    made_archive(tmp_path / "x.zip", nested=False, without="body_gyro_y")
    with pytest.raises(DataError, match="body_gyro_y_train"):
        convert(tmp_path / "x.zip", tmp_path / "out.npz")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("1,2:3,4:Jumping", "line 5"),
        ("1,2:3,?:Walking", "line 5"),
        ("1,2:3:Walking", "equal length"),
    ],
)
def test_a_damaged_ts_file_is_told(tmp_path, line, told):
    path = tmp_path / "x.ts"
    head = "# a comment\n@dimensions 2\n@classLabel true Walking Standing\n@data\n"
    path.write_text(head + line + "\n")
    with pytest.raises(DataError, match=told):
        read_ts(path)
    path.write_text(head + "1,2:3,4:Walking\n5,6:7,8:Standing\n")
    series, labels, classes = read_ts(path)
    assert series.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert labels.tolist() == [0, 1]
    assert classes == ["Walking", "Standing"]


def test_missing_data_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    for name in ("uci_har", "basic_motions"):
        with pytest.raises(DataError, match="har/"):
            open_data(name)
    assert issubclass(OptionError, StillhouseError)
