"""Text as words, words as pieces: offsets, chunks, alignment, and labels that travel between.

Three units appear: *tokens* or *pieces* (what a tokenizer gives), *words* (runs of word
characters, or single symbols), and *chunks* (runs of pieces that fit a window).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from stillhouse.errors import DataError
from stillhouse.losses.sequence import IGNORED

_WORD = r"\w+|[^\w\s]"
_RUN_OR_SYMBOL = re.compile(_WORD)

Style = Literal["wordpiece", "sentencepiece"]
Pooling = Literal["mean", "first"]
Piece = TypeVar("Piece")


class Word(NamedTuple):
    """A word and where it stands: `text == source[start:stop]`."""

    text: str
    start: int
    stop: int


def split_words(text: str, units: Collection[str] = ()) -> list[Word]:
    r"""Words of a text with their offsets: runs of word characters, or single symbols.

    Args:
        text: any text; white space yields no word.
        units: strings that are one word each wherever they stand, white space included
            (a line break, "The answer is"). One that begins or ends with a word character
            does not match inside a longer run.

    Returns:
        Words in order, without overlap.
    """
    if not units:
        return [Word(m.group(), m.start(), m.end()) for m in _RUN_OR_SYMBOL.finditer(text)]
    longest_first = sorted({unit for unit in units if unit}, key=len, reverse=True)
    pattern = "|".join([*map(_as_unit, longest_first), _WORD])
    return [Word(m.group(), m.start(), m.end()) for m in re.finditer(pattern, text)]


def _as_unit(unit: str) -> str:
    left = r"(?<!\w)" if re.match(r"\w", unit) else ""
    right = r"(?!\w)" if re.search(r"\w$", unit) else ""
    return left + re.escape(unit) + right


def count_tokens(text: str) -> int:
    """Roughly how many tokens a large language model makes of `text`, without its tokenizer.

    One per four characters of each run of word characters (rounded up), one per symbol.
    """
    return sum(
        -(-(m.end() - m.start()) // 4) if m.group()[0].isalnum() or m.group()[0] == "_" else 1
        for m in _RUN_OR_SYMBOL.finditer(text)
    )


def lemma(word: str) -> str:
    """An English word's base form by spelling rules alone: plural, -ed, -ing.

    It needs no dictionary and errs on irregular words; both sides of a comparison err alike.
    """
    low = word.lower()
    if low in _IRREGULAR:
        return _IRREGULAR[low]
    for ending, replacement, shortest in _ENDINGS:
        if low.endswith(ending) and len(low) - len(ending) >= shortest:
            return _undouble(low[: -len(ending)] + replacement, ending)
    return low


_IRREGULAR = {
    **dict.fromkeys(("is", "are", "was", "were", "been", "being", "am"), "be"),
    **dict.fromkeys(("has", "had", "having"), "have"),
    **dict.fromkeys(("does", "did", "done", "doing"), "do"),
    **{word: word for word in ("this", "his", "its", "as", "us", "thus", "news")},
    "an": "a",
    "went": "go",
    "gone": "go",
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
}
_ENDINGS = (
    ("sses", "ss", 2),
    ("ies", "y", 2),
    ("ss", "ss", 1),
    ("us", "us", 1),
    ("s", "", 3),
    ("ied", "y", 2),
    ("ing", "", 3),
    ("ed", "", 3),
)


def _undouble(stem: str, ending: str) -> str:
    doubled = len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "lsz"
    return stem[:-1] if ending in ("ing", "ed") and doubled else stem


def chunk(
    tokens: Sequence[str],
    limit: int,
    ends: Collection[str] = (".", "\n"),
    *,
    inclusive: bool = False,
    starts: Sequence[bool] | None = None,
) -> list[tuple[int, int]]:
    """Cut tokens into consecutive chunks, each ending at an end token where there is one.

    Every chunk but the last is cut behind the last end token of its window (its first token
    is not looked at); without one it is cut hard at the window's end.
    Source: microsoft/LLMLingua, `compress.py` (teacher) and `prompt_compressor.py` (student).

    Args:
        tokens: what the tokenizer gave; their concatenation over the chunks is unchanged.
        limit: most tokens in a chunk, > 0.
        ends: tokens that end a chunk.
        inclusive: the released code's window, which counts its last position in: a chunk
            may then hold `limit + 1` tokens.
        starts: which tokens begin a word; a hard cut then falls before such a token where
            the window holds one.

    Returns:
        `[start, stop)` of each chunk.
    """
    if limit < 1:
        raise DataError(f"a chunk must hold at least one token, got limit {limit}")
    count, start, spans = len(tokens), 0, []
    while start < count:
        if start + limit >= count:
            spans.append((start, count))
            break
        last = start + limit - (0 if inclusive else 1)
        end = next((i for i in range(last, start, -1) if tokens[i] in ends), None)
        stop = last + 1 if end is None else end + 1
        if end is None and starts is not None:
            stop = next((i for i in range(stop, start, -1) if starts[i]), stop)
        spans.append((start, stop))
        start = stop
    return spans


class Alignment(NamedTuple):
    """Which source words a compression kept, and how well it can be traced back.

    Attributes:
        labels: per source word, whether it was kept.
        found: compressed words that occur anywhere in the source.
        compressed: compressed words in all.
    """

    labels: list[bool]
    found: int
    compressed: int

    @property
    def compression_rate(self) -> float:
        """Compressed words per source word (0 for an empty source)."""
        return self.compressed / len(self.labels) if self.labels else 0.0

    @property
    def variation_rate(self) -> float:
        """VR: share of compressed words that the source does not hold; 1 when empty."""
        return 1 - (self.found / self.compressed if self.compressed else 0.0)

    @property
    def hitting_rate(self) -> float:
        """HR: compressed words that the source holds, per source word."""
        return self.found / len(self.labels) if self.labels else 0.0

    @property
    def matching_rate(self) -> float:
        """MR: share of source words that are labelled as kept."""
        return sum(self.labels) / len(self.labels) if self.labels else 0.0

    @property
    def alignment_gap(self) -> float:
        """AG = HR - MR: repeated or displaced words raise it, as intended."""
        return self.hitting_rate - self.matching_rate


def align(
    source: Sequence[str],
    compressed: Sequence[str],
    *,
    window: int = 400,
    form: Callable[[str], str] = str.lower,
) -> Alignment:
    """Find each compressed word in the source, near the place of the last hit.

    The search goes outwards from the last hit, forwards before backwards at equal distance;
    no position is labelled twice; an unmatched word changes nothing; a hit farther ahead
    than half the window moves the place by half the window only.
    Source: LLMLingua-2 (arXiv 2403.12968) section 3.2 and the released `label_word.py`.

    Args:
        source: n words of the original.
        compressed: m words of the compression.
        window: search distance s > 0 (the released script is run with 400).
        form: equal forms are equal words; the default ignores case (`lemma` is an option).

    Returns:
        Labels and the counts behind VR, HR, MR and AG.
    """
    if window < 1:
        raise DataError(f"the alignment window must be at least 1, got {window}")
    forms = [form(word) for word in source]
    known = set(forms)
    labels = [False] * len(forms)
    found = place = 0
    for word in compressed:
        wanted = form(word)
        if wanted not in known:
            continue
        found += 1
        hit = _nearest_free(forms, labels, wanted, place, window)
        if hit is None:
            continue
        labels[hit] = True
        place = place + window // 2 if hit - place > window // 2 else hit
    return Alignment(labels, found, len(compressed))


def _nearest_free(
    forms: Sequence[str], labels: Sequence[bool], wanted: str, place: int, window: int
) -> int | None:
    last = len(forms) - 1
    for distance in range(min(window, max(place, last - place) + 1)):
        # Beyond either end the released loop looks at the end again, which changes nothing.
        for position in (min(place + distance, last), max(place - distance, 0)):
            if forms[position] == wanted and not labels[position]:
                return position
    return None


class Filtered(NamedTuple):
    """Indices kept by `percentile_filter`, and the two thresholds."""

    kept: list[int]
    variation: float
    gap: float


def percentile_filter(
    variation: ArrayLike,
    gap: ArrayLike,
    *,
    variation_percentile: float = 90.0,
    gap_percentile: float = 90.0,
    keep_ties: bool = False,
) -> Filtered:
    """Drop the compressions that vary most, then of the rest those that align worst.

    Pass one keeps VR below its percentile; pass two keeps AG below the percentile of what
    pass one kept. Source: LLMLingua-2 section 3.3 and the released `filter.py` (90 and 90;
    the paper's text has 95 and 90).

    Args:
        variation: (N,) variation rates.
        gap: (N,) alignment gaps.
        variation_percentile: of pass one, in [0, 100].
        gap_percentile: of pass two, in [0, 100].
        keep_ties: where a percentile equals the smallest value, most items are equally good
            and the released rule drops them all; True keeps those that equal it.

    Returns:
        Kept indices in order, thresholds (NaN where a pass had nothing to look at).
    """
    rates, gaps = np.asarray(variation, float), np.asarray(gap, float)
    if rates.shape != gaps.shape or rates.ndim != 1:
        raise DataError(
            f"variation rates have shape {rates.shape}, alignment gaps {gaps.shape}; "
            "both must be lists of equal length"
        )
    first, limit = _below(rates, variation_percentile, keep_ties)
    second, gap_limit = _below(gaps[first], gap_percentile, keep_ties)
    return Filtered([int(i) for i in first[second]], limit, gap_limit)


def _below(values: np.ndarray, percentile: float, keep_ties: bool) -> tuple[np.ndarray, float]:
    if values.size == 0:
        return np.zeros(0, int), float("nan")
    threshold = float(np.percentile(values, percentile))
    tied = keep_ties and threshold == values.min()
    return np.flatnonzero(values <= threshold if tied else values < threshold), threshold


class PieceWord(NamedTuple):
    """A word put together from pieces.

    Attributes:
        text: in SentencePiece style with its leading marker.
        probabilities: per piece, forced ones 1.
        unforced: per piece, before forcing.
    """

    text: str
    probabilities: list[float]
    unforced: list[float]


def begins_word(
    piece: str, style: Style, forced: Collection[str] = (), added: Collection[str] = ()
) -> bool:
    """Whether a piece begins a word by the rules of the released compressor.

    Args:
        piece: one token of the encoder.
        style: "wordpiece" (continuations carry "##") or "sentencepiece" (beginnings carry
            a low line "▁"; ASCII punctuation is always a word of its own).
        forced: forced tokens, each a word of its own.
        added: placeholder tokens that stand for forced strings.
    """
    if style == "wordpiece":
        pure = piece.lstrip("#")
        return pure in forced or pure in added or not piece.startswith("##")
    return piece in string.punctuation or piece in forced or piece in added or piece[:1] == "▁"


def merge_pieces(
    pieces: Sequence[str],
    probabilities: Sequence[float],
    *,
    style: Style,
    special: Collection[str],
    forced: Collection[str] = (),
    added: Mapping[str, str] | None = None,
    reserve_digits: bool = False,
    repeat_first: bool = True,
) -> list[PieceWord]:
    """Pieces and their keep probabilities put together to words, as the released code does.

    Special and unknown pieces vanish. Only the first piece of a forced word gets
    probability 1, and `reserve_digits` sets single pieces, so a mixed word may stay below.
    Source: microsoft/LLMLingua, `prompt_compressor.py` and `utils.py`. A first piece that
    begins no word (an error there) begins one here.

    Args:
        pieces: n tokens of the encoder.
        probabilities: n keep probabilities.
        style: how pieces show word boundaries, see `begins_word`.
        special: tokens to skip.
        forced: words that are always kept.
        added: forced string to placeholder token.
        reserve_digits: pieces with a digit get probability 1.
        repeat_first: a continuation repeats the first piece's unforced probability, as
            released; False gives it its own.

    Returns:
        One entry per word.
    """
    placeholders = dict(added or {})
    stand_ins = set(placeholders.values())
    words: list[PieceWord] = []
    for piece, probability in zip(pieces, probabilities, strict=True):
        if piece in special:
            continue
        pure = piece.lstrip("#") if style == "wordpiece" else piece.lstrip("▁")
        begins = begins_word(piece, style, forced, stand_ins)
        value = 1.0 if begins and (pure in forced or pure in stand_ins) else probability
        text = piece if begins else pure
        for original, stand_in in placeholders.items() if begins else ():
            text = text.replace(stand_in, original)
        if reserve_digits and re.search(r"\d", text if begins else piece):
            value = 1.0
        if begins or not words:
            words.append(PieceWord(text, [value], [probability]))
            continue
        word = words[-1]
        word.probabilities.append(value)
        word.unforced.append(word.unforced[0] if repeat_first else probability)
        words[-1] = word._replace(text=word.text + text)
    return words


def pool(values: Sequence[Sequence[float]], how: Pooling = "mean") -> list[float]:
    """One probability per word from those of its pieces: their mean, or the first."""
    if how == "first":
        return [row[0] for row in values]
    return [sum(row) / len(row) for row in values]


def word_of_pieces(words: Sequence[Word], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which word each piece belongs to, by offsets in the same text.

    Args:
        words: in order, without overlap.
        offsets: `(start, stop)` of each piece in order; empty ones (specials) belong to none.

    Returns:
        Per piece the index of the first word it overlaps, -1 for none.
    """
    owners, current = [], 0
    for start, stop in offsets:
        while current < len(words) and words[current].stop <= start:
            current += 1
        inside = current < len(words) and start < stop and words[current].start < stop
        owners.append(current if inside else -1)
    return owners


class LabelRow(NamedTuple):
    """A training row: pieces with specials and padding, attention mask, labels."""

    pieces: list[str]
    mask: list[int]
    labels: list[int]


def spread_labels(
    word_pieces: Sequence[Sequence[str]],
    labels: Sequence[bool | int],
    *,
    length: int,
    first: str = "[CLS]",
    last: str = "[SEP]",
    pad: str = "[PAD]",
    official: bool = False,
) -> LabelRow:
    """Give every piece its word's label; add specials, cut to `length`, pad to `length`.

    Specials come before the cut, so a full row has no closing special.

    Args:
        word_pieces: pieces of each word.
        labels: 0 or 1 per word.
        length: of the row.
        first: opening special.
        last: closing special.
        pad: padding.
        official: the released data set's labels: specials and pads are "drop" (0), and the
            closing special's label is put *before* the last piece, which shifts that
            piece's label by one. The default marks specials and pads as ignored (-100).
    """
    if len(word_pieces) != len(labels):
        raise DataError(f"{len(word_pieces)} words but {len(labels)} labels")
    outside = 0 if official else IGNORED
    pieces = [piece for word in word_pieces for piece in word]
    spread = [int(y) for word, y in zip(word_pieces, labels) for _ in word]
    closed = [outside, *spread, outside]
    if official and spread:
        closed = [0, *spread[:-1], 0, spread[-1]]
    row = [first, *pieces, last][:length]
    missing = length - len(row)
    return LabelRow(
        row + [pad] * missing,
        [int(piece != pad) for piece in row] + [0] * missing,
        closed[:length] + [outside] * missing,
    )
