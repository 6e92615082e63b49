"""One text under two tokenisers: where both have a boundary, and what each says of a word.

Models of different vocabularies share no ids, but they share the text. A *position* of a
tokenisation is a place between its tokens: position k stands behind k of them, 0 before the
first. Two positions meet where the text before them is the same; there both models speak of the
same continuation. Characters are counted in Unicode code points.

Experimental: what is built on this is the offer of our method sheet for Multi-Granularity Semantic
Revision (arXiv 2407.10068), which itself needs one vocabulary; it is ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from stillhouse.parts.phrases import located
from stillhouse.parts.text_spans import split_words
from stillhouse.parts.text_tokens import TextTokens

Span = tuple[int, int]
_BROKEN = "\ufffd"  # how a decoder shows bytes that are no character (yet)


class Reading(NamedTuple):
    """A text and the tokens that say it.

    Attributes:
        text: without what special tokens would add.
        ids: of its tokens, the end token left out.
        spans: `[start, stop)` of each token in the text. Tokens that share a character have the
            same span; a token that the text does not show has an empty one.
        ended: an end token stands behind them.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[Span, ...]
    ended: bool = False


def read(tokens: TextTokens, text: str, *, ended: bool = False) -> Reading:
    """A text as a tokeniser cuts it.

    Args:
        tokens: with a fast tokenizer, which says where its tokens stand.
        text: any.
        ended: the text ends here, so that an end token follows.
    """
    found = tokens.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = tuple((int(start), int(stop)) for start, stop in found["offset_mapping"])
    return Reading(text, tuple(found["input_ids"]), spans, ended)


def spoken(tokens: TextTokens, ids: Sequence[int], said: str = "") -> Reading:
    """Tokens as they were sampled or given, and where they stand in the text they make.

    What a model samples need not be what its tokeniser makes of the text, and bytes need not be
    characters. Where cutting the text gives the same ids, the tokeniser's own offsets are taken;
    else each piece is looked for, and tokens that make up one character together share its span.

    Args:
        tokens: of the model.
        ids: of a response, with or without its end token.
        said: the text it was made of, where that is known: it shows words that are no token. The
            ids may be its beginning only.
    """
    whole = tuple(int(number) for number in ids)
    ended = bool(whole) and whole[-1] == tokens.end
    own = whole[:-1] if ended else whole
    text = tokens.text(list(own))
    for known in (said, text):
        found = read(tokens, known, ended=ended)
        if found.ids == own:
            return found
        if own and found.ids[: len(own)] == own and not ended:
            spans = found.spans[: len(own)]
            return Reading(known[: spans[-1][1]], own, spans)
    pieces = _pieces(tokens.tokenizer, own)
    places = located([piece for piece, _ in pieces], text)
    spans = tuple(
        place for place, (_, count) in zip(places, pieces, strict=True) for _ in range(count)
    )
    return Reading(text, own, spans, ended)


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """Strings of the fewest tokens that are whole characters, and how many tokens each takes."""
    found: list[tuple[str, int]] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        piece = str(tokenizer.decode(list(ids[start:stop])))
        if not piece.endswith(_BROKEN) or stop == len(ids):
            found.append((piece, stop - start))
            start = stop
    return found


def boundaries(reading: Reading) -> list[Span | None]:
    """Where each position stands: behind which character at least, before which at most.

    Args:
        reading: of n tokens.

    Returns:
        n + 1 pairs (end of what is read, start of what follows), between which are only blanks
        that no token says; None where a position is inside of a character, or where text that no
        token says lies around it.
    """
    starts, follows = [], len(reading.text)
    for start, _ in reversed(reading.spans):
        follows = min(follows, start)
        starts.append(follows)
    found: list[Span | None] = []
    behind = 0
    for place, start in enumerate([*reversed(starts), len(reading.text)]):
        if place:
            behind = max(behind, reading.spans[place - 1][1])
        fits = behind <= start and not reading.text[behind:start].strip()
        found.append((behind, start) if fits else None)
    return found


def aligned(ours: Reading, theirs: Reading) -> list[tuple[int, int]]:
    """Positions that meet, each at most once, in order.

    Where several positions of one side stand at the same place (a blank that is a token of its
    own, a token that the text does not show), the last is taken: it speaks of what follows.

    Args:
        ours: of a text.
        theirs: of the same text.

    Returns:
        (position of ours, position of theirs), the beginning and the end among them unless one
        side does not show all of the text.
    """
    first, second = boundaries(ours), boundaries(theirs)
    found = []
    i, j = len(first) - 1, len(second) - 1
    while i >= 0 and j >= 0:
        a, b = first[i], second[j]
        if a is None:
            i -= 1
        elif b is None:
            j -= 1
        elif a[0] > b[1]:
            i -= 1
        elif b[0] > a[1]:
            j -= 1
        else:
            found.append((i, j))
            i, j = i - 1, j - 1
    return found[::-1]


class Unit(NamedTuple):
    """A word, or the end of a text, under two tokenisations that share its boundaries.

    Attributes:
        ours: `[first, stop)` of its tokens on one side; the end token is the one behind all.
        theirs: likewise.
        place: characters before it; the blanks before a word are its own.
        stop: characters before what follows.
        word: its text without blanks; "" for the end. Words whose boundaries are not shared are
            one unit.
    """

    ours: Span
    theirs: Span
    place: int
    stop: int
    word: str


def units(ours: Reading, theirs: Reading) -> list[Unit]:
    """The words of a text as both sides tell them apart, and its end where both have one.

    Args:
        ours: of a text.
        theirs: of the same text.
    """
    text = ours.text
    starts = {word.start for word in split_words(text)} | {len(text)}
    first, second = boundaries(ours), boundaries(theirs)
    cuts: list[tuple[int, int, int]] = []
    for i, j in aligned(ours, theirs):
        a, b = first[i], second[j]
        assert a is not None
        assert b is not None
        place = max(a[0], b[0])
        word = len(text) - len(text[place:].lstrip())
        if word in starts:
            cuts.append((i, j, place))
    found = [
        Unit((i, k), (j, m), place, stop, text[place:stop].strip())
        for (i, j, place), (k, m, stop) in pairwise(cuts)
        if text[place:stop].strip()
    ]
    if cuts and ours.ended and theirs.ended and cuts[-1][:2] == (len(ours.ids), len(theirs.ids)):
        i, j, place = cuts[-1]
        found.append(Unit((i, i + 1), (j, j + 1), place, place, ""))
    return found


def disputed(
    words: Sequence[Unit],
    ours: Sequence[float],
    theirs: Sequence[float],
    agreed: Sequence[bool],
) -> list[int]:
    """Units at which the other side would say something else, the most disputed first.

    The measure is the difference of the log-likelihoods per character, ours less theirs: largest
    where we are sure of what they find unlikely. Blanks count; the end of a text is one character.

    Args:
        words: of a text.
        ours: (n) log-likelihood of each token, the end token's last where there is one.
        theirs: (m) likewise.
        agreed: (m) each token of theirs is their likeliest one: where all of a unit's are, they
            would have said the same.

    Returns:
        Indices into `words`; equal ones in the order of the text.
    """
    apart = {}
    for number, unit in enumerate(words):
        if all(agreed[slice(*unit.theirs)]):
            continue
        difference = sum(ours[slice(*unit.ours)]) - sum(theirs[slice(*unit.theirs)])
        apart[number] = difference / max(1, unit.stop - unit.place)
    return sorted(apart, key=lambda number: -apart[number])


# From the other side's words back to ids ------------------------------------------------------


def first_word(text: str, *, whole: bool) -> str | None:
    """The first word of a continuation, with the blanks before it.

    Args:
        text: what follows.
        whole: nothing could follow, so that its last word is complete.

    Returns:
        None where no word is complete, or where it is not made of characters.
    """
    words = split_words(text)
    if not words or (words[0].stop == len(text) and not whole) or _BROKEN in words[0].text:
        return None
    return text[: words[0].stop]


def sayable(tokens: TextTokens, kept: Sequence[int], word: str) -> list[int] | None:
    """Ids by which a model would go on with a word, if it can say it.

    Args:
        tokens: of the model.
        kept: ids of the response before it.
        word: with the blanks before it, if any.

    Returns:
        The ids; None where they would not make that text behind those kept: a word that is no
        token, or a part of a word for a tokeniser that puts blanks between its tokens.
    """
    before = tokens.text(list(kept))
    wanted = before + word
    tried = [list(read(tokens, part).ids) for part in (word, word.strip())]
    joint = list(read(tokens, wanted).ids)
    if joint[: len(kept)] == list(kept):
        tried.insert(0, joint[len(kept) :])
    unknown = tokens.tokenizer.unk_token_id
    said = [(ids, tokens.text([*kept, *ids])) for ids in tried if ids and unknown not in ids]
    for ids, text in said:
        if text == wanted:
            return ids
    grown = before[-1:].isalnum() and word[:1].isalnum()
    for ids, text in said:
        if not grown and text.split() and "".join(text.split()) == "".join(wanted.split()):
            return ids
    return None
