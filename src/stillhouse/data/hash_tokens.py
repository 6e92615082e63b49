"""Words as numbers without a vocabulary file: a deterministic hashing tokenizer."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from stillhouse.errors import DataError

PAD = 0
EMPTY = 1
_FIRST = 2
_WORDS = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


class HashTokens:
    """Text to word ids by hashing (Weinberger et al. 2009, without signs).

    Text is Unicode-normalised (NFKC), case-folded and cut into words (with inner
    apostrophes) and single punctuation marks. A word's id is a hash of its letters, the same
    in every process and on every machine; different words may share an id.

    Args:
        buckets: number of ids, those for padding (0) and for an empty text (1) included:
            the rows of an embedding table.
        length: ids per text; longer texts are cut, shorter ones padded at the end.

    Raises:
        DataError: fewer than 3 buckets, or no length.
    """

    def __init__(self, buckets: int = 8192, length: int = 32) -> None:
        if buckets <= _FIRST or length < 1:
            raise DataError(
                f"hashed tokens need at least {_FIRST + 1} buckets and a length of 1 "
                f"(given: {buckets} and {length})"
            )
        self.buckets = buckets
        self.length = length
        self._known: dict[str, int] = {}

    @property
    def fingerprint(self) -> str:
        """Tells these settings apart from others."""
        return f"HashTokens(buckets={self.buckets}, length={self.length})"

    def __repr__(self) -> str:
        return self.fingerprint

    def settings(self) -> dict[str, int]:
        """The arguments that make this tokenizer again."""
        return {"buckets": self.buckets, "length": self.length}

    def words(self, text: str) -> list[str]:
        """The words and punctuation marks of a text, normalised."""
        return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())

    @overload
    def __call__(self, text: str) -> Tensor: ...
    @overload
    def __call__(self, text: Sequence[str]) -> Tensor: ...
    def __call__(self, text: str | Sequence[str]) -> Tensor:
        """Ids of one text (length,) or of several (B, length), int64, padded with 0.

        A text without any word is [1, 0, 0, ...], so that no row is all padding.
        """
        if isinstance(text, str):
            return torch.tensor(self._row(text))
        if not text:
            return torch.zeros(0, self.length, dtype=torch.int64)
        return torch.tensor([self._row(entry) for entry in text])

    def _row(self, text: str) -> list[int]:
        ids = [self._id(word) for word in self.words(text)[: self.length]] or [EMPTY]
        return ids + [PAD] * (self.length - len(ids))

    def _id(self, word: str) -> int:
        found = self._known.get(word)
        if found is None:
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            found = _FIRST + int.from_bytes(digest, "little") % (self.buckets - _FIRST)
            self._known[word] = found
        return found
