from __future__ import annotations

import gzip
import json

import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data import open_data
from stillhouse.data.prose import spelt
from stillhouse.errors import DataError, RecipeError


def rows(splits, split, count=4):
    source = splits.judging()[split]
    return read_rows(source, torch.arange(min(count, len(source))), None)


def test_real_passages_of_every_source(data_root):
    splits = open_data("prose", options={"passages": {"train": 40, "test": 20}, "val": 0.25})
    assert {role: splits.peek(role) for role in splits} == {"train": 30, "val": 10, "test": 20}
    for role in ("train", "test"):
        batch = rows(splits, role, 20)
        for text, spans in zip(batch["text"], batch["entities"]):
            assert text.strip() == text
            assert all(text[a:b].strip() == text[a:b] != "" for a, b in spans)
        assert any(batch["entities"])
    lengths = [len(t.split()) for t in rows(splits, "train", 30)["text"]]
    assert sum(length >= 100 for length in lengths) > 15
    assert len(splits.about["hash"]) == 64


def test_the_same_passages_whatever_the_run_seed(data_root):
    options = {"passages": {"train": 20, "test": 8}, "val": 0}
    first, second = (open_data("prose", seed=s, options=options) for s in (0, 1))
    assert rows(first, "train", 20)["text"] == rows(second, "train", 20)["text"]
    other = open_data("prose", options={**options, "subset_seed": 1})
    assert rows(first, "train", 20)["text"] != rows(other, "train", 20)["text"]
    train = set(rows(first, "train", 20)["text"])
    assert not train & set(rows(first, "test", 8)["text"])


def test_words_are_joined_as_text_with_their_entities():
    words = ["(", "He", "met", "Ada", "Lovelace", ",", "twice", ")", "in", "Bath", "."]
    tags = ["O", "O", "O", "B-person", "I-person", "O", "O", "O", "O", "B-location", "O"]
    passage = spelt(words, tags)
    assert passage.text == "(He met Ada Lovelace, twice) in Bath."
    assert [passage.text[a:b] for a, b in passage.entities] == ["Ada Lovelace", "Bath"]


def test_what_is_asked_beyond_the_data_is_told(data_root):
    with pytest.raises(DataError, match=r"passages.*'e2e', which has"):
        open_data("prose", options={"parts": ["e2e"], "passages": {"train": 10**6}})
    with pytest.raises(RecipeError, match="parts"):
        open_data("prose", options={"parts": ["bible"]})


def test_missing_files_are_told_with_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_OFFLINE", "1")
    with pytest.raises(DataError, match=r"gsm8k_train.jsonl.gz"):
        open_data("prose", options={"parts": ["gsm8k"]})


def test_calculator_marks_and_final_answers_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path))
    folder = tmp_path / "llm_text"
    folder.mkdir()
    problem = {"question": "How many?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}
    for split in ("train", "test"):
        with gzip.open(folder / f"gsm8k_{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(problem) + "\n" for _ in range(30))
    splits = open_data("prose", options={"parts": ["gsm8k"], "words": 10, "val": 0})
    assert rows(splits, "test", 1)["text"] == ["How many? It is 1+1=2. How many? It is 1+1=2."]
