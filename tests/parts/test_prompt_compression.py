from __future__ import annotations

import random
import re

import pytest
import torch

from stillhouse.errors import DataError, RecipeError
from stillhouse.parts.prompt_compression import (
    Compression,
    ReleasedRoute,
    SurfaceRoute,
    compress,
)
from stillhouse.parts.text_reader import CodeReader
from stillhouse.parts.text_spans import Word, count_tokens, split_words

ADDED = [f"[NEW{i}]" for i in range(8)]
SPECIAL = {
    "bert": ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"],
    "xlmr": ["<s>", "</s>", "<pad>", "<unk>", "<mask>"],
}


class StubTokenizer:
    """The stub of the reference vectors: four letters a piece, in one of two styles."""

    def __init__(self, style: str) -> None:
        self.style = style
        self.special = SPECIAL[style]
        self.unknown = SPECIAL[style][3]
        self.names = list(SPECIAL[style])

    def tokenize(self, text: str) -> list[str]:
        pieces = []
        for part in re.split(r"(\[NEW[0-7]\])", text):
            pieces += [part] if part in ADDED else self._cut(part)
        return pieces

    def _cut(self, text: str) -> list[str]:
        pieces = []
        for m in re.finditer(r"(\s*)(\w+|[^\w\s])", text):
            word = m.group(2)
            cut = [word[i : i + 4] for i in range(0, len(word), 4)]
            if self.style == "bert":
                pieces += [cut[0], *("##" + c for c in cut[1:])]
            else:
                begins = m.group(1) or m.start() == 0
                pieces += ["▁" * bool(begins) + cut[0], *cut[1:]]
        return pieces

    def convert_tokens_to_ids(self, pieces: list[str]) -> list[int]:
        return [self._id(piece) for piece in pieces]

    def _id(self, piece: str) -> int:
        foreign = piece in {s for group in SPECIAL.values() for s in group} - set(self.special)
        piece = self.unknown if "☃" in piece or foreign else piece
        if piece not in self.names:
            self.names.append(piece)
        return self.names.index(piece)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.names[i] for i in ids]

    def convert_tokens_to_string(self, pieces: list[str]) -> str:
        if self.style == "bert":
            return " ".join(pieces).replace(" ##", "").strip()
        return "".join(pieces).replace("▁", " ").strip()


def released(case: dict, settings: Compression) -> ReleasedRoute:
    tokenizer = StubTokenizer(case["style"])
    known = {tuple(chunk["tokens"]): chunk["probs"] for chunk in case["chunks"]}

    def score(rows):
        return [known[tuple(tokenizer.convert_ids_to_tokens(row))] for row in rows]

    return ReleasedRoute(
        tokenizer,
        score,
        settings,
        style="wordpiece" if case["style"] == "bert" else "sentencepiece",
        special=set(tokenizer.special),
        placeholders=ADDED,
        length=case["max_seq_len"],
    )


def settings_of(args: dict) -> Compression:
    given = dict(args)
    for name in ("target_token", "target_context", "context_level_target_token"):
        if given.get(name, -1) < 0:
            given.pop(name, None)
    given["force_context_ids"] = given.get("force_context_ids") or ()
    return Compression(**given)


def test_compress_vectors(golden):
    vectors = golden("llmlingua2")
    for case in vectors.json["compress__cases"]:
        settings = settings_of(case["args"])
        got = compress(case["contexts"], released(case, settings), settings, count_tokens)
        assert got.text == case["compressed_prompt"]
        assert got.contexts == case["compressed_prompt_list"]
        assert got.origin_tokens == case["origin_tokens"]
        assert got.compressed_tokens == case["compressed_tokens"]
        assert (got.ratio, got.rate) == (case["ratio"], case["rate"])
        labelled = "\t\t|\t\t".join(f"{word} {int(flag)}" for word, flag in got.words)
        assert labelled == case["labeled"]
    vectors.count("compress")


def test_vectors_of_the_specials(golden):
    """Whatever the encoder, released inputs are wrapped in BERT's specials."""
    vectors = golden("llmlingua2")
    case = vectors.json["inference_specials__xlmr"]
    tokenizer = StubTokenizer("xlmr")
    seen = []

    def score(rows):
        seen.extend(tokenizer.convert_ids_to_tokens(row) for row in rows)
        return [[0.5] * len(row) for row in rows]

    route = ReleasedRoute(
        tokenizer, score, Compression(), style="sentencepiece", special=set(tokenizer.special),
        placeholders=ADDED, length=len(case["mask"]),
    )  # fmt: skip
    route.score(route.windows(case["text"]))
    real = [piece for piece, mask in zip(case["pieces"], case["mask"]) if mask]
    assert seen == [real]
    vectors.count("inference_specials")


def test_a_released_rate_of_one_returns_the_windows():
    text = "We meet again. It is May 3!"
    route = released({"style": "bert", "chunks": [], "max_seq_len": 8}, Compression(rate=1.0))
    got = compress([text], route, Compression(rate=1.0), count_tokens)
    assert got.text == "We meet again .It is May 3 !"
    assert [word for word, _ in got.words] == ["We", "meet", "again", "It", "is", "May", "3", "!"]
    assert all(flag for _, flag in got.words)
    with pytest.raises(DataError, match="9 force_tokens"):
        released(
            {"style": "bert", "chunks": [], "max_seq_len": 8},
            Compression(force_tokens=list("abcdefghi")),
        )


# Ours -----------------------------------------------------------------------------------

LETTERS = CodeReader(split_words, lambda word: torch.tensor([len(word)]), 6)


def surface(settings: Compression, probability=None, reader=LETTERS) -> SurfaceRoute:
    def score(rows):
        chance = probability or (lambda code: min(float(code[0]), 9.0) / 10)
        return [[chance(code) for code in row] for row in rows]

    return SurfaceRoute(reader, score, settings)


def run(texts, probability=None, reader=LETTERS, **given):
    settings = Compression(**given)
    texts = [texts] if isinstance(texts, str) else texts
    return compress(texts, surface(settings, probability, reader), settings, count_tokens)


def test_words_come_out_in_order_as_they_were_written():
    draw = random.Random(0)
    alphabet = ["a", "Be", "cat.", "(dog", "é,", "☃☃", "\n", "12", "x-y", "."]
    for _ in range(200):
        text = " ".join(draw.choice(alphabet) for _ in range(draw.randint(1, 40)))
        given = {
            "rate": draw.uniform(0.01, 0.99),
            "select": draw.choice(["percentile", "exact"]),
            "force_tokens": draw.choice([(), (".", "\n"), ("cat",)]),
            "drop_consecutive": draw.random() < 0.5,
            "force_reserve_digit": draw.random() < 0.5,
        }
        got = run(text, **given)
        words = [w.text for w in split_words(text, given["force_tokens"])]
        assert [word for word, _ in got.words] == words
        kept = [word for word, flag in got.words if flag]
        assert "".join(got.text.split()) == "".join("".join(kept).split())
        rest = iter(words)
        assert all(word in rest for word in kept)


def test_a_rate_of_one_returns_everything():
    text = "  As it was: \n\n(untouched), 100 %  ☃ "
    for given in ({"rate": 1.0}, {"rate": 5}, {"target_token": 999}):
        got = run(text, **given)
        assert got.text == text
        assert got.rate == "100.0%"


def test_white_space_follows_the_source():
    reader = CodeReader(split_words, lambda w: torch.tensor([0 if "lost" in w else 9]), 50)
    for text, short in {
        "keep lost, this": "keep, this",
        "keep (lost this) here": "keep (this) here",
        "one lost-two": "one-two",
        "one , lost two": "one , two",
        "a-lost-b": "a--b",
        "one\n\nlost two": "one two",
    }.items():
        total = count_tokens(text)
        got = run(text, reader=reader, rate=(total - 0.5) / total, select="exact")
        assert got.text == short


def test_forced_words_and_digits_survive():
    text = "one two. three B12 four five. six\nseven"
    got = run(text, probability=lambda c: 0.3, rate=0.2, force_tokens=[".", "\n"],
              force_reserve_digit=True)  # fmt: skip
    assert [w for w, flag in got.words if flag] == [".", "B12", ".", "\n"]
    assert got.text == ". B12."
    exact = run(text, rate=0.05, select="exact", force_tokens=["."], force_reserve_digit=True)
    assert [w for w, flag in exact.words if flag] == [".", "B12", "."]


def test_repeats_with_nothing_between_are_dropped():
    text = "strong. a. b. strong."
    chance = {1: 0.1, 6: 0.9}
    reader = CodeReader(split_words, lambda w: torch.tensor([len(w)]), 50)
    for select in ("percentile", "exact"):
        got = run(text, lambda c: chance[int(c[0])], rate=0.8, force_tokens=["."],
                  drop_consecutive=True, select=select, reader=reader)  # fmt: skip
        assert [flag for word, flag in got.words if word == "."] == [True, False, False, True]


def test_units_of_several_words_are_forced_as_one():
    got = run("so The answer is 42 indeed", rate=0.3, force_tokens=["The answer is"])
    assert ("The answer is", True) in got.words


def test_windows_cover_every_word_and_fit_the_model():
    draw = random.Random(2)
    for _ in range(100):
        text = " ".join(draw.choice(["aa", "b.", "cc\n", "d, e"]) for _ in range(30))
        route = surface(Compression(force_tokens=["\n"]))
        windows = route.windows(text)
        assert all(len(w.codes) <= LETTERS.room for w in windows)
        words = [word for w in windows for word in w.words]
        assert words == split_words(text, ["\n"])
        assert all(0 <= o < len(w.words) or o == -1 for w in windows for o in w.owners)
    assert surface(Compression()).windows("   ") == []
    assert run("   ").text == ""


def test_windows_end_at_sentences_and_lines():
    route = surface(Compression())
    texts = [w.text for w in route.windows("a b c. d e f g\nh i j k l m n")]
    assert texts == ["a b c.", "d e f g", "h i j k l m", "n"]


def test_a_word_without_pieces_is_kept():
    class Deaf(CodeReader):
        def read(self, text):
            reading = super().read(text)
            heard = [i for i, piece in enumerate(reading.pieces) if piece != "☃"]
            return reading._replace(
                codes=reading.codes[heard], offsets=[reading.offsets[i] for i in heard]
            )

    deaf = Deaf(split_words, lambda word: torch.tensor([len(word)]), 6)
    got = run("☃ longword a ☃ b c d e f g h", reader=deaf, rate=0.3, select="exact")
    assert got.words[0] == ("☃", True)
    assert run("☃", reader=deaf, rate=0.5).words == [("☃", True)]


def test_weak_contexts_go_first_and_forced_ones_stay():
    texts = ["aaaaaaaa bbbbbbbb", "a b c d", "cccccc dddddd", "e f g h"]
    got = run(texts, rate=0.5, use_context_level_filter=True, target_context=2)
    assert len(got.contexts) == 2
    assert not any(flag for word, flag in got.words if len(word) == 1)
    forced = run(texts, rate=0.9, use_context_level_filter=True, target_context=1,
                 force_context_ids=[1], use_token_level_filter=False)  # fmt: skip
    assert forced.contexts == ["aaaaaaaa bbbbbbbb", "a b c d"]
    single = run(texts[:1], rate=0.9, use_context_level_filter=True, target_context=0)
    assert len(single.contexts) == 1


def test_a_target_in_tokens_sets_the_rate():
    text = " ".join(["word"] * 50 + ["longerword"] * 10)
    got = run(text, target_token=20, select="exact",
              reader=CodeReader(split_words, lambda w: torch.tensor([len(w)]), 100))  # fmt: skip
    assert 17 <= got.compressed_tokens <= 20


@pytest.mark.parametrize(
    ("given", "words"),
    [({"rate": 0}, "above 0"), ({"select": "best"}, "'exact'"), ({"token_to_word": "max"}, "mean")],
)
def test_bad_settings_are_told(given, words):
    with pytest.raises(RecipeError, match=words):
        Compression(**given)


def test_offsets_find_the_words_again():
    text = "One two, three."
    route = surface(Compression())
    scored = [w for words in route.score(route.windows(text)) for w in words]
    assert [Word(w.text, w.start, w.stop) for w in scored] == split_words(text)
