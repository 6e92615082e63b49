"""Text that a student writes, put right at one word by a teacher of another vocabulary.

The counterpart of `parts/own_text.py` where the two share no ids: the text is cut by the teacher's
own tokenizer, words take the place of tokens, and the difference of log-likelihoods per character
takes that of the divergence. Experimental, see `parts/text_alignment.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.batch import Batch
from stillhouse.errors import ModelError
from stillhouse.losses.chunked import wide
from stillhouse.parts.own_text import gone_on
from stillhouse.parts.text_alignment import (
    Reading,
    Unit,
    aligned,
    disputed,
    first_word,
    read,
    sayable,
    spoken,
    units,
)
from stillhouse.parts.text_sampler import TextSampler, context_of
from stillhouse.parts.text_tokens import TextTokens
from stillhouse.parts.token_rows import next_tokens, padded, predicting

# (rows) -> (B, L) log-likelihood of the token that each place speaks of
Likelihood = Callable[[Mapping[str, Any]], Tensor]

_LONGEST_WORD = 24  # tokens of a teacher within which a word must end
_TRIES = 4  # words of a text that are looked at, the most disputed first


class Reworded(NamedTuple):
    """Rows whose response was put right at one word and gone on with.

    Attributes:
        rows: views `tokens`, `attention_mask`, `response_mask`.
        corrected: (B,) bool, rows in which there was something to put right.
        position: (B,) int64, the column of the corrected word's first token; -1 where there was
            none.
        words: the student's word and the teacher's; "" for the end of a text, or for no dispute.
    """

    rows: Batch
    corrected: Tensor
    position: Tensor
    words: list[tuple[str, str]]


class Word(NamedTuple):
    """How a teacher goes on: with a word (and the blanks before it), or with the end."""

    text: str
    ends: bool


class TextTeacher:
    """A frozen causal language model that is asked about text, by its own tokenizer.

    Args:
        net: one that stands apart (`models.causal_lm.LanguageNet.set_apart`).

    Raises:
        ModelError: it does not.
    """

    def __init__(self, net: nn.Module) -> None:
        tokens = getattr(net, "tokens", None)
        if not getattr(net, "apart", False) or not isinstance(tokens, TextTokens):
            raise ModelError(
                "a teacher that is asked about text reads it by its own tokenizer: give a causal "
                f"language model that brings one, not {type(net).__name__}"
            )
        self.net, self.tokens = net, tokens
        self._prompts: dict[str, list[int]] = {}

    def rows(self, prompts: Sequence[str], readings: Sequence[Reading], device: Any) -> Batch:
        """What the teacher reads: its own prompt, then the text; its end where the text ends.

        A row longer than the model's context loses its end, a prompt as long its beginning.
        """
        rows, lengths = [], []
        for asked, reading in zip(self._asked(prompts), readings, strict=True):
            said = [*reading.ids, *([self.tokens.end] if reading.ended else [])]
            rows.append(torch.tensor(self._cut([*asked, *said])))
            lengths.append(len(asked))
        tokens, there = padded(rows, padding=self.tokens.padding)
        starts = torch.tensor(lengths)[:, None]
        return Batch(
            tokens=tokens.to(device),
            attention_mask=there.to(device),
            response_mask=(there & (torch.arange(tokens.shape[1]) >= starts)).to(device),
        )

    def _asked(self, prompts: Sequence[str]) -> list[list[int]]:
        new = [text for text in dict.fromkeys(prompts) if text not in self._prompts]
        if new:
            known = zip(new, self.tokens.prompts(new), strict=True)
            # Something must stand before the first token that is asked about.
            self._prompts |= {text: ids or [self.tokens.end] for text, ids in known}
        context = context_of(self.net)
        found = [self._prompts[text] for text in prompts]
        return found if context is None else [ids[-(context - 1) :] for ids in found]

    def _cut(self, ids: list[int]) -> list[int]:
        context = context_of(self.net)
        return ids if context is None else ids[:context]

    def logits(self, rows: Mapping[str, Any]) -> Tensor:
        """(B, L, V) at every place of rows."""
        with torch.no_grad():
            found: Tensor = self.net(rows["tokens"])["logits"]
        return found

    def judged(self, rows: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(B, L) log-likelihood of the token a place speaks of, and whether it is the likeliest."""
        at, following = predicting(rows["response_mask"]), next_tokens(rows["tokens"])
        logits = self.logits(rows)
        likely = logits.new_zeros(at.shape, dtype=wide(logits).dtype)
        agreed = torch.zeros_like(at)
        likely[at] = -F.cross_entropy(wide(logits[at]), following[at], reduction="none")
        agreed[at] = logits[at].argmax(-1) == following[at]
        return likely, agreed

    def words(
        self, prompts: Sequence[str], texts: Sequence[str], sampler: TextSampler, device: Any
    ) -> list[Word | None]:
        """The one word with which the teacher, greedily, goes on from each text.

        Args:
            prompts: of the texts.
            texts: of the responses so far, "" for their beginning.
            sampler: whose settings but those of chance are taken.
            device: of the model.

        Returns:
            None where it says no whole word: one that is too long, or bytes.
        """
        before = [read(self.tokens, text).ids for text in texts]
        rows = [[*asked, *ids] for asked, ids in zip(self._asked(prompts), before, strict=True)]
        context = context_of(self.net)
        fits = [context is None or len(row) < context for row in rows]
        found: list[Word | None] = [None] * len(rows)
        places = [place for place, fit in enumerate(fits) if fit]
        if not places:
            return found
        greedy = TextSampler(
            _LONGEST_WORD, end=self.tokens.end, padding=self.tokens.padding, temperature=0.0
        )
        chosen = [torch.tensor(rows[place]) for place in places]
        asked, mask = padded(chosen, padding=self.tokens.padding, left=True)
        new, there = greedy(self.net, asked.to(device), mask.to(device))
        for place, ids, kept in zip(places, new.cpu(), there.cpu(), strict=True):
            found[place] = self._word(list(before[place]), ids[kept].tolist())
        return found

    def _word(self, before: list[int], new: list[int]) -> Word | None:
        """The first word of new tokens behind others."""
        ended = bool(new) and new[-1] == self.tokens.end
        whole = ended
        new = new[:-1] if ended else new
        unknown = self.tokens.tokenizer.unk_token_id
        if unknown in new:  # whatever it is, a word ends before it
            new, whole, ended = new[: new.index(unknown)], True, False
        known, grown = self.tokens.text(before), self.tokens.text([*before, *new])
        if not grown.startswith(known):
            return None
        word = first_word(grown[len(known) :], whole=whole)
        if word is not None:
            return Word(word, False)
        return Word("", True) if ended and not grown[len(known) :].strip() else None


def meeting(
    rows: Mapping[str, Any],
    ours: Sequence[Reading],
    their_rows: Mapping[str, Any],
    theirs: Sequence[Reading],
) -> Tensor:
    """Which of the teacher's places speaks of the same continuation as each of the student's.

    Args:
        rows: the student's (B, L).
        ours: how it reads the text of each row.
        their_rows: the teacher's (B, M) of the same texts.
        theirs: how it reads them.

    Returns:
        (B, L) int64 columns of the teacher's rows; -1 where none does, or where nothing of the
        response follows.
    """
    at, known = predicting(rows["response_mask"]).cpu(), predicting(their_rows["response_mask"])
    known = known.cpu()
    found = torch.full(at.shape, -1)
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if not bool(at[row].any()) or not bool(known[row].any()):
            continue
        first, second = int(at[row].nonzero()[0]), int(known[row].nonzero()[0])
        for i, j in aligned(mine, other):
            inside = first + i < at.shape[1] and second + j < known.shape[1]
            if inside and bool(at[row, first + i]) and bool(known[row, second + j]):
                found[row, first + i] = second + j
    return found.to(rows["tokens"].device)


class _Dispute(NamedTuple):
    """A row whose text may be put right: how the student reads it, and its words by dispute."""

    row: int
    reading: Reading
    words: list[Unit]


class _Change(NamedTuple):
    """What takes the place of everything behind the first `kept` tokens of a response."""

    kept: int
    ids: list[int]
    ends: bool
    words: tuple[str, str]


def reworded(
    net: nn.Module,
    tokens: TextTokens,
    rows: Batch,
    prompts: Sequence[str],
    teacher: TextTeacher,
    likelihood: Likelihood,
    sampler: TextSampler,
    chance: Tensor,
    *,
    longest: int,
) -> Reworded:
    """One round of sequence correction on text: the most disputed word becomes the teacher's.

    Of the words at which the teacher, greedily, would say something else, that one with the
    largest difference of log-likelihood per character. The teacher writes that word from its
    first character to the next boundary of words; the student goes on behind it, with numbers of
    its own per row. Everything before the word stays as it was, token by token. A text without a
    dispute stays whole; where the teacher ends it, it ends. A word that the student cannot say
    (its vocabulary lacks it) is no dispute; then the next word is looked at.

    Args:
        net: the student, a causal language model.
        tokens: of the student.
        rows: what it wrote.
        prompts: of the rows, as text.
        teacher: reads them its own way.
        likelihood: of the student.
        sampler: as the text was written with.
        chance: (B, sampler.max_new) uniform numbers, others than it was written with.
        longest: most tokens of a row.
    """
    device = rows["tokens"].device
    said = [
        row[mask].tolist()
        for row, mask in zip(rows["tokens"].cpu(), rows["response_mask"].cpu(), strict=True)
    ]
    disputes = _disputes(tokens, rows, said, prompts, teacher, likelihood)
    changes: dict[int, _Change] = {}
    for attempt in range(_TRIES):
        left = [d for d in disputes if d.row not in changes and attempt < len(d.words)]
        if not left:
            break
        texts = [d.reading.text[: d.words[attempt].place] for d in left]
        asked = [prompts[d.row] for d in left]
        for dispute, word in zip(left, teacher.words(asked, texts, sampler, device), strict=True):
            change = _change(tokens, dispute.reading, dispute.words[attempt], word)
            if change is not None:
                changes[dispute.row] = change
    return _carried_out(net, rows, said, changes, sampler, chance, tokens.end, longest)


def _disputes(
    tokens: TextTokens,
    rows: Batch,
    said: Sequence[list[int]],
    prompts: Sequence[str],
    teacher: TextTeacher,
    likelihood: Likelihood,
) -> list[_Dispute]:
    device = rows["tokens"].device
    ours = [spoken(tokens, ids) for ids in said]
    theirs = [read(teacher.tokens, reading.text, ended=reading.ended) for reading in ours]
    their_rows = teacher.rows(prompts, theirs, device)
    at, known = predicting(rows["response_mask"]).cpu(), predicting(their_rows["response_mask"])
    known = known.cpu()
    mine = likelihood(rows).cpu()
    likely, agreed = (value.cpu() for value in teacher.judged(their_rows))
    found = []
    for row, (reading, other) in enumerate(zip(ours, theirs, strict=True)):
        judged = int(known[row].sum())  # fewer where the teacher's context was full
        words = [unit for unit in units(reading, other) if unit.theirs[1] <= judged]
        order = disputed(
            words,
            mine[row][at[row]].tolist(),
            likely[row][known[row]].tolist(),
            agreed[row][known[row]].tolist(),
        )
        if order:
            found.append(_Dispute(row, reading, [words[number] for number in order]))
    return found


def _change(tokens: TextTokens, reading: Reading, unit: Unit, word: Word | None) -> _Change | None:
    """What the teacher's word makes of a row; None where it is none, the same, or unsayable."""
    if word is None:
        return None
    kept = unit.ours[0]
    if word.ends:
        at_end = unit.word == ""
        return None if at_end else _Change(kept, [tokens.end], True, (unit.word, ""))
    old = first_word(reading.text[unit.place :], whole=True)
    if old is not None and old.strip() == word.text.strip():
        return None
    ids = sayable(tokens, reading.ids[:kept], word.text)
    if ids is None:
        return None
    return _Change(kept, ids, False, ((old or "").strip(), word.text.strip()))


def _carried_out(
    net: nn.Module,
    rows: Batch,
    said: Sequence[list[int]],
    changes: Mapping[int, _Change],
    sampler: TextSampler,
    chance: Tensor,
    end: int,
    longest: int,
) -> Reworded:
    """The rows with their changes, gone on with where a change does not end them."""
    tokens, device = rows["tokens"].cpu(), rows["tokens"].device
    prompt = (rows["attention_mask"] & ~rows["response_mask"]).cpu()
    whole, starts = [], []
    for row, ids in enumerate(said):
        asked = tokens[row][prompt[row]]
        change = changes.get(row)
        now = ids if change is None else [*ids[: change.kept], *change.ids]
        whole.append(torch.cat([asked, torch.tensor(now, dtype=torch.int64)]))
        starts.append(len(asked))
    filled, there = padded(whole, padding=sampler.padding)
    answer = there & (torch.arange(filled.shape[1]) >= torch.tensor(starts)[:, None])
    going = torch.tensor(
        [row in changes and not changes[row].ends for row in range(len(said))], device=device
    )
    found = Batch(
        tokens=filled.to(device), attention_mask=there.to(device), response_mask=answer.to(device)
    )
    found = gone_on(net, found, going, sampler, chance, longest=longest)
    position = [
        starts[row] + changes[row].kept if row in changes else -1 for row in range(len(said))
    ]
    return Reworded(
        found,
        torch.tensor([row in changes for row in range(len(said))], device=device),
        torch.tensor(position, device=device),
        [changes[row].words if row in changes else ("", "") for row in range(len(said))],
    )
