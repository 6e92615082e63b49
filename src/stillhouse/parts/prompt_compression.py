"""Compressing prompts by keep probabilities: windows, forced words, selection, contexts.

Two routes lead from a text to words with probabilities. `SurfaceRoute` (ours) keeps offsets:
its output is made of pieces of the source, whatever the tokenizer does. `ReleasedRoute`
repeats the released compressor of LLMLingua-2 step by step, so that its outputs can be traced.
Both end in `compress`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from stillhouse.errors import DataError, RecipeError
from stillhouse.parts.select import (
    context_rate,
    drop_repeats,
    keep_above,
    keep_contexts,
    keep_top,
    silence_repeats,
)
from stillhouse.parts.text_reader import Reading, TextReader
from stillhouse.parts.text_spans import (
    Pooling,
    Style,
    Word,
    chunk,
    merge_pieces,
    pool,
    split_words,
    word_of_pieces,
)

_SYMBOLS = frozenset('<>=/!@#$%^&*()?":{}|\\`~;+-')


@dataclass(frozen=True)
class Compression:
    """What is asked of a compression; the names are those of the released compressor.

    Attributes:
        rate: share of tokens to keep, > 0; 1 or more returns everything.
        target_token: tokens to keep, in place of `rate`.
        select: "percentile" keeps words above a percentile of each window (the released
            rule; the rate is met roughly), "exact" the most probable words that fit.
        token_to_word: a word's probability is the mean of its pieces', or the first's.
        force_tokens: words that are always kept.
        force_reserve_digit: words with a digit are always kept.
        drop_consecutive: a forced word that repeats the last one is dropped.
        chunk_end_tokens: windows end behind these where they can.
        use_context_level_filter: drop whole contexts first.
        use_token_level_filter: then drop words.
        target_context: contexts to keep.
        context_level_rate: share of contexts to keep; 1 for "not said".
        context_level_target_token: tokens the kept contexts may hold.
        force_context_ids: contexts that are always kept.
    """

    rate: float = 0.5
    target_token: int | None = None
    select: Literal["percentile", "exact"] = "percentile"
    token_to_word: Pooling = "mean"
    force_tokens: Sequence[str] = ()
    force_reserve_digit: bool = False
    drop_consecutive: bool = False
    chunk_end_tokens: Sequence[str] = (".", "\n")
    use_context_level_filter: bool = False
    use_token_level_filter: bool = True
    target_context: int | None = None
    context_level_rate: float = 1.0
    context_level_target_token: int | None = None
    force_context_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise RecipeError(f"the rate is the share of tokens to keep, above 0, got {self.rate}")
        if self.select not in ("percentile", "exact"):
            raise RecipeError(f"select is 'percentile' or 'exact', got {self.select!r}")
        if self.token_to_word not in ("mean", "first"):
            raise RecipeError(f"token_to_word is 'mean' or 'first', got {self.token_to_word!r}")


class ScoredWord(NamedTuple):
    """A word with its probability of being kept.

    Attributes:
        text: as its route writes it.
        probability: with forced words at 1.
        unforced: before forcing; None where the model said nothing of the word.
        forced: it is kept whatever happens.
        start: offset in the context; -1 where the route has none.
        stop: end of it.
    """

    text: str
    probability: float
    unforced: float | None
    forced: bool = False
    start: int = -1
    stop: int = -1


@dataclass(frozen=True)
class Compressed:
    """A compressed prompt and its account.

    Attributes:
        text: contexts joined by a blank line.
        contexts: those that were kept, compressed.
        origin_tokens: tokens of the original contexts.
        compressed_tokens: tokens of the result.
        words: every word of every context with its flag.
    """

    text: str
    contexts: list[str]
    origin_tokens: int
    compressed_tokens: int
    words: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def ratio(self) -> str:
        """How many times shorter, such as "3.1x"."""
        return f"{self._ratio:.1f}x"

    @property
    def rate(self) -> str:
        """The share that is left, such as "32.4%"."""
        return f"{1 / self._ratio * 100:.1f}%"

    @property
    def _ratio(self) -> float:
        return self.origin_tokens / self.compressed_tokens if self.compressed_tokens else 1.0


Window = TypeVar("Window")


class Route(Protocol[Window]):
    """From contexts to scored words, and back to text."""

    def windows(self, context: str) -> list[Window]:
        """A context cut into windows of the model."""
        ...

    def score(self, windows: Sequence[Window]) -> list[list[ScoredWord]]:
        """The words of each window."""
        ...

    def text(self, window: Window) -> str:
        """The window's text, for counting tokens."""
        ...

    def shown(self, word: ScoredWord) -> str:
        """The word for people."""
        ...

    def joined(self, context: str, kept: Sequence[Sequence[ScoredWord]]) -> str:
        """The kept words of a context's windows as text."""
        ...

    def whole(self, context: str, windows: Sequence[Window]) -> tuple[str, list[str]]:
        """A context that is not compressed: its text and words."""
        ...


def compress(
    contexts: Sequence[str],
    route: Route[Any],
    settings: Compression,
    count: Callable[[str], int],
) -> Compressed:
    """Compress a prompt of one or several contexts.

    Source: LLMLingua-2 (arXiv 2403.12968) section 4 and the released
    `compress_prompt_llmlingua2`.

    Args:
        contexts: texts of the prompt.
        route: how words are found and scored.
        settings: what is asked.
        count: tokens of a text as the reader of the result counts them.
    """
    origin = sum(count(context) for context in contexts)
    windows = [route.windows(context) for context in contexts]
    chosen = [True] * len(contexts)
    dropped: list[list[ScoredWord]] = [[] for _ in contexts]
    rate = settings.rate
    held = origin
    if settings.use_context_level_filter and len(contexts) > 1:
        chosen, dropped = _choose_contexts(windows, route, settings, origin)
        held = sum(count(route.text(w)) for ws, c in zip(windows, chosen) if c for w in ws)
    if settings.target_token is not None:
        rate = min(settings.target_token / held, 1.0) if held else 1.0
    texts, words = [], list[tuple[str, bool]]()
    for context, own, keep, left in zip(contexts, windows, chosen, dropped):
        if not keep:
            words += [(route.shown(word), False) for word in left]
        elif rate >= 1 or not settings.use_token_level_filter:
            text, found = route.whole(context, own)
            texts.append(text)
            words += [(word, True) for word in found]
        else:
            kept, labelled = _choose_words(route, own, settings, rate, count)
            texts.append(route.joined(context, kept))
            words += labelled
    return Compressed("\n\n".join(texts), texts, origin, sum(map(count, texts)), words)


def _choose_contexts(
    windows: Sequence[Sequence[Any]], route: Route[Any], settings: Compression, origin: int
) -> tuple[list[bool], list[list[ScoredWord]]]:
    rate = context_rate(
        len(windows),
        origin,
        rate=settings.rate,
        target_token=settings.target_token,
        target_context=settings.target_context,
        context_level_rate=settings.context_level_rate,
        context_level_tokens=settings.context_level_target_token,
        token_level=settings.use_token_level_filter,
    )
    words = [[word for ws in route.score(own) for word in ws] for own in windows]
    scores = [_mean([w.unforced for w in own if w.unforced is not None]) for own in words]
    return keep_contexts(scores, rate, settings.force_context_ids), words


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _choose_words(
    route: Route[Any],
    windows: Sequence[Any],
    settings: Compression,
    rate: float,
    count: Callable[[str], int],
) -> tuple[list[list[ScoredWord]], list[tuple[str, bool]]]:
    kept, labelled = [], list[tuple[str, bool]]()
    for words in route.score(windows):
        flags = _flags(words, settings, rate, count)
        kept.append([word for word, flag in zip(words, flags) if flag])
        labelled += [(route.shown(word), flag) for word, flag in zip(words, flags)]
    return kept, labelled


def _flags(
    words: Sequence[ScoredWord],
    settings: Compression,
    rate: float,
    count: Callable[[str], int],
) -> list[bool]:
    texts, forced = [w.text for w in words], settings.force_tokens
    values = [w.probability for w in words]
    if settings.drop_consecutive:
        values = silence_repeats(texts, values, forced, rate)
    counts = [count(text) for text in texts]
    if settings.select == "exact":
        firm = [w.forced and value == 1.0 for w, value in zip(words, values)]
        flags = keep_top(values, counts, rate, forced=firm)
    else:
        flags = keep_above(values, counts, rate).keep
        # A forced word without a token of its own (a line break) has no place in the percentile.
        flags = [
            flag or (w.forced and value == 1.0) for flag, w, value in zip(flags, words, values)
        ]
    return drop_repeats(texts, flags, forced) if settings.drop_consecutive else flags


# Ours --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SurfaceWindow:
    """Some words of a context, and the pieces that speak for them."""

    text: str
    words: list[Word]
    codes: Tensor
    owners: list[int]  # index into `words` for each piece, -1 for none


ScoreRows = Callable[[Sequence[Tensor]], list[list[float]]]


class SurfaceRoute:
    """Words by offsets in the source; nothing is detokenised, unknown words stay.

    Deviations from the released compressor, each for a trap of it: windows never exceed the
    model, are not tokenised twice and do not cut words; the encoder's own specials are used;
    a forced word or one with a digit is forced as a whole; words the tokenizer does not know
    keep their text; the output is joined as the source was spaced.

    Args:
        reader: of the model.
        score: keep probability of each piece of each row of codes (without specials).
        settings: which words are forced, where windows end, how pieces are pooled.
    """

    def __init__(self, reader: TextReader, score: ScoreRows, settings: Compression) -> None:
        self.reader, self.score_rows, self.settings = reader, score, settings

    def windows(self, context: str) -> list[SurfaceWindow]:
        """Cut at end tokens, else between words."""
        words = split_words(context, self.settings.force_tokens)
        reading = self.reader.read(context)
        owners = word_of_pieces(words, reading.offsets)
        cut = cut_reading(context, reading, owners, self.reader.room, self.settings)
        if not cut:
            return [SurfaceWindow(context, words, reading.codes, [])] if words else []
        # A word belongs to the window of its first piece; one without pieces to the window
        # of the word before it.
        firsts = [next((o for o in owners[a:b] if o >= 0), None) for a, b in cut]
        begins = [first if first is not None else len(words) for first in firsts]
        begins[0] = 0
        edges = [*begins, len(words)]
        found = []
        for (start, stop), (low, high) in zip(cut, pairwise(edges)):
            own = [o - low if low <= o < high else -1 for o in owners[start:stop]]
            end = words[high - 1].stop if high > low else words[low - 1].stop if low else 0
            begin = words[low].start if high > low else end
            text = context[begin:end]
            found.append(SurfaceWindow(text, words[low:high], reading.codes[start:stop], own))
        return found

    def score(self, windows: Sequence[SurfaceWindow]) -> list[list[ScoredWord]]:
        """Probabilities of the windows' words."""
        rows = self.score_rows([w.codes for w in windows])
        return [self._words(w, row) for w, row in zip(windows, rows, strict=True)]

    def _words(self, window: SurfaceWindow, row: Sequence[float]) -> list[ScoredWord]:
        pieces: list[list[float]] = [[] for _ in window.words]
        for owner, value in zip(window.owners, row):
            if owner >= 0:
                pieces[owner].append(value)
        scored = []
        for word, values in zip(window.words, pieces):
            forced = word.text in self.settings.force_tokens or (
                self.settings.force_reserve_digit and any(c.isdigit() for c in word.text)
            )
            own = pool([values], self.settings.token_to_word)[0] if values else None
            # Of a word without pieces the model has said nothing: it is kept.
            value = 1.0 if forced or own is None else own
            scored.append(ScoredWord(word.text, value, own, forced, word.start, word.stop))
        return scored

    def text(self, window: SurfaceWindow) -> str:
        """The window's part of the source."""
        return window.text

    def shown(self, word: ScoredWord) -> str:
        """The word as it stands in the source."""
        return word.text

    def joined(self, context: str, kept: Sequence[Sequence[ScoredWord]]) -> str:
        """Kept words, with a blank where the source has white space between them.

        A symbol stays close to the side on which it had no white space.
        """
        text = ""
        previous: ScoredWord | None = None
        for word in (w for window in kept for w in window):
            if previous is not None and _apart(context, previous, word):
                text += " "
            text += word.text
            previous = word
        return text.strip()

    def whole(self, context: str, windows: Sequence[SurfaceWindow]) -> tuple[str, list[str]]:
        """The context, unchanged."""
        return context, [word.text for window in windows for word in window.words]


def _apart(context: str, left: ScoredWord, right: ScoredWord) -> bool:
    gap = context[left.stop : right.start]
    if left.text.isspace() or right.text.isspace() or not any(c.isspace() for c in gap):
        return False
    behind = left.text[-1].isalnum() or gap[0].isspace()
    return behind and (right.text[0].isalnum() or gap[-1].isspace())


def cut_reading(
    text: str,
    reading: Reading,
    owners: Sequence[int],
    room: int,
    settings: Compression,
) -> list[tuple[int, int]]:
    """Windows of a reading: at most `room` pieces, ending at end tokens or between words.

    Args:
        text: that was read.
        reading: its pieces.
        owners: the word of each piece, -1 for none.
        room: most pieces.
        settings: whose `chunk_end_tokens` count; white space counts by standing in the gap
            behind a piece.
    """
    blank = [end for end in settings.chunk_end_tokens if end.isspace()]
    marks = []
    ends = [*(start for start, _ in reading.offsets[1:]), len(text)]
    for (start, stop), following in zip(reading.offsets, ends):
        gap = next((end for end in blank if end in text[stop:following]), None)
        marks.append(text[start:stop] if gap is None else gap)
    starts = [i == 0 or owner < 0 or owner != owners[i - 1] for i, owner in enumerate(owners)]
    return chunk(marks, room, settings.chunk_end_tokens, starts=starts)


# As released -------------------------------------------------------------------------------


ScoreIds = Callable[[Sequence[Sequence[int]]], list[list[float]]]


class ReleasedRoute:
    """The released compressor's way: tokenise, cut, detokenise, tokenise, merge.

    Source: microsoft/LLMLingua, `prompt_compressor.py` and `utils.py`. Its windows hold one
    piece more than fits, unknown pieces vanish, and continuation pieces repeat the first
    piece's probability in context scores.

    Args:
        tokenizer: with `tokenize`, `convert_tokens_to_ids`, `convert_ids_to_tokens`,
            `convert_tokens_to_string`; it knows the placeholders as single tokens.
        score: keep probability of each id of each row, specials included.
        settings: see `Compression`.
        style: how its pieces show word boundaries.
        special: tokens that never are words.
        placeholders: tokens that stand for forced strings of several pieces, by number.
        length: pieces of a row, specials included.
        opening: special put first; the released code writes "[CLS]" whatever the encoder.
        closing: special put last; there "[SEP]".
    """

    def __init__(
        self,
        tokenizer: Any,
        score: ScoreIds,
        settings: Compression,
        *,
        style: Style,
        special: Collection[str],
        placeholders: Sequence[str],
        length: int = 512,
        opening: str = "[CLS]",
        closing: str = "[SEP]",
    ) -> None:
        if len(settings.force_tokens) > len(placeholders):
            raise DataError(
                f"{len(settings.force_tokens)} force_tokens are given, {len(placeholders)} are "
                "possible as released"
            )
        self.tokenizer, self.score_ids, self.settings = tokenizer, score, settings
        self.style, self.special, self.length = style, special, length
        self.opening, self.closing = opening, closing
        self.stand_ins = {
            token: placeholders[number]
            for number, token in enumerate(settings.force_tokens)
            if len(tokenizer.tokenize(token)) != 1
        }
        ends = list(settings.chunk_end_tokens)
        self.ends = {*ends, *(self.stand_ins[end] for end in ends if end in self.stand_ins)}

    def windows(self, context: str) -> list[str]:
        """Detokenised windows, placeholders within."""
        for original, stand_in in self.stand_ins.items():
            context = context.replace(original, stand_in)
        pieces = self.tokenizer.tokenize(context)
        spans = chunk(pieces, self.length - 2, self.ends, inclusive=True)
        return [self.tokenizer.convert_tokens_to_string(pieces[a:b]) for a, b in spans]

    def score(self, windows: Sequence[str]) -> list[list[ScoredWord]]:
        """Words of the windows, tokenised once more."""
        rows = []
        for window in windows:
            pieces = [self.opening, *self.tokenizer.tokenize(window), self.closing]
            rows.append(self.tokenizer.convert_tokens_to_ids(pieces[: self.length]))
        return [self._words(ids, p) for ids, p in zip(rows, self.score_ids(rows), strict=True)]

    def _words(self, ids: Sequence[int], probabilities: Sequence[float]) -> list[ScoredWord]:
        words = merge_pieces(
            self.tokenizer.convert_ids_to_tokens(list(ids)),
            probabilities,
            style=self.style,
            special=self.special,
            forced=self.settings.force_tokens,
            added=self.stand_ins,
            reserve_digits=self.settings.force_reserve_digit,
        )
        values = pool([w.probabilities for w in words], self.settings.token_to_word)
        unforced = pool([w.unforced for w in words], self.settings.token_to_word)
        return [ScoredWord(w.text, p, u) for w, p, u in zip(words, values, unforced)]

    def text(self, window: str) -> str:
        """The window, placeholders within."""
        return window

    def shown(self, word: ScoredWord) -> str:
        """The word without its marker."""
        return word.text.lstrip("▁") if self.style == "sentencepiece" else word.text

    def joined(self, context: str, kept: Sequence[Sequence[ScoredWord]]) -> str:
        """Each window detokenised, joined by nothing."""
        return "".join(
            self.tokenizer.convert_tokens_to_string([word.text for word in window])
            for window in kept
        )

    def whole(self, context: str, windows: Sequence[str]) -> tuple[str, list[str]]:
        """The windows as they are, with forced strings put back."""
        restored = []
        for window in windows:
            for original, stand_in in self.stand_ins.items():
                window = window.replace(stand_in, original)
            restored.append(window)
        words = [
            found
            for window in restored
            for found in re.findall(r"\w+|[^\w\s]", window)
            if len(found) > 1 or found in _SYMBOLS or found.isalnum() or found == "_"
        ]
        return "".join(restored), words


def style_of(tokenizer: Any) -> Style:
    """How a tokenizer shows word boundaries.

    Raises:
        DataError: neither by "##" nor by "▁" (byte-level BPE): the released merge has no rule.
    """
    pieces = tokenizer.tokenize("internationalisation internationalisation")
    if any(piece.startswith("▁") for piece in pieces):
        return "sentencepiece"
    if any(piece.startswith("##") for piece in pieces):
        return "wordpiece"
    raise DataError(
        f"{type(tokenizer).__name__} marks words neither by '##' nor by '▁'; the released route "
        "knows no other: leave out official"
    )


def probabilities_of(logits: Tensor) -> Tensor:
    """Keep probability per piece: softmax over (drop, keep) in float32."""
    return torch.softmax(logits.float(), -1)[..., 1]
