from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.batch import read_rows
from stillhouse.data.prompt_rows import PromptRows
from stillhouse.data.registry import open_data
from stillhouse.errors import DataError, OptionError, RecipeError, StillhouseError

pytest.importorskip("transformers")


def lines(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def opened(path: Path, **options: Any):
    return open_data("prompt_responses", options={"path": str(path), "least": 1, **options})


def rows_of(source: Any):
    return read_rows(source, torch.arange(len(source)), None)


def many(count: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "output": f"answer {n} of them"} for n in range(count)]


def test_rows_are_prompt_and_response(tmp_path: Path) -> None:
    splits = opened(lines(tmp_path, many()))
    batch = rows_of(splits["train"])
    tokens = splits.about["reader"]
    for row in range(len(batch["prompt"])):
        ids, there, said = (
            batch[k][row] for k in ("tokens", "attention_mask", "response_mask")
        )  # fmt: skip
        assert tokens.text(ids[said]) == batch["response"][row]
        assert tokens.text(ids[there & ~said]) == batch["prompt"][row]
        assert int(ids[said][-1]) == tokens.end
        assert not bool(said[~there].any())


def test_a_batch_is_as_long_as_its_longest_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"a{n}", "output": " ".join(["b"] * n)} for n in range(1, 21)]
    source = opened(lines(tmp_path, rows))["train"]
    lengths = source.lengths
    for pick in ([0, 1], [3], [2, 5]):
        batch = read_rows(source, torch.tensor(pick), None)
        assert batch["tokens"].shape[1] == int(lengths[pick].max())
        assert batch["attention_mask"].sum(1).tolist() == lengths[pick].tolist()


def test_alpaca_and_other_names_are_found(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say it", "input": f"number {n}", "output": f"it {n}"} for n in range(12)
    ]
    batch = rows_of(opened(lines(tmp_path, rows))["train"])
    assert all("Say it\n\nnumber " in text for text in batch["prompt"])
    rows = [{"question": f"who {n}", "response": [f"me {n}", f"you {n}"]} for n in range(12)]
    batch = rows_of(opened(lines(tmp_path, rows))["train"])
    assert batch["references"][0] == [
        batch["response"][0],
        batch["response"][0].replace("me", "you"),
    ]
    rows = [{"q": f"who {n}", "a": f"me {n}"} for n in range(12)]
    assert len(opened(lines(tmp_path, rows), prompt="q", response="a")["train"]) > 5


def test_files_of_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    lines(tmp_path, many())
    lines(tmp_path, many(3), "test.jsonl.gz")
    splits = opened(tmp_path)
    assert splits.peek("test") == 3
    assert splits.peek("val") + splits.peek("train") == 20
    with pytest.raises(RecipeError, match="has a test file"):
        opened(tmp_path, test=0.1)


def test_a_prompt_stands_in_one_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n % 10}", "output": f"a {n}"} for n in range(60)]
    splits = opened(lines(tmp_path, rows), test=0.3, validation=0.2).judging()
    asked = {role: set(rows_of(splits[role])["prompt"]) for role in splits}
    assert [len(asked[role]) for role in ("train", "val", "test")] == [5, 2, 3]
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["val"]
    assert all(len(known) == 6 for known in rows_of(splits["test"])["references"])


def test_the_vocabulary_is_that_of_train(tmp_path: Path) -> None:
    lines(tmp_path, many())
    lines(tmp_path, [{"prompt": "question 1", "output": "whale"}], "test.jsonl")
    tokens = opened(tmp_path).about["reader"]
    assert "whale" not in tokens.tokenizer.get_vocab()


def test_learning_from_few_prompts_leaves_vocabulary_ids_and_test_alone(tmp_path: Path) -> None:
    rows = [*many(), *many()]  # each prompt has two responses
    whole = opened(lines(tmp_path, rows))
    few = opened(tmp_path / "train.jsonl", train_prompts=3)
    assert len(few["train"]) == 6
    assert len({pair.prompt for pair in few["train"].pairs}) == 3
    assert few.about["tokenizer"] == whole.about["tokenizer"]
    assert few["train"].fingerprint != whole["train"].fingerprint
    places = {int(n): pair for n, pair in zip(whole["train"].ids, whole["train"].pairs)}
    assert [places[int(n)] for n in few["train"].ids] == list(few["train"].pairs)
    assert few.judging()["test"].fingerprint == whole.judging()["test"].fingerprint
    other = opened(tmp_path / "train.jsonl", train_prompts=3, subset_seed=1)
    assert other["train"].fingerprint != few["train"].fingerprint
    with pytest.raises(DataError, match=r"train_prompts.*1000 are asked for"):
        opened(tmp_path / "train.jsonl", train_prompts=1000)


def test_long_rows_are_cut(tmp_path: Path) -> None:
    lines(tmp_path, many(4), "val.jsonl")
    lines(tmp_path, many(4), "test.jsonl")
    rows = [{"prompt": " ".join(f"p{i}" for i in range(30)), "output": "r " * 40}, *many()]
    lines(tmp_path, rows)
    splits = opened(tmp_path, length=24, prompt_length=10)
    source = splits["train"]
    assert isinstance(source, PromptRows)
    assert int(source.lengths.max()) <= 24
    assert int(source.prompt_lengths.max()) <= 10
    batch = rows_of(source)
    longest = int(source.lengths.argmax())
    ids = batch["tokens"][longest]
    assert longest == 0
    assert splits.about["reader"].text(ids[~batch["response_mask"][longest]]).endswith("p29")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"promt": "a", "output": "b"}], "line 1: no field 'prompt', did you mean 'promt'"),
        ([{"prompt": "a", "outptu": "b"}], "line 1: no field 'output'"),
        ([{"prompt": " ", "output": "b"}], "line 1: the prompt is empty"),
        ([{"prompt": "a", "output": []}], "line 1: a text, or a list of texts"),
        ([{"prompt": "a", "output": 3}], "line 1: a text, or a list of texts"),
        (["no object"], "line 1: an object"),
        ([], "holds no rows"),
        (many(2), "none is left for"),
    ],
)
def test_bad_rows_are_told_by_line(tmp_path: Path, rows: list[Any], told: str) -> None:
    with pytest.raises(StillhouseError) as caught:
        opened(lines(tmp_path, rows))
    assert told.split(",")[0] in str(caught.value)


def test_files_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no train\.jsonl"):
        opened(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "output": "b"}\n{oops\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        opened(tmp_path)
    with pytest.raises(OptionError):
        opened(tmp_path, lenght=3)


def test_the_fingerprint_follows_content_and_tokenizer(tmp_path: Path) -> None:
    path = lines(tmp_path, many())
    first = opened(path)["train"].fingerprint
    assert opened(path)["train"].fingerprint == first
    assert opened(path, least=3)["train"].fingerprint != first
    assert opened(path, template="{prompt} :")["train"].fingerprint != first
    lines(tmp_path, [*many()[:-1], {"prompt": "question 19", "output": "other"}])
    assert opened(path)["train"].fingerprint != first


def test_generated_prompts_open() -> None:
    splits = open_data("generated_prompts", options={"prompts": 10, "references": 3})
    assert splits.peek("train") == 30
    assert splits.peek("test") == 15


def test_e2e_is_split_by_meaning(data_root: Path) -> None:
    splits = open_data("e2e_nlg").judging()
    assert sum(splits.peek(role) for role in splits) == 9365
    asked = {role: set(rows_of(splits[role])["prompt"]) for role in splits}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 1177
    assert len(asked["test"]) == 235
    assert 800 < splits.about["vocabulary"] < 1200
    batch = read_rows(splits["test"], torch.tensor([0]), None)
    assert len(batch["references"][0]) > 1
    assert batch["response"][0] in batch["references"][0]


def test_e2e_of_a_users_folder(tmp_path: Path) -> None:
    text = "mr,ref\n" + "".join(f'"name[X{n}], eatType[pub]","X{n} is a pub."\n' for n in range(20))
    (tmp_path / "mine.csv").write_text(text)
    splits = open_data("e2e_nlg", options={"path": str(tmp_path), "least": 1})
    assert splits.peek("train") == 14
    (tmp_path / "mine.csv").write_text("meaning,text\na,b\n")
    with pytest.raises(DataError, match="columns mr and ref"):
        open_data("e2e_nlg", options={"path": str(tmp_path)})
