"""Phrases of a text as spans of characters, and spans of characters as intervals of tokens.

A chunker is any `chunker(text) -> [(start, stop)]`. The one here reads no parts of speech: English
function words and punctuation say where a phrase begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def located(pieces: Sequence[str], text: str) -> list[Span]:
    """Where each token stands in a text that was made of them.

    Blanks between tokens may be any; a token that is not found where the last one ended (one that
    the text leaves out, or a part of a character) gets the empty span there.

    Args:
        pieces: each token as text, such as `decode([token])`.
        text: what all of them say.

    Returns:
        `[start, stop)` of each, in order.
    """
    found: list[Span] = []
    place = 0
    for piece in pieces:
        word = piece.strip()
        start = place
        while start < len(text) and text[start].isspace():
            start += 1
        if word and text.startswith(word, start):
            place = start + len(word)
            found.append((start, place))
        else:
            found.append((place, place))
    return found
