"""Phrases of a text as spans of characters, and spans of characters as intervals of tokens.

A chunker is any `chunker(text) -> [(start, stop)]`. The one here reads no parts of speech: English
function words and punctuation say where a phrase begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stillhouse.parts.text_spans import split_words

Span = tuple[int, int]
Chunker = Callable[[str], Sequence[Span]]


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_DETERMINERS = _words(
    "a an the this that these those my your his her its our their some any each every no all both",
    "another many few several much most",
)
_PREPOSITIONS = _words(
    "about above across after against along among around as at before behind below beneath beside",
    "besides between beyond by despite down during except for from in inside into like near of off",
    "on onto out outside over past per since through throughout to toward towards under until up",
    "upon via with within without",
)
_AUXILIARIES = _words(
    "am is are was were be been being do does did have has had having will would shall should can",
    "could may might must",
)
_PARTICLES = _words("not n't never also only just to")
_BREAKS = _words(
    "and or but nor so yet if because while although though whereas when where who whom whose",
    "which what that than then there it he she they we you i him them us me",
)


def phrases(text: str) -> list[Span]:
    """Noun, verb and prepositional phrases of an English text, by function words alone.

    A determiner, a preposition or an auxiliary begins a phrase (a determiner behind a
    preposition goes on with it), other words go on with the one they stand in; conjunctions,
    pronouns and punctuation belong to none. Hyphens and apostrophes join words.

    Args:
        text: any.

    Returns:
        `[start, stop)` of each phrase in order, without overlap.
    """
    found: list[Span] = []
    start = stop = -1
    last = ""

    def close() -> None:
        nonlocal start
        if start >= 0:
            found.append((start, stop))
        start = -1

    for word in split_words(text):
        low = word.text.lower()
        if not (word.text[0].isalnum() or word.text[0] == "_"):
            joins = start >= 0 and low in "-'’&" and word.start == stop
            if joins or (low in "£$€" and start >= 0):
                stop, last = word.stop, low
            elif low in "£$€":
                start, stop, last = word.start, word.stop, low
            else:
                close()
                last = ""
            continue
        joined = start >= 0 and last in {"-", "'", "’", "&"} and word.start == stop
        if not joined and low in _BREAKS and not (low == "that" and last in _PREPOSITIONS):
            close()
            last = ""
            continue
        if not joined and start >= 0 and _begins(low, last):
            close()
        if start < 0:
            start = word.start
        stop, last = word.stop, low
    close()
    return found


def _begins(word: str, last: str) -> bool:
    """Whether a word begins a phrase behind `last`, the word before it in the same one."""
    if word in _DETERMINERS:
        return last not in _PREPOSITIONS and last not in _DETERMINERS
    if word in _AUXILIARIES:
        return last not in _AUXILIARIES and last not in _PARTICLES
    if word in _PARTICLES and last in _AUXILIARIES:
        return False
    return word in _PREPOSITIONS and last not in _PREPOSITIONS


def token_intervals(spans: Sequence[Span], offsets: Sequence[Span]) -> list[tuple[int, int]]:
    """Which tokens each span covers; spans of fewer than two tokens are dropped.

    Args:
        spans: `[start, stop)` in characters, in order.
        offsets: of each token in the same text, in order; empty ones belong to no span.

    Returns:
        First and last token of each span that is left, both included. A token that a span's edge
        cuts belongs to it.
    """
    found = []
    for start, stop in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and start < b and a < b]
        if len(inside) > 1:
            found.append((inside[0], inside[-1]))
    return found


def offsets_of(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[Span]:
    """Where each token stands in the decoded text, for any tokenizer that can only decode.

    Args:
        tokens: ids.
        decode: ids to text.

    Returns:
        `[start, stop)` of each token in `decode(tokens)`; white space in front of a token is not
        counted to it. A token that adds no character (a part of one, or left out) has none.
    """
    text, before, found = decode(list(tokens)), 0, []
    for count in range(1, len(tokens) + 1):
        stop = max(before, min(len(decode(list(tokens[:count]))), len(text)))
        start = before
        while start < stop and text[start].isspace():
            start += 1
        found.append((start, stop))
        before = stop
    return found


def encoded_offsets(tokens: Sequence[int], tokenizer: Any) -> list[Span]:
    """As `offsets_of`, asking a fast tokenizer once where it can read its own text back.

    Args:
        tokens: ids without specials.
        tokenizer: of Hugging Face.
    """

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    if getattr(tokenizer, "is_fast", False):
        back = tokenizer(decode(tokens), add_special_tokens=False, return_offsets_mapping=True)
        if list(back["input_ids"]) == list(tokens):
            return [(int(a), int(b)) for a, b in back["offset_mapping"]]
    return offsets_of(tokens, decode)
