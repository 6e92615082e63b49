"""How a tagging model reads text: pieces with codes and offsets, rows with specials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stillhouse.errors import ModelError


class Reading(NamedTuple):
    """A text as a model reads it, without specials.

    Attributes:
        codes: (n, ...) int64, one entry per piece.
        offsets: `(start, stop)` of each piece in the text.
        pieces: the pieces as strings.
    """

    codes: Tensor
    offsets: list[tuple[int, int]]
    pieces: list[str]


class TextReader(Protocol):
    """Turns text into what a tagging model reads.

    Attributes:
        length: most pieces of a row, specials included.
        room: most pieces of a row, specials left out.
        lead: specials before the first piece (0 or 1).
    """

    length: int
    room: int
    lead: int

    def read(self, text: str) -> Reading:
        """Pieces of a whole text with their offsets."""
        ...

    def read_word(self, word: str) -> Tensor:
        """Codes (k, ...) of one word on its own; k may be 0."""
        ...

    def row(self, codes: Tensor) -> Tensor:
        """A row of the model: codes (n, ...) between specials, cut to `length`."""
        ...

    def join(self, rows: Sequence[Tensor], length: int | None = None) -> Tensor:
        """Rows padded to one length: (B, L, ...)."""
        ...


class PieceReader:
    """Reads with a Hugging Face tokenizer that knows offsets.

    Args:
        tokenizer: a fast one (backed by the tokenizers library).
        length: most pieces of a row, specials included.

    Raises:
        ModelError: the tokenizer gives no offsets, or lacks specials.
    """

    def __init__(self, tokenizer: Any, length: int = 512) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer "
                "(tokenizer.json) is needed to trace pieces back to the text"
            )
        opening = tokenizer.cls_token_id
        closing = tokenizer.sep_token_id
        opening = tokenizer.bos_token_id if opening is None else opening
        closing = tokenizer.eos_token_id if closing is None else closing
        if opening is None or closing is None or tokenizer.pad_token_id is None:
            raise ModelError(
                f"{type(tokenizer).__name__} lacks an opening, closing or padding token, which a "
                "token classifier reads"
            )
        if length < 3:
            raise ModelError(f"a row of {length} pieces has no room beside two specials")
        self.tokenizer = tokenizer
        self.length = length
        self.room = length - 2
        self.lead = 1
        self.pad = int(tokenizer.pad_token_id)
        self._ends = (int(opening), int(closing))

    def read(self, text: str) -> Reading:
        """Pieces of a whole text with their offsets."""
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(found["input_ids"])
        offsets = [_trimmed(text, *span) for span in found["offset_mapping"]]
        return Reading(
            torch.tensor(ids, dtype=torch.int64),
            offsets,
            list(self.tokenizer.convert_ids_to_tokens(ids)),
        )

    def read_word(self, word: str) -> Tensor:
        """Ids (k,) of one word on its own."""
        ids = self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(word))
        return torch.tensor(ids, dtype=torch.int64)

    def row(self, codes: Tensor) -> Tensor:
        """Ids between the specials, cut to `length`."""
        first, last = (torch.tensor([end]) for end in self._ends)
        return torch.cat([first, codes, last])[: self.length]

    def join(self, rows: Sequence[Tensor], length: int | None = None) -> Tensor:
        """(B, L) ids padded with the tokenizer's padding."""
        return _padded(rows, length, self.pad)


class CodeReader:
    """Reads words as vectors of codes made by a function, without specials.

    Args:
        split: a text to its words, as (text, start, stop).
        code: a word to its codes (c,) int64.
        length: most words of a row.
    """

    lead = 0

    def __init__(self, split: Any, code: Any, length: int) -> None:
        self._split = split
        self._code = code
        self.length = self.room = length

    def read(self, text: str) -> Reading:
        """Words of a text with their codes (n, c) and offsets."""
        words = self._split(text)
        rows = [self._code(word.text) for word in words]
        codes = torch.stack(rows) if rows else self._code("").new_zeros(0, len(self._code("")))
        return Reading(codes, [(w.start, w.stop) for w in words], [w.text for w in words])

    def read_word(self, word: str) -> Tensor:
        """Codes (1, c) of one word; (0, c) of an empty one."""
        codes: Tensor = self._code(word)[None]
        return codes if word else codes[:0]

    def row(self, codes: Tensor) -> Tensor:
        """The codes, cut to `length`."""
        return codes[: self.length]

    def join(self, rows: Sequence[Tensor], length: int | None = None) -> Tensor:
        """(B, L, c) codes padded with zeros."""
        return _padded(rows, length, 0)


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """Without white space at either end, which some tokenizers count to a piece.

    A piece of white space alone (a lone word marker) speaks for the word behind it.
    """
    if start < stop and text[start:stop].isspace():
        return stop, min(stop + 1, len(text))
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop


def _padded(rows: Sequence[Tensor], length: int | None, value: int) -> Tensor:
    joined = pad_sequence(list(rows), batch_first=True, padding_value=value)
    if length is None or joined.shape[1] >= length:
        return joined
    shape = (joined.shape[0], length - joined.shape[1], *joined.shape[2:])
    return torch.cat([joined, joined.new_full(shape, value)], 1)
