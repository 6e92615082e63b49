"""How far generated texts agree with references, and how much they repeat themselves.

Texts are compared as sequences of words and marks in lower case (`words`), so that a figure does
not depend on a model's tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_TOKEN = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Runs of letters and digits, and single marks, in lower case."""
    return _TOKEN.findall(text.lower())


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    # One row of the table as the bits of an integer (Hyyrö 2004): two texts of 30 words take
    # microseconds, not the milliseconds of a table in Python.
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | (1 << at)
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(first) - row.bit_count()


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Rouge-L (Lin 2004): F1 of the longest common subsequence, the best over the references.

    Args:
        text: a candidate.
        references: at least one.

    Returns:
        In [0, 1]; 0 for an empty candidate or reference. Precision and recall weigh alike.
    """
    own = words(text)
    best = 0.0
    for reference in references:
        other = words(reference)
        shared = common_length(own, other)
        if shared:
            best = max(best, 2.0 * shared / (len(own) + len(other)))
    return best


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]], *, order: int = 4) -> float:
    """BLEU of a corpus (Papineni et al. 2002), several references each.

    Counts are clipped by the largest count in any reference and summed over the corpus; the
    brevity penalty takes the reference nearest in length (the shorter of two). An order without
    any match counts as half a match, the next such as a quarter and so on (exponential
    smoothing, as NIST's mteval and sacreBLEU do); an order without any n-gram makes it 0.

    Args:
        texts: candidates.
        references: of each candidate, at least one.
        order: longest n-grams.

    Returns:
        In [0, 1].
    """
    matched, total = [0] * order, [0] * order
    length = wanted = 0
    for text, known in zip(texts, references, strict=True):
        own, others = words(text), [words(reference) for reference in known]
        length += len(own)
        wanted += min((abs(len(o) - len(own)), len(o)) for o in others)[1]
        for n in range(1, order + 1):
            counts = grams(own, n)
            limit: Counter[tuple[str, ...]] = Counter()
            for other in others:
                limit |= grams(other, n)
            matched[n - 1] += sum((counts & limit).values())
            total[n - 1] += sum(counts.values())
    if not length or not all(total):
        return 0.0
    logs, missing = 0.0, 1.0
    for hits, count in zip(matched, total, strict=True):
        if not hits:
            missing *= 2.0
        logs += math.log(hits / count if hits else 1.0 / (missing * count))
    penalty = min(0.0, 1.0 - wanted / length)
    return math.exp(logs / order + penalty)


def grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs."""
    return Counter(zip(*(tokens[at:] for at in range(n)), strict=False))


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before: 1 - different / all; 0 without any."""
    counts = grams(words(text), n)
    total = sum(counts.values())
    return 1.0 - len(counts) / total if total else 0.0


def overlap(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All figures of a corpus of generated texts.

    Args:
        texts: N candidates.
        references: of each.

    Returns:
        `rouge_l`, `bleu` and `repetition` as percentages, `words`, the mean length, and
        `distinct`, the share of different texts.
    """
    count = max(1, len(texts))
    rouge = sum(rouge_l(t, r) for t, r in zip(texts, references, strict=True)) / count
    return {
        "rouge_l": 100.0 * rouge,
        "bleu": 100.0 * bleu(texts, references),
        "repetition": 100.0 * sum(map(repetition, texts)) / count,
        "words": sum(len(words(text)) for text in texts) / count,
        "distinct": len(set(texts)) / count,
    }
