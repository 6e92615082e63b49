from __future__ import annotations

import gzip
import json

import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data import open_data
from stillhouse.data.hash_tokens import HashTokens
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError, RecipeError


def test_the_root_holds_what_the_paper_says(data_root):
    splits = open_data("clinc150", seed=0).judging()
    assert {r: splits.peek(r) for r in splits} == {"train": 15_000, "val": 3_000, "test": 4_500}
    assert splits.edition == "clinc150 (full)"
    assert len(splits.about["classes"]) == 150
    assert splits.about["classes"] == sorted(splits.about["classes"])
    for role, each in (("train", 100), ("val", 20), ("test", 30)):
        assert torch.bincount(labels_of(splits[role])).tolist() == [each] * 150
    ids = torch.cat([splits[role].ids for role in splits])
    assert len(ids.unique()) == 22_500


def test_views_are_text_and_its_hashed_words(data_root):
    options = {"subset": {"train": 200, "test": 50, "val": 50}, "length": 12, "buckets": 500}
    splits = open_data("clinc150", seed=0, options=options)
    batch = read_rows(splits["train"], torch.tensor([5, 3]), None)
    tokens = HashTokens(**splits.about["tokens"])
    assert torch.equal(batch["x"], tokens(batch["text"]))
    assert batch["x"].shape == (2, 12)
    assert int(splits["train"].views["x"].max()) < splits.about["vocabulary"] == 500
    assert splits.about["input"] == {"length": 12}
    with gzip.open(data_root / "clinc150" / "data_full.json.gz") as opened:
        rows = json.load(opened)["train"]
    for text, number, target in zip(batch["text"], batch["id"], batch["target"]):
        assert rows[number] == [text, splits.about["classes"][target]]


def test_reading_does_not_depend_on_the_batch(data_root):
    splits = open_data("clinc150", seed=0, options={"subset": 64})
    whole = read_rows(splits["train"], torch.arange(64), None)
    part = read_rows(splits["train"], torch.tensor([9, 1]), None)
    assert part["text"] == [whole["text"][9], whole["text"][1]]
    assert torch.equal(part["x"], whole["x"][[9, 1]])


def test_fingerprint_follows_the_tokens(data_root):
    prints = {
        open_data("clinc150", seed=0, options={"subset": 64, **more})["train"].fingerprint
        for more in ({}, {"length": 20}, {"buckets": 999}, {"subset_seed": 1})
    }
    assert len(prints) == 4


def test_out_of_scope_is_one_more_class(data_root):
    splits = open_data("clinc150", seed=0, options={"oos": "class"}).judging()
    assert splits.about["classes"][-1] == "oos"
    assert len(splits.about["classes"]) == 151
    counts = [int((labels_of(splits[r]) == 150).sum()) for r in ("train", "val", "test")]
    assert counts == [100, 100, 1000]


def test_some_intents_only(data_root):
    options = {"classes": ["translate", "weather"], "per_class": {"train": 10}}
    splits = open_data("clinc150", seed=0, options=options)
    assert (splits.peek("train"), splits.peek("val")) == (20, 40)
    with pytest.raises(RecipeError, match="no class 'wether'; did you mean 'weather'"):
        open_data("clinc150", seed=0, options={"classes": ["wether", "translate"]})
    with pytest.raises(RecipeError, match="clinc150 brings its own validation split"):
        open_data("clinc150", seed=0, options={"val": 100})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot be read as gzipped JSON"),
        (gzip.compress(b"[1]"), "does not hold the lists train"),
        (
            gzip.compress(
                json.dumps(
                    {
                        key: [["a", "x"], ["b"]]
                        for key in ("train", "val", "test", "oos_train", "oos_val", "oos_test")
                    }
                ).encode()
            ),
            r"train, row 1: \[text, intent\] is needed",
        ),
        (
            gzip.compress(
                json.dumps(
                    {
                        "train": [["a", "x"], ["b", "y"]], "val": [["c", "z"]], "test": [],
                        "oos_train": [], "oos_val": [], "oos_test": [],
                    }
                ).encode()
            ),
            "val: the intent 'z' is not in train",
        ),
    ],
)  # fmt: skip
def test_damaged_files_are_told(tmp_path, monkeypatch, content, message):
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150" / "data_full.json.gz").write_bytes(content)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        open_data("clinc150", seed=0)
