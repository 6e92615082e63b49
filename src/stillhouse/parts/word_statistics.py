"""What words alone tell: document frequencies, and a bigram language model's surprisal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence


class DocumentFrequency:
    """Inverse document frequency of lower-cased words, smoothed.

    Args:
        documents: words of each document.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        self.documents = 0
        self.counts: Counter[str] = Counter()
        for words in documents:
            self.documents += 1
            self.counts.update({word.lower() for word in words})

    def idf(self, word: str) -> float:
        """`log((1 + N) / (1 + n)) + 1`; unseen words have the highest."""
        return math.log((1 + self.documents) / (1 + self.counts[word.lower()])) + 1.0

    def scores(self, words: Sequence[str]) -> list[float]:
        """TF-IDF of each word in its document: (1 + log of its count) times its idf."""
        here = Counter(word.lower() for word in words)
        return [(1 + math.log(here[w.lower()])) * self.idf(w) for w in words]


class BigramModel:
    """A causal bigram model over lower-cased words with absolute discounting.

    P(w | v) = max(c(v, w) - d, 0) / c(v) + d * distinct(v) / c(v) * P(w), where P(w) is the
    add-one unigram share (Ney, Essen and Kneser 1994, with the plain unigram as lower order).

    Args:
        documents: words of each document.
        discount: d in (0, 1).
    """

    _START = "\0"

    def __init__(self, documents: Iterable[Sequence[str]], discount: float = 0.75) -> None:
        self.discount = discount
        self.single: Counter[str] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.before: Counter[str] = Counter()
        self.distinct: Counter[str] = Counter()
        for words in documents:
            previous = self._START
            for word in map(str.lower, words):
                self.single[word] += 1
                self.before[previous] += 1
                self.pairs[previous, word] += 1
                previous = word
        for previous, _ in self.pairs:
            self.distinct[previous] += 1
        self.total = sum(self.single.values())

    def surprisal(self, words: Sequence[str]) -> list[float]:
        """-log2 P(word | the word before it), for each word in order."""
        found, previous = [], self._START
        for word in map(str.lower, words):
            found.append(-math.log2(self._probability(previous, word)))
            previous = word
        return found

    def _probability(self, previous: str, word: str) -> float:
        unigram = (self.single[word] + 1) / (self.total + len(self.single) + 1)
        seen = self.before[previous]
        if not seen:
            return unigram
        own = max(self.pairs[previous, word] - self.discount, 0.0) / seen
        return own + self.discount * self.distinct[previous] / seen * unigram
