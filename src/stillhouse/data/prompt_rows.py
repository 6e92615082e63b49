"""Pairs of prompt and response as a source of token rows, each batch as long as its longest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample, Source, Splits
from stillhouse.clock import Views, generator
from stillhouse.data.data_set import DataSet
from stillhouse.errors import DataError
from stillhouse.parts.text_tokens import (
    TextTokens,
    bpe_tokenizer,
    load_tokenizer,
    word_tokenizer,
)

WORDS, BPE = "words", "bpe"


@dataclass(frozen=True)
class Pair:
    """A prompt and one response to it.

    Attributes:
        prompt: text.
        response: text, one of the references.
        references: every good response that is known.
    """

    prompt: str
    response: str
    references: tuple[str, ...]


def with_references(pairs: Sequence[tuple[str, str]]) -> list[Pair]:
    """Pairs with the responses that share their prompt as references, in order."""
    known: dict[str, dict[str, None]] = {}
    for prompt, response in pairs:
        known.setdefault(prompt, {})[response] = None
    told = {prompt: tuple(found) for prompt, found in known.items()}
    return [Pair(prompt, response, told[prompt]) for prompt, response in pairs]


class PromptRows:
    """Rows of tokens of pairs; see `parts/token_rows.py` for the views and their form.

    Beside them the strings "prompt" and "response", and "references", a list of strings a row.

    Args:
        pairs: at least one.
        tokens: makes them ids.
        length: most tokens of a row; a longer response loses its end.
        prompt_length: most tokens of a prompt; a longer one loses its beginning.
        ids: (N,) content ids; positions when not given.
        name: of the data, part of the fingerprint.

    Raises:
        DataError: no pairs, or no room for a response.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokens: TextTokens,
        *,
        length: int,
        prompt_length: int,
        ids: Tensor | None = None,
        name: str = "prompts",
    ) -> None:
        if not pairs:
            raise DataError(f"the data set '{name}' is empty")
        if prompt_length >= length:
            raise DataError(
                f"{name}: prompts of {prompt_length} tokens leave no room for a response in rows "
                f"of {length}: data options 'prompt_length' and 'length'"
            )
        self.pairs, self.tokens, self.name = list(pairs), tokens, name
        self.ids = torch.arange(len(pairs)) if ids is None else ids
        different = list(dict.fromkeys(pair.prompt for pair in pairs))
        known = dict(zip(different, tokens.prompts(different, prompt_length), strict=True))
        asked = [known[pair.prompt] for pair in pairs]
        said = tokens.responses([pair.response for pair in pairs])
        said = [b[: length - len(a)] for a, b in zip(asked, said, strict=True)]
        self.prompt_lengths = torch.tensor([len(row) for row in asked])
        self.lengths = self.prompt_lengths + torch.tensor([len(row) for row in said])
        self._starts = self.lengths.cumsum(0) - self.lengths
        flat = [number for a, b in zip(asked, said, strict=True) for number in (*a, *b)]
        self._flat = torch.tensor(flat, dtype=torch.int32)
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, the ids and the tokenizer."""
        if not self._fingerprint:
            digest = hashlib.sha256(f"{self.name}|{self.tokens.fingerprint}".encode())
            for part in (self._flat, self.lengths, self.prompt_lengths, self.ids):
                digest.update(part.contiguous().numpy().data)
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        batch = self.read(torch.tensor([int(item[0])]), None)
        return {k: v[0] for k, v in batch.items()}

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        return int(self.ids[index])

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The rows at these positions, padded on the right to the longest of them."""
        lengths = self.lengths[rows][:, None]
        places = torch.arange(int(lengths.max()))[None]  # (1, L)
        mask = places < lengths
        at = (self._starts[rows][:, None] + places).clamp_max(len(self._flat) - 1)
        tokens = self._flat[at].long().masked_fill(~mask, self.tokens.padding)
        chosen = [self.pairs[row] for row in rows.tolist()]
        return Batch(
            id=self.ids[rows],
            tokens=tokens,
            attention_mask=mask,
            response_mask=mask & (places >= self.prompt_lengths[rows][:, None]),
            prompt=[pair.prompt for pair in chosen],
            response=[pair.response for pair in chosen],
            references=[list(pair.references) for pair in chosen],
        )


def prompt_splits(
    data: DataSet[Any],
    official: Mapping[str, Sequence[Pair]],
    options: Any,
    *,
    digest: str,
    edition: str,
    told: str = "",
) -> Splits:
    """Splits of pairs, with the tokenizer that the options name, in `about` as "reader".

    Args:
        data: its facts.
        official: pairs by split, "train" among them; a word tokenizer is made of that.
        options: `tokenizer`, `least`, `template`, `length`, `prompt_length`, `train_prompts`.
        digest: sha256 of the content.
        edition: name of the edition.
        told: one sentence on what was chosen of it.
    """
    tokens = _tokens(official["train"], options)
    sources: dict[str, Source] = {}
    first = 0
    for role, pairs in official.items():
        kept = list(range(len(pairs)))
        if role == "train" and options.train_prompts is not None:
            kept = _of_some_prompts(pairs, options.train_prompts, options.subset_seed)
            told = f"{told}; learnt from {options.train_prompts} prompts".removeprefix("; ")
        sources[role] = PromptRows(
            [pairs[row] for row in kept],
            tokens,
            length=options.length,
            prompt_length=options.prompt_length,
            ids=first + torch.tensor(kept),
            name=f"{data.name}/{role}",
        )
        first += len(pairs)
    about = {
        "name": data.name,
        "hash": digest,
        "licence": data.licence,
        "source": data.source,
        "selection": told,
        "input": {"length": options.length},
        "vocabulary": tokens.size,
        "facts": {"end": tokens.end, "padding": tokens.padding},
        "tokenizer": {"name": tokens.name, "tokens": tokens.size, "hash": tokens.fingerprint},
        "generation": {
            "new_tokens": options.new_tokens or _longest(sources["train"]),
            "draws": options.draws,
            "prompt_length": options.prompt_length,
        },
        "reader": tokens,
    }
    return Splits(sources, f"{data.name} ({edition})", about)


def _of_some_prompts(pairs: Sequence[Pair], count: int, seed: int) -> list[int]:
    """Places of the pairs of so many different prompts, drawn by the seed.

    Raises:
        DataError: there are fewer prompts.
    """
    different = list(dict.fromkeys(pair.prompt for pair in pairs))
    if count > len(different):
        raise DataError(
            f"data option 'train_prompts': {count} are asked for, and the training data has "
            f"{len(different)} different prompts"
        )
    drawn = torch.randperm(len(different), generator=generator(seed, "train prompts"))[:count]
    chosen = {different[place] for place in drawn.tolist()}
    return [place for place, pair in enumerate(pairs) if pair.prompt in chosen]


def _longest(train: Source) -> int:
    """Tokens of the longest response: more than that is never learned."""
    assert isinstance(train, PromptRows)
    return int((train.lengths - train.prompt_lengths).max())


def _tokens(train: Sequence[Pair], options: Any) -> TextTokens:
    if options.tokenizer == WORDS:
        made = word_tokenizer(_texts(train), least=options.least)
        return TextTokens(made, template=options.template or "", name=WORDS)
    template = "{prompt}\n" if options.template is None else options.template
    if options.tokenizer == BPE:
        made = bpe_tokenizer(_texts(train), merges=options.merges)
        return TextTokens(made, template=template, name=BPE)
    from stillhouse.models.loading import find_folder

    place = find_folder(options.tokenizer) or options.tokenizer
    return TextTokens(load_tokenizer(str(place)), template=template, name=options.tokenizer)


def _texts(train: Sequence[Pair]) -> list[str]:
    """Every prompt once, and all responses."""
    return [*dict.fromkeys(pair.prompt for pair in train), *(pair.response for pair in train)]
