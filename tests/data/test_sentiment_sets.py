"""SST-2, Subj, Alexa reviews, Sentiment140: labelled texts in JSON lines."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data import amazon_alexa, open_data, sentiment140, sst2, subj
from stillhouse.data.labelled_lines import read_lines, write_lines
from stillhouse.data.splitting import labels_of
from stillhouse.errors import DataError, RecipeError

ALL = {
    "sst2": ("binary sentences", {"train": 6_920, "val": 872, "test": 1_821}),
    "subj": ("whole", {"train": 7_200, "val": 800, "test": 2_000}),
    "amazon_alexa": ("whole", {"train": 2_268, "val": 252, "test": 630}),
    "sentiment140": ("hand-labelled part", {"train": 358, "val": 40, "test": 100}),
}


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_root_holds_what_is_told_of_it(data_root, name):
    edition, rows = ALL[name]
    splits = open_data(name, seed=0).judging()
    assert {role: splits.peek(role) for role in splits} == rows
    assert splits.edition == f"{name} ({edition})"
    kinds = len(splits.about["classes"])
    shares = []
    for role in splits:
        labels = labels_of(splits[role])
        assert set(labels.tolist()) == set(range(kinds))
        shares.append(torch.bincount(labels) / len(labels))
    assert all((share - shares[0]).abs().max() < 0.05 for share in shares)
    texts = [read_rows(splits[r], torch.arange(splits.peek(r)), None)["text"] for r in splits]
    assert sum(map(len, texts)) == sum(rows.values())


def test_the_held_out_test_is_no_matter_of_the_run(data_root):
    ids = [
        open_data("subj", seed=seed, options={"subset": {"train": 50, "test": 40}})
        .judging()["test"]
        .ids
        for seed in (0, 1)
    ]
    assert torch.equal(*ids)
    more = open_data("subj", seed=0, options={"test": 100}).judging()
    assert more.peek("test") == 100
    with pytest.raises(RecipeError, match="a count of rows"):
        open_data("subj", seed=0, options={"test": 1.5})


def test_tweets_of_two_classes(data_root):
    options = {"classes": ["negative", "positive"]}
    splits = open_data("sentiment140", seed=0, options=options).judging()
    assert sum(splits.peek(role) for role in splits) == 359
    assert splits.about["classes"] == ["negative", "positive"]


def test_the_sources_own_files_become_lines(tmp_path):
    table = (
        b"rating\tdate\tvariation\tverified_reviews\tfeedback\n"
        b'5\t31-Jul-18\tBlack \t"Love, it"\t1\n1\td\tv\t \t0\n'
    )
    tweets = (
        b'"4","3","d","q","u","I love it"\n"2","4","d","q","u","A fact"\n"0","5","d","q","u","x"\n'
    )
    found = {
        "sst2": (sst2.parse, b"a fine film\t1\nnot so\t0\n", [("a fine film", 1), ("not so", 0)]),
        "subj": (subj.parse, b"0 smart\n1 caf\xe9 life\n", [("smart", 0), ("café life", 1)]),
        "alexa": (amazon_alexa.parse, table, [("Love, it", 1), ("", 0)]),
        "tweets": (sentiment140.parse, tweets, [("I love it", 2), ("A fact", 1), ("x", 0)]),
    }
    for name, (parse, content, wanted) in found.items():
        path = tmp_path / f"{name}.jsonl.gz"
        write_lines(path, parse(content))
        rows = read_lines(path, 3)
        assert list(zip(rows.texts, rows.labels.tolist())) == wanted
        first = path.read_bytes()
        write_lines(path, parse(content))
        assert path.read_bytes() == first


def test_absent_data_say_how_to_come_by_them(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    with pytest.raises(DataError, match=r"sst2_train.jsonl.gz[\s\S]*downloaded on first use"):
        open_data("sst2", seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot read"),
        (gzip.compress(b"{"), "line 1: not JSON"),
        (gzip.compress(b'{"label": 1}'), "line 1: an object with a string in the field 'text'"),
        (gzip.compress(b'{"text": "a", "label": 1}\n{"text": "b", "label": 2}'), "line 2: the lab"),
        (gzip.compress(json.dumps({"text": "a", "label": True}).encode()), "the label True is no"),
        (gzip.compress(b"\n"), "holds no rows"),
    ],
)  # fmt: skip
def test_damaged_files_are_told(tmp_path, monkeypatch, content, message):
    (tmp_path / "text_classification").mkdir()
    (tmp_path / "text_classification" / "subj.jsonl.gz").write_bytes(content)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=message):
        open_data("subj", seed=0)
