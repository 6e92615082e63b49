"""One text under two tokenizers: boundaries, meeting places, words and their dispute."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from stillhouse.parts.text_alignment import (
    Reading,
    Unit,
    aligned,
    boundaries,
    disputed,
    first_word,
    read,
    sayable,
    spoken,
    units,
)
from stillhouse.parts.text_tokens import (
    TextTokens,
    bpe_tokenizer,
    load_tokenizer,
    vocabulary_hash,
    word_tokenizer,
)

pytest.importorskip("transformers")
TEXTS = [
    "In the city, it's cheap.",
    "Blue Spice is in the city centre.",
    "A café – naïve, £20.",
    "The city is blue.",
]


@pytest.fixture(scope="module")
def words() -> TextTokens:
    return TextTokens(word_tokenizer(TEXTS))


@pytest.fixture(scope="module")
def pieces() -> TextTokens:
    return TextTokens(bpe_tokenizer(TEXTS, merges=20), template="{prompt}\n", name="bpe")


def by_hand(text: str, *tokens: str) -> Reading:
    """Each token is looked for behind the one before; "" is not shown."""
    spans, place = [], 0
    for token in tokens:
        start = text.index(token, place) if token else place
        place = start + len(token)
        spans.append((start, place))
    return Reading(text, tuple(range(len(tokens))), tuple(spans), ended=True)


# ----------------------------------------------------------------------------- pure, by hand
def test_a_position_lies_between_what_is_read_and_what_follows():
    found = boundaries(by_hand("the red cat", "the", "red", "cat"))
    assert found == [(0, 0), (3, 4), (7, 8), (11, 11)]
    blanks_said = boundaries(by_hand("the red cat", "the", " red", " ", "cat"))
    assert blanks_said == [(0, 0), (3, 3), (7, 7), (8, 8), (11, 11)]


def test_no_position_within_a_character_or_beside_text_that_is_not_said():
    split = Reading("é!", (1, 2, 3), ((0, 1), (0, 1), (1, 2)))
    assert boundaries(split) == [(0, 0), None, (1, 1), (2, 2)]
    lost = Reading("a b c", (1, 2), ((0, 1), (4, 5)))  # b belongs to no token
    assert boundaries(lost) == [(0, 0), None, (5, 5)]


def test_positions_meet_where_the_text_before_them_is_the_same():
    ours = by_hand("the red cats", "the", "red", "cats")
    theirs = by_hand("the red cats", "t", "he", " red", " ca", "ts")
    assert aligned(ours, theirs) == [(0, 0), (1, 2), (2, 3), (3, 5)]
    across = by_hand("the red cats", "the r", "ed cats")
    assert aligned(ours, across) == [(0, 0), (3, 2)]


def test_of_several_positions_at_one_place_the_last_is_taken():
    ours = by_hand("a cat", "a", "cat")
    blank = by_hand("a cat", "a", " ", "cat")
    assert aligned(ours, blank) == [(0, 0), (1, 2), (2, 3)]
    unseen = by_hand("a cat", "a", "", "cat")  # a token that the text does not show
    assert aligned(ours, unseen) == [(0, 0), (1, 2), (2, 3)]


def test_words_are_units_where_both_have_their_boundaries():
    text = "the red cats."
    ours = by_hand(text, "the", "red", "cats", ".")
    theirs = by_hand(text, "th", "e", " red", " cat", "s", ".")
    assert units(ours, theirs) == [
        Unit((0, 1), (0, 2), 0, 3, "the"),
        Unit((1, 2), (2, 3), 3, 7, "red"),
        Unit((2, 3), (3, 5), 7, 12, "cats"),
        Unit((3, 4), (5, 6), 12, 13, "."),
        Unit((4, 5), (6, 7), 13, 13, ""),  # the end
    ]
    joined = by_hand(text, "the", " red cats", ".")
    assert [unit.word for unit in units(ours, joined)] == ["the", "red cats", ".", ""]
    going_on = ours._replace(ended=False)
    assert [unit.word for unit in units(going_on, theirs)] == ["the", "red", "cats", "."]


def test_the_most_disputed_word_differs_most_per_character():
    found = units(
        by_hand("ab cde f", "ab", "cde", "f"), by_hand("ab cde f", "a", "b", "cd", "e", "f")
    )
    ours = [-0.8, -0.1, -0.2, -0.4]
    theirs = [-1.0, -1.5, -2.0, -2.0, -0.9, -5.0]
    # per character, blanks included: (2.5 - .8) / 2, (4 - .1) / 4, (.9 - .2) / 2, and the end
    disagreeing = [False] * 6
    assert disputed(found, ours, theirs, disagreeing) == [3, 1, 0, 2]
    # a word of which every token is their likeliest is no dispute, one of two is
    assert disputed(found, ours, theirs, [True, False, True, True, True, True]) == [0]
    assert disputed(found, ours, theirs, [True] * 6) == []


def test_a_word_ends_at_the_next_boundary():
    assert first_word(" old town.", whole=False) == " old"
    assert first_word(" ol", whole=False) is None  # it might go on
    assert first_word(" ol", whole=True) == " ol"
    assert first_word(", the", whole=False) == ","
    assert first_word("  ", whole=True) is None
    assert first_word(" \ufffd y", whole=False) is None  # bytes


# ----------------------------------------------------------------------------- real tokenizers
def test_offsets_of_words_and_of_bytes(words: TextTokens, pieces: TextTokens):
    for text, (one, other) in itertools.product(TEXTS, [(words, pieces), (pieces, words)]):
        ours, theirs = read(one, text, ended=True), read(other, text, ended=True)
        met = aligned(ours, theirs)
        assert met[0] == (0, 0)
        assert met[-1] == (len(ours.ids), len(theirs.ids))
        for i, j in met:
            before = [
                one.text(list(ours.ids[:i])).replace(" ", ""),
                other.text(list(theirs.ids[:j])).replace(" ", ""),
            ]
            assert before[0] == before[1]


def test_a_character_cut_in_two_has_no_boundary_within(pieces: TextTokens):
    found = read(pieces, "é")
    assert len(found.ids) == 2
    assert boundaries(found)[1] is None


def test_ids_are_found_in_their_text_however_they_were_sampled(pieces: TextTokens):
    text = "A café – naïve."
    canonical = read(pieces, text, ended=True)
    assert spoken(pieces, [*canonical.ids, pieces.end]) == canonical
    # The same text by bytes alone, as no tokenizer would cut it
    letters = [number for char in text for number in bytes_of(pieces, char)]
    found = spoken(pieces, letters)
    assert found.text == text
    assert not found.ended
    met = aligned(found, canonical)
    assert met[0] == (0, 0)
    assert met[-1] == (len(letters), len(canonical.ids))
    assert len(met) >= 5


def bytes_of(pieces: TextTokens, char: str) -> list[int]:
    """Ids of the bytes of one character."""
    names = bpe_tokenizer([], merges=0)
    told = names.convert_ids_to_tokens(names(char).input_ids)
    known = pieces.tokenizer.get_vocab()
    return [known[name] for name in told]


def test_bytes_that_are_no_character_leave_no_false_boundary(pieces: TextTokens):
    ids = [*bytes_of(pieces, "a"), bytes_of(pieces, "é")[1], *bytes_of(pieces, "bc")]
    found = spoken(pieces, ids)
    assert "\ufffd" in found.text
    whole = boundaries(found)
    assert whole[0] == (0, 0)
    assert whole[-1] == (len(found.text), len(found.text))
    assert all(place is None or place[0] <= place[1] for place in whole)


def test_an_unknown_word_is_seen_where_its_text_is_known(words: TextTokens):
    ids = words.response("The whale is blue.")
    known = spoken(words, ids, "The whale is blue.")
    assert known.text == "The whale is blue."
    assert known.spans[1] == (4, 9)
    unseen = spoken(words, ids)
    assert unseen.text == "The is blue."
    assert unseen.spans[1][0] == unseen.spans[1][1]
    cut = spoken(words, ids[:2], "The whale is blue.")
    assert cut.text == "The whale"


def test_a_word_is_said_by_ids_that_make_it(words: TextTokens, pieces: TextTokens):
    kept = list(read(words, "The city").ids)
    (said,) = sayable(words, kept, " is") or [None]
    assert said == words.tokenizer.get_vocab()["is"]
    assert sayable(words, kept, " whale") is None  # no token of it
    assert sayable(words, kept, "s") is None  # cannot be put behind a word without a blank
    kept = list(read(pieces, "The city").ids)
    for word in (" is", " whale", "s", "."):
        ids = sayable(pieces, kept, word)
        assert ids is not None
        assert pieces.text([*kept, *ids]) == "The city" + word


def test_a_learnt_tokenizer_says_any_text_and_is_the_same_again(pieces: TextTokens):
    for text in (*TEXTS, "Ωx 😀"):
        assert pieces.text(pieces.response(text)) == text
    again = bpe_tokenizer(TEXTS, merges=20)
    assert vocabulary_hash(again) == vocabulary_hash(pieces.tokenizer)
    assert len(bpe_tokenizer(TEXTS, merges=0)) == 258
    assert 258 < len(again) < 278  # no pair is left that occurs twice
    assert len(bpe_tokenizer(TEXTS, merges=3)) == 261


def test_a_released_tokenizer_meets_words(words: TextTokens, real_models: Path):
    place = real_models / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    if not place.exists():
        pytest.skip("SmolLM2 is not among the models (make models)")
    released = TextTokens(load_tokenizer(str(place)), template="{prompt}\n", name="smol")
    for text in TEXTS:
        ours, theirs = read(words, text, ended=True), read(released, text, ended=True)
        found = units(ours, theirs)
        assert "".join(unit.word for unit in found) == text.replace(" ", "")
        assert spoken(released, released.response(text)) == theirs
