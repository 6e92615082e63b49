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

ROWS = [(f"the film number {i} was {'fine, really' if i % 2 else 'bad'}", "up" if i % 2 else "down")
        for i in range(40)]  # fmt: skip


def as_csv(rows=ROWS, separator=",") -> str:
    quoted = [f'"{text}"{separator}{label}' for text, label in rows]
    return "\n".join([f"text{separator}label", *quoted]) + "\n"


def as_jsonl(rows=ROWS) -> str:
    return "\n".join(json.dumps({"text": t, "label": y}) for t, y in rows) + "\n\n"


def opened(path, seed=0, **options):
    return open_data("text_files", seed=seed, options={"path": str(path), **options})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", as_csv().encode()),
        ("a.tsv", as_csv(separator="\t").encode("utf-8-sig")),
        ("a.jsonl", as_jsonl().encode()),
        ("a.jsonl.gz", gzip.compress(as_jsonl().encode())),
        ("a.csv.gz", gzip.compress(as_csv().replace("\n", "\r\n").encode())),
    ],
)
def test_all_forms_hold_the_same(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    splits = opened(tmp_path / name).judging()
    assert splits.about["classes"] == ["down", "up"]
    assert {r: splits.peek(r) for r in splits} == {"train": 29, "val": 3, "test": 8}
    seen = []
    for role in splits:
        batch = read_rows(splits[role], torch.arange(splits.peek(role)), None)
        names = [splits.about["classes"][t] for t in batch["target"]]
        seen += list(zip(batch["text"], names))
        assert torch.equal(batch["x"], HashTokens(**splits.about["tokens"])(batch["text"]))
    assert sorted(seen) == sorted(ROWS)


def test_a_folder_with_splits(tmp_path):
    (tmp_path / "train.csv").write_text(as_csv())
    (tmp_path / "dev.jsonl").write_text(as_jsonl(ROWS[:6]))
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS[6:10]).encode()))
    splits = opened(tmp_path)
    assert {r: splits.peek(r) for r in splits} == {"train": 40, "val": 6, "test": 4}
    (tmp_path / "val.csv").write_text(as_csv())
    with pytest.raises(DataError, match=r"both val\.csv and dev\.jsonl are val data"):
        opened(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no train file"):
        opened(tmp_path / "empty")


def test_numbers_as_labels_keep_their_order(tmp_path):
    rows = [(f"text {i}", str(i % 12)) for i in range(60)]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    splits = opened(tmp_path / "a.csv", val=0, test=12)
    assert splits.about["classes"] == [str(i) for i in range(12)]
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "label": int(y)}) for t, y in rows)
    )
    other = opened(tmp_path / "b.jsonl", val=0, test=12)
    assert labels_of(other["train"]).tolist() == labels_of(splits["train"]).tolist()


def test_columns_by_name(tmp_path):
    (tmp_path / "a.csv").write_text(
        "sentence,mood\n" + "".join(f"t {i},m{i % 2}\n" for i in range(20))
    )
    splits = opened(tmp_path / "a.csv", text="sentence", label="mood")
    assert splits.about["classes"] == ["m0", "m1"]
    with pytest.raises(DataError, match=r"a\.csv, line 2: no field 'moood'; did you mean 'mood'"):
        opened(tmp_path / "a.csv", text="sentence", label="moood")


def test_hash_and_fingerprint_follow_the_content(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(as_csv())
    first = opened(path)
    path.write_text(as_csv().replace("number 7 ", "number 77 "))
    second = opened(path)
    assert first.about["hash"] != second.about["hash"]
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n", "is empty: it holds no rows"),
        ("a.csv", "text,label\nx,a\n,b\n", r"line 3: the text is empty"),
        ("a.csv", "text,label\nx,a\ny,\n", r"line 3: the label is no class"),
        ("a.csv", "text,label\nx,a\ny\n", "line 3: 2 fields are expected"),
        ("a.csv", "text,label\nx,a,b\n", "line 2: 2 fields are expected"),
        ("a.csv", 'text,label\nx,a\n"y,b\n', "after line 2: unexpected end of data"),
        ("a.csv", "text,label\nx,a\ny,a\n", "all 2 labels are 'a'; at least two"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: an object is needed"),
        ("a.jsonl", '{"text": 3, "label": "a"}\n', "line 1: the text is empty"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "line 1: the label is no class"),
        ("a.jsonl", '{"text": "x", "label": [1]}\n', "line 1: the label is no class"),
    ],
)
def test_unusable_files_are_told_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_other_mistakes(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.csv cannot be read as UTF-8"):
        opened(tmp_path / "latin.csv")
    (tmp_path / "b.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"b\.csv\.gz cannot be read"):
        opened(tmp_path / "b.csv.gz")
    (tmp_path / "train.csv").write_text(as_csv())
    (tmp_path / "test.csv").write_text("text,label\nx,downn\n")
    with pytest.raises(
        DataError, match=r"line 2: the class 'downn' does not occur in train.*'down'"
    ):
        opened(tmp_path)
    (tmp_path / "test.csv").write_text(as_csv(ROWS[:4]))
    with pytest.raises(RecipeError, match="has a test split"):
        opened(tmp_path, test=3)
    with pytest.raises(DataError, match="no file"):
        opened(tmp_path / "absent.csv")
