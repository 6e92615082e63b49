"""A student's own text: the disputed token, the rising threshold, phrases and their tokens."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.adaptive_replay import AdaptiveThreshold, choose_branch, fresh_share
from stillhouse.parts.disputed_token import corrected_prefix, disputed_token
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
