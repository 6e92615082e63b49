"""Choosing what to keep: by percentile, exactly, without repeats, and by whole contexts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from stillhouse.errors import DataError


class Selection(NamedTuple):
    """Which words are kept, and the probability above which they are."""

    keep: list[bool]
    threshold: float


def keep_above(probabilities: Sequence[float], counts: Sequence[int], rate: float) -> Selection:
    """Keep words above a percentile of the token-weighted probabilities.

    Every probability stands once per token of its word; the threshold is their percentile
    at `int(100 * (1 - rate) + 1)`; a word is kept when strictly above it (or equal, when
    the threshold is 1: forced words). With many ties fewer words than asked survive.
    Source: microsoft/LLMLingua, `prompt_compressor.py`.

    Args:
        probabilities: keep probability per word, in [0, 1].
        counts: tokens per word as the reader's model counts them, >= 0.
        rate: share of tokens to keep, in [0, 1].

    Returns:
        Flags per word and the threshold (NaN without any token: nothing is kept).
    """
    _check(probabilities, counts, rate)
    expanded = np.repeat(np.asarray(probabilities, float), np.asarray(counts, int))
    if expanded.size == 0:
        return Selection([False] * len(probabilities), float("nan"))
    threshold = float(np.percentile(expanded, min(int(100 * (1 - rate) + 1), 100)))
    keep = [p > threshold or (threshold == 1.0 and p == threshold) for p in probabilities]
    return Selection(keep, threshold)


def keep_top(
    probabilities: Sequence[float],
    counts: Sequence[int],
    rate: float,
    *,
    forced: Sequence[bool] | None = None,
) -> list[bool]:
    """Keep the most probable words while they fit the budget of `rate` times all tokens.

    It stops at the first word that does not fit; later, shorter words are not tried. Ties
    go to the earlier word.

    Args:
        probabilities: keep probability per word.
        counts: tokens per word.
        rate: share of tokens to keep, in [0, 1].
        forced: words kept whatever the budget; they are counted first.

    Returns:
        Flags per word.
    """
    _check(probabilities, counts, rate)
    keep = [bool(flag) for flag in forced] if forced is not None else [False] * len(counts)
    used = sum(count for count, flag in zip(counts, keep) if flag)
    budget = rate * sum(counts)
    for word in sorted(range(len(counts)), key=lambda i: -probabilities[i]):
        if keep[word]:
            continue
        if used + counts[word] > budget:
            break
        keep[word] = True
        used += counts[word]
    return keep


def _check(probabilities: Sequence[float], counts: Sequence[int], rate: float) -> None:
    if len(probabilities) != len(counts):
        raise DataError(f"{len(probabilities)} probabilities but {len(counts)} token counts")
    if not 0.0 <= rate <= 1.0:
        raise DataError(f"the rate is the share of tokens to keep, in [0, 1], got {rate}")


def silence_repeats(
    words: Sequence[str], probabilities: Sequence[float], forced: Collection[str], rate: float
) -> list[float]:
    """Set a forced word to 0 when it repeats the last one and nothing strong lies between.

    Strong is a word whose probability exceeds the percentile `int(100 * (1 - rate))` of the
    word probabilities (not weighted by tokens). Source: microsoft/LLMLingua,
    `drop_consecutive`.
    """
    if not words:
        return []
    changed = [float(p) for p in probabilities]
    strong = float(np.percentile(changed, int(100 * (1 - rate))))
    between, previous = False, None
    for i, word in enumerate(words):
        if word not in forced:
            between = between or changed[i] > strong
            continue
        if not between and word == previous:
            changed[i] = 0.0
        between, previous = False, word
    return changed


def drop_repeats(words: Sequence[str], keep: Sequence[bool], forced: Collection[str]) -> list[bool]:
    """Unkeep a forced word that equals the kept word before it."""
    flags, previous = [], None
    for word, kept in zip(words, keep, strict=True):
        kept = kept and not (word in forced and word == previous)
        previous = word if kept else previous
        flags.append(bool(kept))
    return flags


def context_rate(
    contexts: int,
    tokens: int,
    *,
    rate: float,
    target_token: int | None = None,
    target_context: int | None = None,
    context_level_rate: float | None = None,
    context_level_tokens: int | None = None,
    token_level: bool = True,
) -> float:
    """The share of contexts the coarse filter keeps.

    In order of precedence: `context_level_tokens / tokens`, `target_context / contexts`,
    `context_level_rate`, `2 * target_token / tokens`, `(rate + 1) / 2`; at most 1. Without
    a word filter behind it the last two become `target_token / tokens` and `rate`.
    Source: microsoft/LLMLingua, `compress_prompt_llmlingua2`.

    Args:
        contexts: number of contexts, > 0.
        tokens: tokens of all contexts, > 0.
        rate: share of tokens the whole compression keeps.
        target_token: tokens the whole compression may keep.
        target_context: number of contexts to keep.
        context_level_rate: share of contexts to keep, below 1 (1 means: not given).
        context_level_tokens: tokens the kept contexts may hold.
        token_level: words are filtered afterwards.
    """
    given = context_level_rate is not None and context_level_rate < 1.0
    if context_level_tokens is None and not target_context and not given:
        if target_token is not None:
            context_level_tokens = 2 * target_token if token_level else target_token
        else:
            context_level_rate = (rate + 1.0) / 2 if token_level else rate
    if context_level_tokens is not None:
        return min(context_level_tokens / tokens, 1.0)
    if target_context is not None:
        return min(target_context / contexts, 1.0)
    return 1.0 if context_level_rate is None else context_level_rate


def keep_contexts(scores: Sequence[float], rate: float, forced: Collection[int] = ()) -> list[bool]:
    """Keep contexts at or above the percentile `int(100 * (1 - rate))`, and the forced ones.

    Args:
        scores: mean unforced keep probability of each context's words.
        rate: share of contexts to keep, in [0, 1].
        forced: indices that are always kept.
    """
    threshold = float(np.percentile(np.asarray(scores, float), int(100 * (1 - rate))))
    return [score >= threshold or i in forced for i, score in enumerate(scores)]
