from __future__ import annotations

import json

import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data import open_data
from stillhouse.errors import DataError


def test_files_of_both_kinds_and_the_held_out_share(tmp_path):
    (tmp_path / "a.txt").write_text("one whole text\nof two lines")
    lines = [json.dumps({"prompt": f"text {i}"}) for i in range(9)] + ["", '{"prompt": " "}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    splits = open_data("plain_texts", options={"path": str(tmp_path), "text": "prompt", "val": 0})
    opened = splits.judging()
    texts = [
        text
        for role in ("train", "test")
        for text in read_rows(opened[role], torch.arange(len(opened[role])), None)["text"]
    ]
    assert splits.peek("test") == 1
    assert sorted(texts) == sorted(
        ["one whole text\nof two lines", *(f"text {i}" for i in range(9))]
    )
    some = open_data(
        "plain_texts", options={"path": str(tmp_path), "text": "prompt", "limit": 4, "val": 0}
    )
    assert some.peek("train") + some.peek("test") == 4


def test_what_is_wrong_with_the_files_is_told(tmp_path):
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl"):
        open_data("plain_texts", options={"path": str(tmp_path)})
    path = tmp_path / "a.jsonl"
    path.write_text('{"txt": "x"}\n')
    with pytest.raises(DataError, match=r"line 1: no text in the field 'text'; did you mean 'txt'"):
        open_data("plain_texts", options={"path": str(path)})
    path.write_text('{"text": "x"}\nnot json\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        open_data("plain_texts", options={"path": str(path)})
    path.write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="at least two"):
        open_data("plain_texts", options={"path": str(path)})
