"""Data divided among clients: parts, openings of one client, the five digit clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.batch import Joined, Splits, TensorSource
from stillhouse.data import digit_clients
from stillhouse.data.clients import client_source, joined_clients, open_client, with_own_val
from stillhouse.data.registry import open_data
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError, OptionError, RecipeError

IMAGES = {"kind": "images", "shape": [3, 8, 8], "rows": 16}
TWO = {"clients": {
    "a": {"name": "generated", "options": IMAGES},
    "b": {"name": "generated", "options": {**IMAGES, "rows": 24}},
}}  # fmt: skip


def own(rows: int = 12, classes=("p", "q"), shape=(3, 4, 4), **splits: int) -> Splits:
    def source(count):
        return TensorSource({"x": torch.rand(count, *shape), "target": torch.arange(count) % 2})

    parts = {"train": rows, **splits}
    about = {"classes": list(classes), "input": list(shape)}
    return Splits({role: source(count) for role, count in parts.items()}, "own", about)


def test_parts_stand_one_after_another_and_belong_to_their_clients():
    splits = open_data("clients", options=TWO)
    assert splits.about["clients"] == ["a", "b"]
    assert splits.about["mean"] == splits.about["std"] == [0.5, 0.5, 0.5]
    assert len(splits["train"]) == 16 + 24
    assert len(client_source(splits, "train", "b")) == 24
    assert len(client_source(splits, "val", "a")) == 8
    assert client_source(splits, "train", "c") is None
    both = splits["train"].read(torch.arange(40), None)
    alone = client_source(splits, "train", "b").read(torch.arange(24), None)
    assert torch.equal(both["x"][16:], alone["x"])
    assert torch.equal(both["target"][16:], alone["target"])


def test_labels_of_all_clients_are_told_without_reading_images():
    splits = open_data("clients", options=TWO)
    labels = labels_of(splits["train"])
    assert torch.equal(labels, splits["train"].read(torch.arange(40), None)["target"])
    mixed = Joined([splits["train"], TensorSource({"x": torch.rand(2, 3, 8, 8)})])
    assert labels_of(mixed) is None


def test_one_client_alone_has_what_it_has_among_others():
    splits, alone = open_data("clients", options=TWO), open_client("clients", "b", options=TWO)
    assert alone.about["clients"] == ["b"]
    for role in ("train", "val"):
        whole = client_source(splits, role, "b")
        assert whole.fingerprint == client_source(alone, role, "b").fingerprint
    with pytest.raises(DataError, match="opens only"):
        client_source(alone, "test", "b")
    with pytest.raises(RecipeError, match="no client 'c'"):
        open_client("clients", "c", options=TWO)


def test_a_client_that_fails_to_open_does_not_hinder_another():
    broken = {"clients": {**TWO["clients"], "c": {"name": "image_folder",
              "options": {"path": "/nowhere"}}}}  # fmt: skip
    assert len(open_client("clients", "a", options=broken)["train"]) == 16
    with pytest.raises(DataError):
        open_data("clients", options=broken)


def test_folders_of_images_each_in_its_own_way(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for client, size in (("north", 12), ("south", 20)):
        for role in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / client / role / label
                folder.mkdir(parents=True)
                for number in range(10):
                    pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")

    def folder_of(client: str, **more):
        options = {"path": str(tmp_path / client), "image_size": 8, **more}
        return {"name": "image_folder", "options": options}

    clients = {"north": folder_of("north"), "south": folder_of("south", resize=10)}
    splits = open_data("clients", options={"clients": clients, "client_val": 4})
    assert {role: splits.peek(role) for role in splits} == {"train": 32, "val": 8, "test": 40}
    assert splits.about["classes"] == ["cat", "dog"]
    batch = splits["train"].read(torch.tensor([0, 31]), None)
    assert batch["x"].shape == (2, 3, 8, 8)


def test_clients_that_do_not_belong_together_are_told():
    with pytest.raises(DataError, match="client 'b' has classes"):
        joined_clients({"a": own(), "b": own(classes=("p", "r"))})
    with pytest.raises(DataError, match="client 'b' has images"):
        joined_clients({"a": own(), "b": own(shape=(1, 4, 4))})
    with pytest.raises(DataError, match="no training data"):
        joined_clients({"a": Splits({"test": own()["train"]}, "x", own().about)})
    with pytest.raises(OptionError, match="clients"):
        open_data("clients", options={})
    undivided = Splits({"train": own()["train"]}, "x", {"parts": {"train": ["a"]}})
    with pytest.raises(DataError, match="one after another"):
        client_source(undivided, "train", "a")


def test_some_clients_may_lack_a_split():
    splits = joined_clients({"a": own(val=4), "b": own()})
    assert client_source(splits, "val", "b") is None
    assert len(client_source(splits, "val", "a")) == 4


def test_validation_rows_are_each_clients_own():
    first = with_own_val(own(), 0.25, seed=0, client="a")
    assert (len(first["train"]), len(first["val"])) == (9, 3)
    again = with_own_val(own(), 3, seed=0, client="a")
    assert torch.equal(first["val"].rows, again["val"].rows)
    assert not torch.equal(
        with_own_val(own(100), 20, seed=0, client="a")["val"].rows,
        with_own_val(own(100), 20, seed=0, client="b")["val"].rows,
    )
    assert "val" not in with_own_val(own(), 0, seed=0, client="a")


# ------------------------------------------------------------------------------------ looks
def test_looks_do_what_they_say():
    dot = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    dot[0, 0, 4, 6] = 240
    thick = digit_clients.thickened(dot)
    assert thick[0, 0, 3:6, 5:8].eq(240).all()
    assert int(thick.count_nonzero()) == 9
    soft = digit_clients.blurred(dot).float()
    assert soft.sum() == pytest.approx(240, abs=15)
    assert soft.argmax() == dot.float().argmax()
    assert int(soft.max()) < 60
    up = digit_clients.turned(dot, 90.0)  # anticlockwise: what was right of the centre is above
    assert int(up[0, 0, 2, 4]) > 200
    assert int(up.long().sum()) == pytest.approx(240, abs=10)
    grey = torch.full((40, 1, 10, 10), 100, dtype=torch.uint8)
    salt = digit_clients.salted(grey, torch.Generator().manual_seed(0))
    assert set(salt.unique().tolist()) == {0, 100, 255}
    for value in (0, 255):
        assert float((salt == value).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_digits_on_photographs_are_absolute_differences():
    photograph = torch.arange(3 * 6 * 6, dtype=torch.uint8).reshape(3, 6, 6)
    digits = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    rng = torch.Generator().manual_seed(0)
    found = digit_clients.on_photographs(digits, [photograph], rng)
    assert found.shape == (2, 3, 4, 4)
    crops = [photograph[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    assert any(torch.equal(found[0], crop) for crop in crops)
    assert any(torch.equal(255 - found[1], crop) for crop in crops)


def test_five_digit_clients(data_root: Path):
    options = {"per_client": 100, "per_test": 50, "image_size": 14}
    splits = open_data("digit_clients", options=options)
    assert splits.about["clients"] == list(digit_clients.NAMES)
    assert {r: splits.peek(r) for r in splits} == {"train": 450, "val": 50, "test": 250}
    judged = splits.judging()
    for name in digit_clients.NAMES:
        part = client_source(judged, "train", name)
        batch = part.read(torch.arange(len(part)), None)
        assert batch["x"].shape == (90, 3, 14, 14)
        assert 0 <= float(batch["x"].min()) <= float(batch["x"].max()) <= 1
        whole = client_source(judged, "test", name)
        labels = whole.read(torch.arange(50), None)["target"]
        counts = torch.bincount(labels, minlength=10)
        assert 4 <= int(counts.min()) <= int(counts.max()) <= 6
    photo = client_source(judged, "train", "photo").read(torch.arange(5), None)["x"]
    assert not torch.equal(photo[:, 0], photo[:, 1])
    alone = open_client("digit_clients", "noisy", options=options)
    ours, theirs = (client_source(s, "train", "noisy") for s in (splits, alone))
    assert ours.fingerprint == theirs.fingerprint
    with pytest.raises(OptionError, match="no client 'nosy'"):
        open_data("digit_clients", options={"clients": ["nosy"]})
    with pytest.raises(RecipeError, match="no client 'uci'"):
        open_client("digit_clients", "uci", options={"clients": ["mnist"]})


def test_shards_share_no_digit(data_root: Path):
    rows = [digit_clients._shard(name, {"train": 800, "test": 250}) for name in
            ("mnist", "photo", "turned", "noisy")]  # fmt: skip
    for role, count in (("train", 3200), ("test", 1000)):
        seen = torch.cat([own[role].read(torch.arange(len(own[role].labels))) for own in rows])
        assert len(seen) == count
        assert len(torch.unique(seen.flatten(1), dim=0)) >= count - 2  # MNIST has a few twins
