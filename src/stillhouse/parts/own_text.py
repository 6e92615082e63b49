"""Text that a student writes, put right by its teacher at one token, and rows of it kept.

Rows are those of `parts/token_rows.py`: prompt and response padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stillhouse.batch import Batch
from stillhouse.parts.disputed_token import corrected_prefix, most_disputed
from stillhouse.parts.ring import Ring
from stillhouse.parts.text_sampler import TextSampler
from stillhouse.parts.token_rows import joined, moved_left, next_tokens, predicting, prompts

# (rows) -> divergence (B, L) and the teacher's likeliest token (B, L), where logits speak of them
Scores = Callable[[Mapping[str, Any]], tuple[Tensor, Tensor]]


class Revised(NamedTuple):
    """Rows whose response was put right at one token and gone on with.

    Attributes:
        rows: views `tokens`, `attention_mask`, `response_mask`.
        corrected: (B,) bool, rows in which there was something to put right.
        position: (B,) int64, the corrected token's column; -1 where there was none.
    """

    rows: Batch
    corrected: Tensor
    position: Tensor


def written(
    net: nn.Module, batch: Mapping[str, Any], sampler: TextSampler, chance: Tensor, *, longest: int
) -> Batch:
    """What a net says to the prompts of a batch, as rows to learn from.

    Args:
        net: a causal language model.
        batch: rows.
        sampler: how it samples.
        chance: (B, sampler.max_new) uniform numbers.
        longest: most tokens of a row; what is beyond is cut off.
    """
    asked, mask = prompts(batch)
    said, said_mask = sampler(net, asked, mask, chance)
    rows = joined(asked, mask, said, said_mask, padding=sampler.padding)
    return cut(rows, longest, sampler.max_new, sampler.padding)


def revised(
    net: nn.Module,
    rows: Mapping[str, Any],
    scores: Scores,
    sampler: TextSampler,
    chance: Tensor,
    *,
    longest: int,
) -> Revised:
    """One round of sequence correction: the most disputed token becomes the teacher's.

    Everything before it stays as it was, byte for byte; behind it the net goes on, with numbers
    of its own per row. A row without a dispute stays whole; where the teacher's token ends the
    text, nothing is added.

    Args:
        net: a causal language model.
        rows: what it wrote.
        scores: how far both models are apart at each place, and what the teacher would say.
        sampler: as the text was written with.
        chance: (B, sampler.max_new) uniform numbers, others than it was written with.
        longest: most tokens of a row.
    """
    tokens, said = rows["tokens"], predicting(rows["response_mask"])
    divergence, teacher_token = scores(rows)
    found = most_disputed(divergence, teacher_token, next_tokens(tokens), said)
    prefix = corrected_prefix(next_tokens(tokens), said, found, None)
    last = prefix.tokens.gather(1, found.position.clamp_min(0)[:, None])[:, 0]
    stops = prefix.stops | torch.isin(last, torch.tensor(sampler.end, device=tokens.device))
    # one column to the right: logits at i speak of the token at i + 1
    kept = torch.cat([tokens[:, :1], prefix.tokens[:, :-1]], 1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    there = places <= prefix.length[:, None]
    agreed = found.position < 0
    there = torch.where(agreed[:, None], rows["attention_mask"], there)
    kept = kept.masked_fill(~there, sampler.padding)
    prompt = rows["attention_mask"] & ~rows["response_mask"]
    answer = there & ~prompt
    whole = Batch(tokens=kept, attention_mask=there, response_mask=answer)
    whole = gone_on(net, whole, ~stops, sampler, chance, longest=longest)
    return Revised(whole, ~agreed, found.position + (~agreed).long())


def gone_on(
    net: nn.Module,
    rows: Batch,
    unfinished: Tensor,
    sampler: TextSampler,
    chance: Tensor,
    *,
    longest: int,
) -> Batch:
    """Rows whose unfinished responses the net has gone on with; the others stay.

    Args:
        net: a causal language model.
        rows: prompt and what is said so far, padded on the right.
        unfinished: (B,) bool; of them those that have no room for another token stay too.
        sampler: how it samples.
        chance: (B, sampler.max_new) uniform numbers.
        longest: most tokens of a row; what is beyond is cut off.
    """
    there, answer = rows["attention_mask"], rows["response_mask"]
    room = (answer.sum(1) < sampler.max_new) & (there.sum(1) < longest)
    going = (unfinished & room).nonzero()[:, 0]
    if len(going):
        rows = _gone_on(net, rows, sampler, chance, going)
    return cut(rows, longest, sampler.max_new, sampler.padding)


def _gone_on(
    net: nn.Module, rows: Batch, sampler: TextSampler, chance: Tensor, going: Tensor
) -> Batch:
    """Rows `going` continued; the others stay."""
    asked, mask = moved_left(rows["tokens"][going], rows["attention_mask"][going])
    new, new_mask = sampler(net, asked, mask, chance[going])
    added = rows["tokens"].new_full((len(rows["tokens"]), new.shape[1]), sampler.padding)
    there = torch.zeros_like(added, dtype=torch.bool)
    added[going], there[going] = new, new_mask
    prompt = rows["attention_mask"] & ~rows["response_mask"]
    answer = torch.cat([rows["response_mask"], there], 1)
    tokens = torch.cat([rows["tokens"], added], 1)
    # The prompt stands in the same columns: it is told apart from the answer by its mask alone.
    wide = torch.cat([prompt, torch.zeros_like(there)], 1)
    return joined(tokens, wide, tokens, answer, padding=sampler.padding)


def cut(rows: Mapping[str, Any], longest: int, said: int, padding: int) -> Batch:
    """Rows of at most `longest` tokens, of which at most `said` are the response's."""
    answer = rows["response_mask"]
    answer = answer & (answer.long().cumsum(1) <= said)
    there = (rows["attention_mask"] & ~rows["response_mask"]) | answer
    width = max(1, min(longest, int(there.sum(1).max())))
    there = there[:, :width]
    return Batch(
        tokens=rows["tokens"][:, :width].masked_fill(~there, padding),
        attention_mask=there,
        response_mask=answer[:, :width],
    )


class Replay(Ring):
    """The newest rows that were written, first in, first out; its capacity counts sequences.

    Args:
        capacity: sequences at most.
        longest: most tokens of a row.
        padding: id that fills rows.
        named: keep the rows' ids too, by which their prompts are found again.
    """

    def __init__(
        self, capacity: int, longest: int, padding: int = 0, *, named: bool = False
    ) -> None:
        fields: dict[str, tuple[int, ...]] = {"tokens": (longest,), "prompt": (), "length": ()}
        if named:
            fields["id"] = ()
        super().__init__(capacity, fields, dtype=torch.int64)
        self.longest, self.padding, self.named = longest, padding, named

    @property
    def full(self) -> bool:
        """No slot is free."""
        return len(self) == self.capacity

    def kept(self, rows: Mapping[str, Any]) -> dict[str, Tensor]:
        """Rows (padded on the right) in the form in which they are proposed."""
        tokens = rows["tokens"]
        whole = tokens.new_full((len(tokens), self.longest), self.padding)
        whole[:, : tokens.shape[1]] = tokens
        prompt = rows["attention_mask"] & ~rows["response_mask"]
        found = {"tokens": whole, "prompt": prompt.sum(1), "length": rows["attention_mask"].sum(1)}
        return {**found, "id": rows["id"]} if self.named else found

    def drawn(self, count: int, rng: torch.Generator) -> Batch:
        """`count` rows at random; none twice while there are enough."""
        found = self.sample(count, rng, replacement=count > len(self))
        width = int(found["length"].max())
        places = torch.arange(width, device=found["tokens"].device)
        there = places < found["length"][:, None]
        rows = Batch(
            tokens=found["tokens"][:, :width],
            attention_mask=there,
            response_mask=there & (places >= found["prompt"][:, None]),
        )
        return Batch(rows, id=found["id"]) if self.named else rows
