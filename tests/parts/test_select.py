from __future__ import annotations

import random

import pytest

from stillhouse.errors import DataError
from stillhouse.parts.select import (
    context_rate,
    drop_repeats,
    keep_above,
    keep_contexts,
    keep_top,
    silence_repeats,
)

PROBABILITIES, COUNTS = (0.9, 0.1, 0.8, 0.2, 0.5), (1, 2, 1, 1, 1)


def test_percentile_selection_of_the_sheet():
    half = keep_above(PROBABILITIES, COUNTS, 0.5)
    assert half.threshold == pytest.approx(0.365)
    assert half.keep == [True, False, True, False, True]
    third = keep_above(PROBABILITIES, COUNTS, 0.33)
    assert third.threshold == pytest.approx(0.62)
    assert third.keep == [True, False, True, False, False]


def test_selection_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["select__cases"]:
        got = keep_above(case["probs"], case["counts"], case["rate"])
        assert got.threshold == pytest.approx(case["threshold"], rel=1e-12, abs=1e-12)
        assert got.keep == [bool(k) for k in case["keep"]]
        top = keep_top(case["probs"], case["counts"], case["rate"])
        assert top == [bool(k) for k in case["topk"]]
    vectors.count("select")


def test_forced_words_survive_any_rate():
    probabilities = [1.0, 0.5, 1.0, 0.2]
    assert keep_above(probabilities, [1] * 4, 0.01).keep == [True, False, True, False]
    top = keep_top(probabilities, [1] * 4, 0.0, forced=[True, False, True, False])
    assert top == [True, False, True, False]


def test_exact_selection_never_exceeds_its_budget():
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 20)
        probabilities = [draw.choice([0.1, 0.5, draw.random()]) for _ in range(count)]
        counts = [draw.randint(1, 4) for _ in range(count)]
        rate = draw.random()
        keep = keep_top(probabilities, counts, rate)
        used = sum(c for c, k in zip(counts, keep) if k)
        assert used <= rate * sum(counts)
        worst = min((p for p, k in zip(probabilities, keep) if k), default=1.0)
        left = [(p, c) for p, c, k in zip(probabilities, counts, keep) if not k]
        best = max((p for p, _ in left), default=0.0)
        assert best <= worst
        if left:
            first = max(left, key=lambda pair: pair[0])
            assert any(used + c > rate * sum(counts) for p, c in left if p == first[0])


def test_everything_is_kept_at_rate_one():
    assert all(keep_top(PROBABILITIES, COUNTS, 1.0))


@pytest.mark.parametrize("select", [keep_above, keep_top])
def test_bad_input_is_told(select):
    with pytest.raises(DataError, match="5 probabilities but 1"):
        select(PROBABILITIES, [1], 0.5)
    with pytest.raises(DataError, match=r"in \[0, 1\], got 1.5"):
        select(PROBABILITIES, COUNTS, 1.5)


def test_nothing_to_select():
    assert keep_above([], [], 0.5).keep == []
    assert keep_above([0.5], [0], 0.5).keep == [False]


def test_repeats_of_a_forced_word_need_a_strong_word_between():
    words = ["a", ".", ".", "b", "."]
    silenced = silence_repeats(words, [0.9, 1.0, 1.0, 0.1, 1.0], {"."}, 0.5)
    assert silenced == [0.9, 1.0, 0.0, 0.1, 0.0]
    strong = silence_repeats(["x", "a", ".", "b", "."], [0.1, 0.3, 0.4, 0.9, 0.5], {"."}, 0.5)
    assert strong == [0.1, 0.3, 0.4, 0.9, 0.5]
    assert silence_repeats(["!", "."], [1.0, 1.0], {".", "!"}, 0.5) == [1.0, 1.0]
    assert silence_repeats([], [], {"."}, 0.5) == []


def test_kept_repeats_fall_to_the_first():
    words = [".", "a", ".", ".", "b", "b"]
    assert drop_repeats(words, [True, False, True, True, True, True], {"."}) == [
        True, False, False, False, True, True,
    ]  # fmt: skip


def test_rate_of_the_context_filter():
    assert context_rate(4, 100, rate=0.5) == 0.75
    assert context_rate(4, 100, rate=1.0) == 1.0
    assert context_rate(4, 100, rate=0.5, token_level=False) == 0.5
    assert context_rate(4, 100, rate=0.5, target_token=20) == 0.4
    assert context_rate(4, 100, rate=0.5, target_token=80) == 1.0
    assert context_rate(4, 100, rate=0.5, target_token=20, token_level=False) == 0.2
    assert context_rate(4, 100, rate=0.5, target_context=1, target_token=20) == 0.25
    assert context_rate(4, 100, rate=0.5, context_level_rate=0.3) == 0.3
    assert context_rate(4, 100, rate=0.5, context_level_tokens=10, target_context=2) == 0.1


def test_contexts_above_their_percentile_and_forced_ones_stay():
    scores = [0.1, 0.4, 0.3, 0.2]
    assert keep_contexts(scores, 0.5) == [False, True, True, False]
    assert keep_contexts(scores, 0.5, [0]) == [True, True, True, False]
    assert keep_contexts(scores, 1.0) == [True] * 4
