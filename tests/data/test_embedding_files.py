"""A user's own texts to embed, as files come: byte order marks, line ends, scripts, damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data import open_data
from stillhouse.errors import DataError, RecipeError


def opened(**options: Any):
    return open_data("embedding_files", options={"val": 0, **options}).judging()


def collection(folder: Path, qrels: str = "qrels.tsv") -> Path:
    folder.mkdir()
    corpus = [
        {"_id": 1, "title": "Wings", "text": "on lift"},
        {"_id": "b", "title": "", "text": "heat"},
        {"_id": "c", "text": "a cone"},
    ]
    queries = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(7)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    with gzip.open(folder / "queries.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, queries)))
    (folder / qrels).parent.mkdir(exist_ok=True)
    rows = ["query-id\tcorpus-id\tscore", *(f"q{i}\t{'1bc'[i % 3]}\t{1 + i % 2}" for i in range(6))]
    (folder / qrels).write_bytes("\r\n".join([*rows, "q0\tb\t0", ""]).encode())
    return folder


def test_texts_as_editors_save_them(tmp_path):
    text = (
        "\ufeffa wing\r\n\r\n  \r\nПривет мир\r\na wing\r\n日本語\u2028の文章\r\n" + "x " * 30_000
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.csv").write_bytes('\ufefftext,n\r\n"two, of\nthem",1\r\nheat,2\r\n'.encode())
    (tmp_path / "c.jsonl").write_bytes('\ufeff{"text": "heat"}\r\n{"text": "cone"}\r\n'.encode())
    splits = opened(
        documents=[str(tmp_path / name) for name in ("a.txt", "b.csv")],
        queries=str(tmp_path / "c.jsonl"), query_prefix="query: ", document_prefix="passage: ",
    )  # fmt: skip
    found = {
        text: int(kind)
        for role in ("train", "test")
        for text, kind in zip(*(splits[role].views[k] for k in ("text", "kind")), strict=True)
    }
    documents = [
        "a wing",
        "Привет мир",
        "日本語\u2028の文章",
        "x " * 30_000,
        "two, of\nthem",
        "heat",
    ]
    wanted = {f"passage: {d}": 0 for d in documents} | {"query: heat": 1, "query: cone": 1}
    assert found == wanted
    assert len(splits["train"]) + len(splits["test"]) == len(wanted)
    assert splits.about["prefixes"] == {"query": "query: ", "document": "passage: "}


@pytest.mark.parametrize("qrels", ["qrels.tsv", "qrels/test.tsv"])
def test_a_collection_in_the_form_of_beir(tmp_path, qrels):
    folder = collection(tmp_path / "own", qrels)
    splits = opened(collection=str(folder), query_prefix="q: ", val_share=0.5)
    assert splits["train"].views["text"] == ["Wings on lift", "heat", "a cone"]
    own = opened(collection=str(folder), queries=str(folder / "queries.jsonl.gz"))
    # the other questions are judged
    assert own["train"].views["text"] == ["question 6", *splits["train"].views["text"]]
    graded = {}
    for role in ("val", "test"):
        views = splits[role].views
        assert len(views["text"]) == 3 + 3
        for text, place, relevant in zip(
            views["text"], views["place"], views["relevant"], strict=True
        ):
            if place[0] == 1:
                graded[text] = [row for row in relevant.tolist() if row[0] >= 0]
    assert graded == {f"q: question {i}": [[i % 3, 1 + i % 2]] for i in range(6)}


def test_pairs_are_judged_by(tmp_path):
    rows = [f"side {i},other {i},{i / 2}" for i in range(10)]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    splits = opened(documents=str(tmp_path / "t.txt"), pairs=str(tmp_path / "pairs.csv"))
    assert (splits.peek("val"), splits.peek("test")) == (4, 16)
    views = splits["test"].views
    scores = [float(v) for v in views["target"]]
    assert all(text.endswith(f" {int(2 * s)}") for text, s in zip(views["text"], scores))
    assert torch.equal(views["pair"][:, 0], torch.arange(16) // 2)


@pytest.mark.parametrize(
    ("files", "options", "told"),
    [
        ({"a.txt": b"one\n"}, {"documents": "a.txt"}, "1 texts to learn from"),
        ({"a.txt": b"\xff\xfeo\x00"}, {"documents": "a.txt"}, "cannot be read as UTF-8"),
        ({"a.csv": b"txt\none\n"}, {"documents": "a.csv"}, "line 2: no text.*did you mean 'txt'"),
        ({"a.csv": b"text,n\none\n"}, {"documents": "a.csv"}, "line 2: 2 fields are expected"),
        ({"a.jsonl": b'{"text": 3}\n'}, {"documents": "a.jsonl"}, "line 1: no text in the field"),
        ({"a.jsonl": b"\n[1]\n"}, {"documents": "a.jsonl"}, "line 2: an object is needed"),
        ({"a.txt": b"a\nb"}, {"documents": "b.txt"}, "there is no file"),
        ({"a.txt": b"a\nb", "p.csv": b"sentence1,sentence2,score\na,b,high\n"},
         {"documents": "a.txt", "pairs": "p.csv"}, "line 2: the score 'high' is no number"),
        ({"a.txt": b"a\nb", "c/corpus.jsonl": b'{"_id": 1, "text": "x"}'},
         {"documents": "a.txt", "collection": "c"}, "holds no queries.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_files_is_told(tmp_path, files, options, told):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        opened(**{key: str(tmp_path / name) for key, name in options.items()})


def test_grades_of_what_is_not_there_are_told(tmp_path):
    folder = collection(tmp_path / "own")
    for rows, told in (
        ("q0\tz\t1\n", "there is no document 'z'"),
        ("q0\t1\tx\nq0\t1\ty\n", "line 2: the grade 'y' is no number"),
        ("q0 0 1 0\n", "grades no document above 0"),
    ):
        (folder / "qrels.tsv").write_text(rows)
        with pytest.raises(DataError, match=told):
            opened(collection=str(folder))
    with pytest.raises(RecipeError, match="needs texts to learn from"):
        opened()
