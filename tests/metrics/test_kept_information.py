from __future__ import annotations

import pytest

from stillhouse.metrics.kept_information import Information
from stillhouse.parts.text_spans import split_words

TEXT = "Marie Curie found radium in 1898. Later Marie Curie moved. The year 1898 mattered."
NAME = [(0, 11), (40, 51)]


def kept(*dropped: str) -> dict[str, float]:
    words = split_words(TEXT)
    information = Information()
    information.add(TEXT, words, [w.text not in dropped for w in words], NAME)
    return information.compute()


def test_everything_kept_tells_everything():
    assert kept() == {"entities": 1.0, "numbers": 1.0, "cloze": 1.0}


def test_one_whole_mention_is_enough():
    words = split_words(TEXT)
    information = Information()
    keep = [not (w.text == "Marie" and w.start == 0) for w in words]
    information.add(TEXT, words, keep, NAME)
    assert information.compute()["entities"] == 1.0
    assert kept("Marie")["entities"] == 0.0


def test_a_question_needs_its_answer_and_its_sentence():
    # Two questions on the first sentence, one on each of the others.
    assert kept("1898")["cloze"] == pytest.approx(2 / 4)
    assert kept("found", "radium", "Curie", "Marie")["cloze"] < kept("found")["cloze"]


def test_kinds_that_never_occur_are_left_out():
    information = Information()
    words = split_words("no names here")
    information.add("no names here", words, [True] * 3)
    assert information.compute() == {}
