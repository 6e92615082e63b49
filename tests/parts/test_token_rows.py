from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.errors import ModelError
from stillhouse.parts.token_rows import (
    joined,
    moved_left,
    moved_right,
    next_tokens,
    padded,
    predicting,
    prefix_keys,
    prompts,
    response_items,
    responses,
)

# Prompts of 2 and 3 tokens, responses of 3 and 1; the padding id 1 is the end's too.
TOKENS = torch.tensor([[5, 6, 7, 8, 1, 1], [5, 9, 4, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
SAID = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0]]).bool()
BATCH = Batch(
    id=torch.tensor([3, 4]),
    tokens=TOKENS,
    attention_mask=MASK,
    response_mask=SAID,
    response=["x", "y"],
)


def test_logits_at_i_speak_of_the_token_behind() -> None:
    at = predicting(SAID)
    assert at.tolist() == [
        [False, True, True, True, False, False],
        [False, False, True, False, False, False],
    ]
    assert next_tokens(TOKENS)[at].tolist() == [7, 8, 1, 1]
    logits = torch.arange(12.0).reshape(2, 6, 1).expand(2, 6, 3)
    found, tokens, further = response_items(logits, BATCH, torch.arange(12).reshape(2, 6))
    assert found[:, 0].tolist() == [1, 2, 3, 8]
    assert tokens.tolist() == [7, 8, 1, 1]
    assert further.tolist() == [1, 2, 3, 8]
    assert int(responses(BATCH)) == 4
    with pytest.raises(ModelError, match="do not belong"):
        response_items(logits[:, 1:], BATCH)


def test_an_end_token_that_is_the_padding_too_is_learned() -> None:
    _, tokens = response_items(torch.zeros(2, 6, 3), BATCH)
    assert tokens.tolist().count(1) == 2


def test_prompts_are_padded_on_the_left_and_come_back() -> None:
    asked, mask = prompts(BATCH)
    assert mask.tolist() == [[False, True, True], [True, True, True]]
    assert [row[m].tolist() for row, m in zip(asked, mask, strict=True)] == [[5, 6], [5, 9, 4]]
    response, said = padded([torch.tensor([7, 8, 1]), torch.tensor([1])], padding=1)
    made = joined(asked, mask, response, said, padding=1, like=BATCH)
    assert torch.equal(made["tokens"], TOKENS[:, :5])
    assert torch.equal(made["attention_mask"], MASK[:, :5])
    assert torch.equal(made["response_mask"], SAID[:, :5])
    assert made["id"].tolist() == [3, 4]
    assert "response" not in made


def test_moving_keeps_the_order() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=rng) < 0.6
    mask[:, 0] = True
    values = torch.randint(100, (6, 9), generator=rng)
    for move, end in ((moved_left, -1), (moved_right, 0)):
        moved, there = move(values, mask)
        assert bool(there[:, end].all())
        for row in range(6):
            assert moved[row][there[row]].tolist() == values[row][mask[row]].tolist()


def test_prefixes_have_one_number_wherever_they_stand() -> None:
    keys = prefix_keys(TOKENS, MASK)
    assert keys.dtype == torch.int64
    assert int(keys.min()) >= 0
    assert keys[0, 0] == keys[1, 0]  # both begin with 5
    there = keys[MASK]
    assert len(torch.unique(there)) == len(there) - 1
    moved, mask = moved_left(TOKENS, MASK)
    wide = torch.cat([torch.full((2, 3), 7), moved], 1)
    far = torch.cat([torch.zeros(2, 3, dtype=torch.bool), mask], 1)
    again = prefix_keys(wide, far)
    for row in range(2):
        assert again[row][far[row]].tolist() == keys[row][MASK[row]].tolist()


def test_numbers_of_many_prefixes_differ() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (2000, 12), generator=rng)  # many share beginnings, few letters
    keys = prefix_keys(tokens, torch.ones_like(tokens).bool())
    known: dict[tuple[int, ...], int] = {}
    for row, numbers in zip(tokens.tolist(), keys.tolist(), strict=True):
        for stop, number in enumerate(numbers, 1):
            assert known.setdefault(tuple(row[:stop]), number) == number
    assert len(set(known.values())) == len(known)
