from __future__ import annotations

import math

import pytest

from stillhouse.parts.word_statistics import BigramModel, DocumentFrequency


def test_common_words_score_low():
    frequency = DocumentFrequency([["The", "cat"], ["the", "dog"], ["the", "the", "end"]])
    assert frequency.idf("the") == pytest.approx(math.log(4 / 4) + 1)
    assert frequency.idf("cat") == pytest.approx(math.log(4 / 2) + 1)
    assert frequency.idf("never") == pytest.approx(math.log(4 / 1) + 1)
    scores = frequency.scores(["The", "cat", "cat"])
    assert scores[1] == scores[2] == pytest.approx((1 + math.log(2)) * frequency.idf("cat"))
    assert scores[0] < scores[1]


def test_bigram_probabilities_by_hand():
    model = BigramModel([["a", "b", "a", "b"], ["a", "c"]], discount=0.5)
    unigram_b = (2 + 1) / (6 + 3 + 1)
    expected = (2 - 0.5) / 3 + 0.5 * 2 / 3 * unigram_b
    assert model.surprisal(["A", "b"])[1] == pytest.approx(-math.log2(expected))


def test_probabilities_sum_to_one_with_the_unseen_word():
    model = BigramModel([["a", "b", "a", "b"], ["a", "c", "b"]])
    for before in ("a", "b", "unseen"):
        seen = [model.surprisal([before, word])[1] for word in ("a", "b", "c")]
        unseen = model.surprisal([before, "zebra"])[1]
        assert sum(2**-s for s in seen) + 2**-unseen == pytest.approx(1.0)


def test_seen_words_surprise_less_and_only_the_left_counts():
    model = BigramModel([["new", "york", "city"]] * 3 + [["old", "city"]])
    assert model.surprisal(["new", "york"])[1] < model.surprisal(["old", "york"])[1]
    first = model.surprisal(["new", "york", "city"])[:2]
    assert first == model.surprisal(["new", "york", "zebra"])[:2]
