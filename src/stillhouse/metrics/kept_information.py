"""What a shortened text still tells: names, numbers, and answers to cloze questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillhouse.parts.text_spans import Word

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_CONTENT = 4  # letters that a content word has at least


@dataclass
class Information:
    """Counts over texts; shares by `compute`.

    Attributes:
        entities: distinct names (kept, all).
        numbers: distinct numbers (kept, all).
        cloze: questions (answerable, all).
    """

    entities: tuple[int, int] = (0, 0)
    numbers: tuple[int, int] = (0, 0)
    cloze: tuple[int, int] = (0, 0)

    def add(
        self,
        text: str,
        words: Sequence[Word],
        keep: Sequence[bool],
        entities: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Take one text in.

        Args:
            text: the source.
            words: of it.
            keep: which words stay.
            entities: where names stand.
        """
        names = _by_string(text, words, entities)
        digits = _by_string(
            text, words, [(w.start, w.stop) for w in words if any(c.isdigit() for c in w.text)]
        )
        kept_names = {s for s, places in names.items() if _any_whole(places, keep)}
        kept_digits = {s for s, places in digits.items() if _any_whole(places, keep)}
        self.entities = _plus(self.entities, len(kept_names), len(names))
        self.numbers = _plus(self.numbers, len(kept_digits), len(digits))
        told = kept_names | kept_digits
        for sentence in _sentences(text, words):
            for string, places in {**names, **digits}.items():
                own = next((p for p in places if p and p[0] in sentence), None)
                if own is None:
                    continue
                content = [i for i in sentence if i not in own and len(words[i].text) >= _CONTENT]
                if len(content) >= 2:
                    enough = 2 * sum(keep[i] for i in content) >= len(content)
                    self.cloze = _plus(self.cloze, int(string in told and enough), 1)

    def compute(self) -> dict[str, float]:
        """Shares kept; a kind that never occurs is left out.

        A name or number counts as kept when at least one mention stays whole. A cloze
        question is a sentence with one name or number blanked out; it is answerable when that
        is kept somewhere and at least half of the sentence's other content words are (words
        of four letters and more).
        """
        kinds = {"entities": self.entities, "numbers": self.numbers, "cloze": self.cloze}
        return {name: kept / total for name, (kept, total) in kinds.items() if total}


def _plus(counts: tuple[int, int], kept: int, total: int) -> tuple[int, int]:
    return counts[0] + kept, counts[1] + total


def _by_string(
    text: str, words: Sequence[Word], spans: Sequence[tuple[int, int]]
) -> dict[str, list[list[int]]]:
    """Distinct strings, each with the words of each mention."""
    found: dict[str, list[list[int]]] = {}
    for start, stop in spans:
        inside = [i for i, w in enumerate(words) if w.start < stop and w.stop > start]
        found.setdefault(text[start:stop].lower(), []).append(inside)
    return found


def _any_whole(places: Sequence[Sequence[int]], keep: Sequence[bool]) -> bool:
    return any(place and all(keep[i] for i in place) for place in places)


def _sentences(text: str, words: Sequence[Word]) -> list[range]:
    ends = [m.end() for m in _SENTENCE_END.finditer(text)] + [len(text)]
    found, first = [], 0
    for end in ends:
        last = first
        while last < len(words) and words[last].start < end:
            last += 1
        if last > first:
            found.append(range(first, last))
        first = last
    return found
