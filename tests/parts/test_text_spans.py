from __future__ import annotations

import random
import re

import numpy as np
import pytest

from stillhouse.errors import DataError
from stillhouse.losses.sequence import IGNORED
from stillhouse.parts.text_spans import (
    align,
    begins_word,
    chunk,
    count_tokens,
    lemma,
    merge_pieces,
    percentile_filter,
    pool,
    split_words,
    spread_labels,
    word_of_pieces,
)

SOURCE = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "sat", "too"]


def bits(text: str) -> list[bool]:
    return [c == "1" for c in text]


# Alignment ------------------------------------------------------------------------------


def test_alignment_follows_the_order_of_the_compression():
    found = align(SOURCE, ["cat", "sat", "mat", "dog", "sat"], window=6)
    assert found.labels == bits("01100100110")
    assert found.variation_rate == 0
    assert found.alignment_gap == 0


def test_repeated_words_open_a_gap_and_far_words_are_not_reached():
    repeated = align(SOURCE, ["the"] * 4, window=6)
    assert sum(repeated.labels) == 3
    assert repeated.hitting_rate == pytest.approx(4 / 11)
    assert repeated.matching_rate == pytest.approx(3 / 11)
    assert repeated.alignment_gap == pytest.approx(1 / 11)
    displaced = align(SOURCE, ["dog", "cat", "bird"], window=6)
    assert displaced.labels == bits("01000000000")
    assert displaced.variation_rate == pytest.approx(1 / 3)
    assert displaced.matching_rate == pytest.approx(1 / 11)


def test_identity_and_empty_compressions():
    same = align(SOURCE, SOURCE)
    assert all(same.labels)
    assert (same.hitting_rate, same.matching_rate, same.compression_rate) == (1, 1, 1)
    empty = align(SOURCE, [])
    assert (empty.variation_rate, empty.matching_rate) == (1, 0)
    assert align([], ["x"]).matching_rate == 0


def test_no_position_is_labelled_twice():
    draw = random.Random(0)
    for _ in range(200):
        source = [draw.choice("abcd") for _ in range(draw.randint(1, 12))]
        compressed = [draw.choice("abcde") for _ in range(draw.randint(0, 15))]
        found = align(source, compressed, window=draw.randint(1, 20))
        assert sum(found.labels) <= min(len(compressed), found.found)
        kept = [w for w, y in zip(source, found.labels) if y]
        for word in set(kept):
            assert kept.count(word) <= compressed.count(word)


def test_equality_ignores_case_or_follows_the_given_form():
    assert align(["Cats", "Run"], ["cats"]).labels == [True, False]
    assert align(["cats", "run"], ["cat"]).labels == [False, False]
    assert align(["cats", "run"], ["cat"], form=lemma).labels == [True, False]


def test_alignment_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["align__cases"]:
        found = align(case["origin"], case["comp"], window=case["window"])
        assert found.labels == [bool(y) for y in case["labels"]]
        kept = [w for w, y in zip(case["origin"], found.labels) if y]
        assert " ".join(kept) == case["retrieval"]
        rates = {
            "comp_rate": found.compression_rate,
            "variation_rate": found.variation_rate,
            "hitting_rate": found.hitting_rate,
            "matching_rate": found.matching_rate,
            "alignment_gap": found.alignment_gap,
        }
        for name, rate in rates.items():
            assert rate == pytest.approx(case[name], rel=1e-12, abs=1e-12), name
    vectors.count("align")


def test_vectors_of_the_released_end_to_end_tests(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["official_tests__cases"]:
        assert f"{case['origin_tokens'] / case['compressed_tokens']:.1f}x" == case["ratio"]
        assert f"{100 * case['compressed_tokens'] / case['origin_tokens']:.1f}%" == case["rate"]
        source = [w.text for w in split_words(case["prompt"]) if w.text != ","]
        kept = [w.text for w in split_words(case["expected"]) if w.text != ","]
        found = align(source, kept, window=400)
        expected = case["align"]
        assert found.labels == [bool(y) for y in expected["labels"]]
        rates = {
            "variation_rate": found.variation_rate,
            "matching_rate": found.matching_rate,
            "hitting_rate": found.hitting_rate,
            "alignment_gap": found.alignment_gap,
            "comp_rate": found.compression_rate,
        }
        for name in rates.keys() & expected.keys():
            assert rates[name] == pytest.approx(expected[name], abs=1e-12), name
        rest = iter(source)
        assert all(word in rest for word in kept) == case["subsequence"]
    vectors.count("official_tests")


# Filter ---------------------------------------------------------------------------------


def test_filter_vectors(golden):
    arrays = golden("llmlingua2").case("filter")
    runs = sorted(name[2:] for name in arrays if name.startswith("vr"))
    assert runs
    for run in runs:
        got = percentile_filter(arrays[f"vr{run}"], arrays[f"ag{run}"])
        assert got.kept == arrays[f"kept{run}"].tolist()
        np.testing.assert_allclose(
            [got.variation, got.gap], arrays[f"thr{run}"], rtol=1e-12, atol=1e-12
        )


def test_filter_drops_a_whole_tie_unless_told_to_keep_it():
    variation, gap = [0.0] * 19 + [0.5], [0.0] * 20
    assert percentile_filter(variation, gap).kept == []
    assert percentile_filter(variation, gap, keep_ties=True).kept == list(range(19))
    assert percentile_filter([], []).kept == []


def test_filter_refuses_lists_of_different_length():
    with pytest.raises(DataError, match=r"\(2,\).*\(3,\)"):
        percentile_filter([0, 1], [0, 1, 2])


# Chunks ---------------------------------------------------------------------------------


def test_chunks_cover_the_text_and_respect_the_limit():
    draw = random.Random(1)
    for _ in range(300):
        tokens = [draw.choice(["a", "b", ".", "\n"]) for _ in range(draw.randint(0, 40))]
        limit = draw.randint(1, 12)
        for inclusive in (False, True):
            spans = chunk(tokens, limit, inclusive=inclusive)
            assert [t for a, b in spans for t in tokens[a:b]] == tokens
            assert all(0 < b - a <= limit + inclusive for a, b in spans)


def test_chunks_end_at_an_end_token_and_hard_cuts_at_a_word():
    tokens = ["a", ".", "b", "c", "d", "e"]
    assert chunk(tokens, 4) == [(0, 2), (2, 6)]
    starts = [True, True, True, True, False, True]
    assert chunk(["a", "b", "c", "d", "##d", "e"], 4, starts=starts) == [(0, 3), (3, 6)]
    with pytest.raises(DataError, match="limit 0"):
        chunk(tokens, 0)


def test_teacher_chunk_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["teacher_chunks__cases"]:
        tokens = case["tokens"]
        spans = chunk(tokens, case["chunk_size"], inclusive=True)
        assert ["".join(tokens[a:b]) for a, b in spans] == case["official"]
        ours = chunk(tokens, case["chunk_size"])
        assert "".join(t for a, b in ours for t in tokens[a:b]) == case["text"]
        assert max(b - a for a, b in ours) <= case["chunk_size"]
    vectors.count("teacher_chunks")


def test_student_chunk_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["student_chunks__cases"]:
        tokens = case["tokens"]
        spans = chunk(tokens, case["max_seq_len"] - 2, case["chunk_end_tokens"], inclusive=True)
        assert [b - a for a, b in spans] == case["sizes"]
        texts = [detokenise(tokens[a:b], case["style"]) for a, b in spans]
        assert texts == case["chunks"]
    vectors.count("student_chunks")


def detokenise(pieces: list[str], style: str) -> str:
    if style == "bert":
        return " ".join(pieces).replace(" ##", "").strip()
    return "".join(pieces).replace("▁", " ").strip()


# Words and pieces -----------------------------------------------------------------------


def test_words_carry_offsets_and_units_are_one_word():
    text = "The answer is 42.\nNo items, item."
    plain = split_words(text)
    assert all(text[w.start : w.stop] == w.text for w in plain)
    assert [w.text for w in plain][:5] == ["The", "answer", "is", "42", "."]
    units = [w.text for w in split_words(text, ["\n", "The answer is", "item"])]
    assert units == ["The answer is", "42", ".", "\n", "No", "items", ",", "item", "."]


def test_count_tokens_counts_four_letters_and_symbols():
    assert count_tokens("") == 0
    assert count_tokens("a abcd abcde ▁x, _") == 1 + 1 + 2 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("word", "base"),
    [("cities", "city"), ("Running", "run"), ("walked", "walk"), ("was", "be"),
     ("glass", "glass"), ("falling", "fall"), ("an", "a"), ("its", "its")],
)  # fmt: skip
def test_lemma(word, base):
    assert lemma(word) == base


def test_merge_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["merge__cases"]:
        words = merge_pieces(
            case["tokens"],
            case["probs"],
            style="wordpiece" if case["style"] == "bert" else "sentencepiece",
            special=set(case["special"]),
            forced=case["force_tokens"],
            added=case["token_map"],
            reserve_digits=case["force_reserve_digit"],
        )
        assert [w.text for w in words] == case["words"]
        assert [w.probabilities for w in words] == case["word_probs"]
        assert [w.unforced for w in words] == case["no_force"]
        forced = [w.probabilities for w in words]
        assert pool(forced) == pytest.approx(case["mean"], abs=1e-12)
        assert pool(forced, "first") == pytest.approx(case["first"], abs=1e-12)
        unforced = pool([w.unforced for w in words])
        assert unforced == pytest.approx(case["mean_no_force"], abs=1e-12)
    vectors.count("merge")


def test_merge_gives_continuations_their_own_score_and_starts_anywhere():
    words = merge_pieces(
        ["##d", "a", "##b"], [0.1, 0.2, 0.4], style="wordpiece", special=(), repeat_first=False
    )
    assert [w.text for w in words] == ["d", "ab"]
    assert words[1].unforced == [0.2, 0.4]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        merge_pieces(["a"], [0.1, 0.2], style="wordpiece", special=())


def test_begin_of_word_rules():
    assert begins_word("a", "wordpiece")
    assert not begins_word("##a", "wordpiece")
    assert begins_word("##item", "wordpiece", forced=["item"])
    assert begins_word("▁a", "sentencepiece")
    assert begins_word(",", "sentencepiece")
    assert not begins_word("a", "sentencepiece")
    assert begins_word("[NEW0]", "sentencepiece", added={"[NEW0]"})


def test_pieces_find_their_word_by_offsets():
    text = "One two-three."
    words = split_words(text)
    offsets = [(0, 0), (0, 2), (2, 3), (3, 7), (7, 8), (8, 13), (13, 14), (0, 0)]
    assert word_of_pieces(words, offsets) == [-1, 0, 0, 1, 2, 3, 4, -1]
    assert word_of_pieces(words, [(3, 4)]) == [-1]


# Labels on pieces -----------------------------------------------------------------------


def wordpieces(word: str) -> list[str]:
    pieces = []
    for part in re.findall(r"\w+|[^\w\s]", word):
        cut = [part[i : i + 4] for i in range(0, len(part), 4)]
        pieces += [cut[0], *("##" + c for c in cut[1:])]
    return pieces


def test_label_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["train_labels__cases"]:
        pieces = [wordpieces(word) for word in case["words"]]
        for official, name in ((True, "labels_official"), (False, "labels_corrected")):
            row = spread_labels(pieces, case["labels"], length=case["max_len"], official=official)
            assert row.pieces == case["pieces"]
            assert row.mask == case["mask"]
            assert row.labels == case[name]
    vectors.count("train_labels")


def test_specials_and_pads_are_ignored():
    row = spread_labels([["a"], ["b", "##c"]], [1, 0], length=7)
    assert row.labels == [IGNORED, 1, 0, 0, IGNORED, IGNORED, IGNORED]
    assert row.mask == [1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(DataError, match="1 words but 2 labels"):
        spread_labels([["a"]], [1, 0], length=4)
