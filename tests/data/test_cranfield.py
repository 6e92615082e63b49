"""Cranfield: the collection as its readme says, texts to learn from, damaged files."""

from __future__ import annotations

import gzip

import pytest

from stillhouse.data import open_data
from stillhouse.data.cranfield import read_collection, sentences_of
from stillhouse.errors import DataError, OptionError

FEW = {"sentences": 30, "titles": 20, "words": 5}


def test_the_collection_as_its_readme_says(data_root):
    splits = open_data("cranfield", seed=0, options={**FEW, "val_queries": 0, "val": 0}).judging()
    assert splits.edition == "cranfield (cranfield-trec)"
    test = splits["test"].views
    assert test["place"][0].tolist() == [0, 0, 1400, 225]
    assert (test["place"][:, 0] == 1).sum() == 225
    grades = test["relevant"][test["place"][:, 0] == 1][..., 1]
    assert 1600 < int((grades > 0).sum()) <= 1837
    assert int(grades.max()) == 3
    assert test["text"][470] == ""
    assert len(splits["corpus"]) == 1398


def test_texts_to_learn_from_are_distinct_short_and_no_test_query(data_root):
    options = {"words": 50, "stsb": 40, "clinc150": 30, "longest": 12, "prefix": "query: "}
    splits = open_data("cranfield", seed=0, options=options).judging()
    train, test = splits["train"].views, splits["test"].views
    texts = train["text"]
    assert len(texts) == len(set(texts)) > 1500
    assert max(len(text.removeprefix("query: ").split()) for text in texts) <= 12
    for text, kind in zip(texts, train["kind"].tolist(), strict=True):
        assert text.startswith("query: ") == (kind == 1)
    queries = [t for t, p in zip(test["text"], test["place"].tolist(), strict=True) if p[0] == 1]
    assert all(query.startswith("query: ") for query in queries)
    assert not set(queries) & set(texts)
    assert "the" in texts  # single words are texts to learn from
    assert splits.edition == "cranfield (cranfield-trec+stsb+clinc150)"


def test_val_and_test_share_no_query_and_the_draw_decides(data_root):
    splits = open_data("cranfield", seed=0, options=FEW).judging()

    def queries(role: str) -> set[str]:
        views = splits[role].views
        return {t for t, p in zip(views["text"], views["place"].tolist(), strict=True) if p[0] == 1}

    assert (len(queries("val")), len(queries("test"))) == (45, 180)
    assert not queries("val") & queries("test")
    again = open_data("cranfield", seed=7, options=FEW)
    assert again.fingerprint() == splits.fingerprint()
    other = open_data("cranfield", seed=0, options={**FEW, "draw": 1})
    assert other["train"].fingerprint != splits["train"].fingerprint
    fewer = open_data("cranfield", seed=0, options={**FEW, "sentences": 10})
    kept = set(fewer["train"].views["text"])
    assert kept <= set(splits["train"].views["text"])


def test_pairs_beside_the_collection(data_root):
    splits = open_data("cranfield", seed=0, options={**FEW, "pairs": True}).judging()
    test = splits["test"].views
    assert (test["pair"][:, 0] >= 0).sum() == 2758
    assert (test["place"][:, 0] >= 0).sum() == 1400 + 180
    assert bool(((test["pair"][:, 0] >= 0) ^ (test["place"][:, 0] >= 0)).all())
    row = int((test["pair"][:, 0] == 3).nonzero()[0])
    assert test["target"][row] == test["target"][row + 1]


def test_sentences():
    assert sentences_of("a wing . the flow, e.g. 2.5 m .") == ["a wing", "the flow, e.g. 2.5 m"]
    assert sentences_of("") == []


def write(folder, **changes):
    content = {
        "corpus": '{"_id": "1", "title": "t", "text": "x"}\n',
        "queries": '{"_id": "1", "text": "q"}\n',
        "qrels": "query-id\tcorpus-id\tscore\n1\t1\t1\n",
        **changes,
    }
    paths = []
    for name, text in content.items():
        path = folder / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus": '{"_id": "1"}\n'}, "_id and text: KeyError"),
        ({"queries": "no json\n"}, "gzipped JSON lines"),
        ({"queries": "\n"}, "holds no line"),
        ({"qrels": "query\tscore\n1\t1\n"}, "query-id, corpus-id and score: KeyError"),
        ({"qrels": "query-id\tcorpus-id\tscore\n1\t9\t1\n"}, "grades '9', which is neither"),
    ],
)
def test_damaged_files_are_told(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        read_collection(*write(tmp_path, **changes))
    whole = read_collection(*write(tmp_path))
    assert whole.grades == {"1": {"1": 1}}


def test_what_is_not_there_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="convert the collection to retrieval/cranfield_corpus"):
        open_data("cranfield", seed=0)
    with pytest.raises(OptionError):
        open_data("cranfield", seed=0, options={"val_queries": 300})
