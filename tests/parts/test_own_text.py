"""A student's own text: the disputed token, the rising threshold, phrases and their tokens."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.adaptive_replay import AdaptiveThreshold, choose_branch, fresh_share
from stillhouse.parts.band import Band, quantiles
from stillhouse.parts.disputed_token import corrected_prefix, disputed_token
from stillhouse.parts.own_text import Replay, cut
from stillhouse.parts.phrases import located, phrases, token_intervals


def agreeing(tokens: torch.Tensor, classes: int = 9, sure: float = 6.0) -> torch.Tensor:
    """Logits whose likeliest token is that of the text."""
    return sure * torch.nn.functional.one_hot(tokens, classes).double()


# ------------------------------------------------------------------- the disputed token
def test_a_teacher_that_disagrees_once_is_heard_there():
    tokens = torch.tensor([[2, 3, 4, 5, 6], [3, 3, 3, 3, 1]])
    mask = torch.ones_like(tokens)
    student, teacher = agreeing(tokens), agreeing(tokens)
    teacher[0, 3] = agreeing(torch.tensor(8))
    found = disputed_token(student, teacher, tokens, mask)
    assert found.position.tolist() == [3, -1]
    prefix = corrected_prefix(tokens, mask, found, end=1)
    assert prefix.tokens.tolist() == [[2, 3, 4, 8, -1], [3, 3, 3, 3, 1]]
    assert prefix.length.tolist() == [4, 5]
    assert prefix.stops.tolist() == [False, True]


def test_the_largest_divergence_counts_but_only_where_the_texts_part():
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 9, (6, 8), generator=rng)
    mask = torch.arange(8)[None] < torch.tensor([8, 5, 1, 3, 8, 0])[:, None]
    student, teacher = (torch.randn(6, 8, 9, generator=rng).double() for _ in range(2))
    teacher[4] = agreeing(tokens[4])
    student[4] = -agreeing(tokens[4])  # it diverges everywhere, and never disagrees
    student[~mask] = float("nan")  # padding may hold anything
    teacher[~mask] = float("nan")
    found = disputed_token(student, teacher, tokens, mask)
    assert found.position[4] == found.position[5] == -1
    for row in range(4):
        inside = found.candidates[row] & mask[row]
        if not inside.any():
            assert found.position[row] == -1
            continue
        p, q = teacher[row].log_softmax(-1), student[row].log_softmax(-1)
        d = (p.exp() * (p - q)).sum(-1).masked_fill(~inside, -1.0)
        assert found.position[row] == d.argmax()
        assert teacher[row].argmax(-1)[found.position[row]] != tokens[row, found.position[row]]


def test_a_correction_to_the_end_stops():
    tokens = torch.tensor([[4, 5, 6, 7]])
    teacher = agreeing(tokens)
    teacher[0, 1] = agreeing(torch.tensor(1))
    mask = torch.tensor([[1, 1, 1, 0]])
    found = disputed_token(agreeing(tokens), teacher, tokens, mask)
    stops = corrected_prefix(tokens, mask, found, end=1)
    assert stops.stops.tolist() == [True]
    assert stops.length.tolist() == [2]
    assert corrected_prefix(tokens, mask, found, end=None).stops.tolist() == [False]


def test_shapes_that_do_not_fit_are_refused():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ModelError, match="one row per text"):
        disputed_token(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), tokens, tokens)


# ------------------------------------------------------------------- the threshold
def test_the_threshold_rises_with_the_validation_loss_only():
    phi = AdaptiveThreshold(0.0, margin=0.1)
    assert [phi.observe(loss) for loss in (1.0, 1.05, 1.2)] == [0.0, 0.0, 0.1]
    # the loss it is compared with is the one it rose at, not the last one
    assert [round(phi.observe(loss), 6) for loss in (0.5, 1.25, 1.3)] == [0.1, 0.1, 0.2]


def test_the_threshold_goes_on_where_it_was():
    one, other = AdaptiveThreshold(0.5), AdaptiveThreshold(0.5)
    for loss in (1.0, 1.2):
        one.observe(loss)
    other.load_state_dict(one.state_dict())
    assert one.observe(1.4) == other.observe(1.4) == pytest.approx(0.7)
    assert AdaptiveThreshold(1.0).observe(3.0) == 1.0
    with pytest.raises(RecipeError, match=r"\[0, 1\]"):
        AdaptiveThreshold(1.5)


def test_branches():
    assert fresh_share(0.5, 25, 100) == 0.375
    assert choose_branch(0.3, 0.5, 25, 100, full=True) == "sample"
    assert choose_branch(0.4, 0.5, 25, 100, full=True) == "replay"
    assert choose_branch(0.4, 0.5, 25, 100, full=False) == "sample"
    assert choose_branch(0.5, 0.5, 25, 100, full=False) == "truth"
    assert choose_branch(0.0, 0.0, 0, 100, full=False) == "truth"


# ------------------------------------------------------------------- phrases
def test_phrases_of_a_sentence():
    text = "The Vaults pub near Café Adriatic has a 5 star rating, and prices start at £30."
    assert [text[a:b] for a, b in phrases(text)] == [
        "The Vaults pub", "near Café Adriatic", "has", "a 5 star rating", "prices start", "at £30",
    ]  # fmt: skip
    text = "Alimentum is a family-friendly restaurant in the city centre; it isn't cheap!"
    assert [text[a:b] for a, b in phrases(text)] == [
        "Alimentum", "is", "a family-friendly restaurant", "in the city centre", "isn't cheap",
    ]  # fmt: skip
    assert phrases("") == phrases("... !") == phrases("and but") == []


def test_phrases_cover_words_in_order_without_overlap():
    text = "near in the a is not to - 'n' x$ $4 & of course that's \n\t its 3.5-star"
    last = 0
    for start, stop in phrases(text):
        assert last <= start < stop <= len(text)
        assert text[start:stop] == text[start:stop].strip()
        last = stop


def test_spans_become_intervals_of_tokens():
    offsets = [(0, 3), (4, 7), (7, 10), (10, 10), (11, 14)]
    assert token_intervals([(0, 10), (4, 7), (7, 14), (0, 0)], offsets) == [(0, 2), (2, 4)]


def test_tokens_are_located_in_the_text_they_make():
    text = "The vaults pub, 3.5-star."
    pieces = ["The", " vaul", "ts", "<end>", "pub", ",", " ", "3", ".", "5", "-", "star", "."]
    found = located(pieces, text)
    told = ["The", "vaul", "ts", "", "pub", ",", "", "3", ".", "5", "-", "star", "."]
    assert [text[a:b] for a, b in found] == told
    assert located(["x", "The"], text)[1] == (0, 3)


# ------------------------------------------------------------------- the band, rows that are kept
def test_every_item_begins_with_the_same_wide_band():
    torch.manual_seed(0)
    band = Band(6, hidden=4, start=(0.05, 0.9))
    lower, upper = band(torch.randn(7, 6))
    torch.testing.assert_close(lower, torch.full((7,), 0.05))
    torch.testing.assert_close(upper, torch.full((7,), 0.9))
    (lower.sum() + upper.sum()).backward()
    assert band.outer.weight.grad.abs().sum() > 0
    low, high = quantiles(torch.randn(100, 2) * 10)
    assert bool((low <= high).all())
    assert bool((low >= 0).all())
    assert bool((high <= 1).all())
    with pytest.raises(RecipeError, match="lower below upper"):
        Band(6, start=(0.9, 0.1))


def rows_of(lengths: list[int], said: list[int], start: int = 10) -> dict[str, torch.Tensor]:
    width = max(lengths)
    places = torch.arange(width)[None]
    there = places < torch.tensor(lengths)[:, None]
    answer = there & (places >= torch.tensor(lengths)[:, None] - torch.tensor(said)[:, None])
    tokens = (start + torch.arange(len(lengths))[:, None] * 20 + places).masked_fill(~there, 0)
    return {"tokens": tokens, "attention_mask": there, "response_mask": answer}


def test_rows_come_back_from_the_buffer_as_they_went_in():
    replay, rows = Replay(4, longest=9), rows_of([5, 7, 3], [2, 4, 1])
    replay.push(**replay.kept(rows))
    assert not replay.full
    drawn = replay.drawn(3, torch.Generator().manual_seed(0))
    order = drawn["tokens"][:, 0].argsort()
    for name, value in rows.items():
        assert torch.equal(drawn[name][order], value)
    again = replay.drawn(3, torch.Generator().manual_seed(0))
    assert torch.equal(again["tokens"], drawn["tokens"])
    assert len(replay.drawn(8, torch.Generator().manual_seed(1))["tokens"]) == 8


def test_rows_that_are_too_long_lose_their_end():
    rows = rows_of([8, 4], [5, 2])
    found = cut(rows, longest=6, said=9, padding=0)
    assert found["tokens"].shape == (2, 6)
    assert found["response_mask"].sum(1).tolist() == [3, 2]
    found = cut(rows, longest=20, said=1, padding=0)
    assert found["response_mask"].sum(1).tolist() == [1, 1]
    assert found["attention_mask"].sum(1).tolist() == [4, 3]
