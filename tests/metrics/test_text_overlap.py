from __future__ import annotations

import math

import pytest

from stillhouse.metrics.text_overlap import bleu, common_length, overlap, repetition, rouge_l, words

TEXTS = [
    "Blue Spice is a coffee shop in the city centre.",
    "The Mill is a cheap pub near the river.",
]
REFERENCES = [
    [
        "A coffee shop in the city centre area called Blue Spice.",
        "Blue Spice is a coffee shop in city centre.",
    ],
    ["Near the river is a cheap pub, The Mill."],
]


def table(first: str, second: str) -> int:
    """The textbook's dynamic programme."""
    rows = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            rows[i + 1][j + 1] = rows[i][j] + 1 if a == b else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


@pytest.mark.parametrize(
    ("first", "second"),
    [("abcbdab", "bdcaba"), ("", "abc"), ("aaaa", "aa"), ("abc", "xyz"), ("ab" * 50, "ba" * 45)],
)
def test_common_length_is_the_textbooks(first: str, second: str) -> None:
    assert common_length(first, second) == table(first, second)


def test_values_of_the_reference_programs() -> None:
    # sacreBLEU 2 (tokenize none, smoothing exp) and rouge-score on the same tokens.
    assert bleu(TEXTS, REFERENCES) == pytest.approx(0.7503680926466886, abs=1e-12)
    found = [rouge_l(text, known) for text, known in zip(TEXTS, REFERENCES, strict=True)]
    assert found == pytest.approx([20 / 21, 2 / 3], abs=1e-12)


def test_orders_without_a_match_are_smoothed() -> None:
    # Precisions 4/4, then 1/2, 1/4, 1/8 of a match among 3, 2, 1; 4 words against 5.
    expected = (1 * (1 / 6) * (1 / 8) * (1 / 8)) ** 0.25 * math.exp(1 - 5 / 4)
    assert bleu(["a b c d"], [["d c b a e"]]) == pytest.approx(expected, abs=1e-12)


def test_equal_texts_and_none() -> None:
    assert bleu(["one two three four"], [["one two three four"]]) == pytest.approx(1.0)
    assert bleu([""], [["one two three four"]]) == 0.0
    assert rouge_l("", ["a"]) == 0.0
    assert rouge_l("one two", ["three", "Two one two"]) == pytest.approx(0.8)


def test_counts_are_clipped_by_the_references() -> None:
    # Papineni et al. 2002, section 2.1: 2 of 7 "the" count.
    found = bleu(
        ["the the the the the the the"],
        [["the cat is on the mat", "there is a cat on the mat"]],
        order=1,
    )
    assert found == pytest.approx(2 / 7)


def test_repetition_is_the_share_of_repeated_grams() -> None:
    assert repetition("a b c d e f g") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b") == 0.0


def test_words_do_not_depend_on_blanks_or_case() -> None:
    assert words("The city-centre , (£20)") == words("the city - centre,( £ 20 )")


def test_figures_of_a_corpus() -> None:
    found = overlap([*TEXTS, TEXTS[0]], [*REFERENCES, REFERENCES[0]])
    assert found["distinct"] == pytest.approx(2 / 3)
    assert found["rouge_l"] == pytest.approx(100 * (2 * 20 / 21 + 2 / 3) / 3)
    assert found["words"] == pytest.approx((11 + 10 + 11) / 3)
