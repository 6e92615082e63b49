"""Rows of a causal language model: prompt and response as one padded row, and its masks.

A batch holds the views

    tokens          (B, L) int64: prompt, response with its end token, padding
    attention_mask  (B, L) bool: what is no padding
    response_mask   (B, L) bool: the response's tokens, its end token among them

Rows to learn from are padded on the right: a causal model sees nothing of what stands behind a
token, so such rows need no attention mask and no position ids. Prompts to go on from are padded
on the left. What is padding is told by masks alone, never by comparing with the padding id,
which many tokenizers share with the end of text.

Logits at position i speak of the token at i + 1. That shift is made here and nowhere else:
`predicting` says at which positions logits speak of a response token, `next_tokens` of which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.errors import DataError, ModelError

VIEWS = ("tokens", "attention_mask", "response_mask")


def predicting(response_mask: Tensor) -> Tensor:
    """(B, L) bool: the positions whose logits speak of a response token.

    Args:
        response_mask: (B, L) bool.
    """
    return torch.cat([response_mask[:, 1:], torch.zeros_like(response_mask[:, :1])], 1)


def next_tokens(tokens: Tensor) -> Tensor:
    """(B, L) int64: the token each position's logits speak of; the last column is a filler.

    Args:
        tokens: (B, L) int64.
    """
    return torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)


def response_items(
    logits: Tensor, batch: Mapping[str, Any], *further: Tensor
) -> tuple[Tensor, ...]:
    """Logits of all response tokens of a batch, one below another.

    Args:
        logits: (B, L, V).
        batch: with `tokens` and `response_mask`.
        *further: (B, L, ...), taken at the same positions.

    Returns:
        (n, V) logits, (n,) the tokens they speak of, and (n, ...) of each further tensor.

    Raises:
        ModelError: the logits have another shape than the rows.
    """
    tokens = batch["tokens"]
    if logits.shape[:2] != tokens.shape:
        raise ModelError(
            f"logits of shape {tuple(logits.shape)} do not belong to rows of shape "
            f"{tuple(tokens.shape)}"
        )
    at = predicting(batch["response_mask"])
    return logits[at], next_tokens(tokens)[at], *(value[at] for value in further)


def responses(batch: Mapping[str, Any]) -> int | Tensor:
    """Number of response tokens of a batch: what its terms are means over."""
    counted: Tensor = batch["response_mask"].sum()
    return counted


# From one side to the other ----------------------------------------------------------------


def moved_left(values: Tensor, mask: Tensor, *further: Tensor) -> tuple[Tensor, ...]:
    """Rows padded on the right (or anywhere) as rows padded on the left, order kept.

    Args:
        values: (B, L).
        mask: (B, L) bool, what is no padding.
        *further: (B, L), moved alike.

    Returns:
        values, mask and each further tensor, cut to the longest row; at padding stands what
        stood in some masked place.
    """
    return _moved(mask, (values, *further), descending=False)


def moved_right(values: Tensor, mask: Tensor, *further: Tensor) -> tuple[Tensor, ...]:
    """Rows padded on the left (or anywhere) as rows padded on the right; see `moved_left`."""
    return _moved(mask, (values, *further), descending=True)


def _moved(mask: Tensor, values: tuple[Tensor, ...], *, descending: bool) -> tuple[Tensor, ...]:
    order = mask.to(torch.uint8).argsort(dim=1, descending=descending, stable=True)
    longest = max(1, int(mask.sum(1).max())) if len(mask) else 1
    kept = slice(0, longest) if descending else slice(mask.shape[1] - longest, None)
    first, *others = (value.gather(1, order)[:, kept] for value in values)
    return first, mask.gather(1, order)[:, kept], *others


def prompts(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The prompts of rows, padded on the left: (B, P) int64 tokens and (B, P) bool mask."""
    mask = batch["attention_mask"] & ~batch["response_mask"]
    tokens, mask = moved_left(batch["tokens"], mask)
    return tokens, mask


def joined(
    prompt: Tensor,
    prompt_mask: Tensor,
    response: Tensor,
    response_mask: Tensor,
    *,
    padding: int = 0,
    like: Batch | None = None,
) -> Batch:
    """Rows to learn from, of prompts and of what was said to them.

    Args:
        prompt: (B, P) int64.
        prompt_mask: (B, P) bool, padding on whatever side.
        response: (B, R) int64, its end token included where it has one.
        response_mask: (B, R) bool.
        padding: id that is written where there is nothing.
        like: a batch of the same rows, whose other views and ids are taken over; "response",
            the text, is not.

    Returns:
        Views `tokens`, `attention_mask`, `response_mask`, padded on the right.
    """
    whole = torch.cat([prompt, response], 1)
    there = torch.cat([prompt_mask, response_mask], 1)
    said = torch.cat([torch.zeros_like(prompt_mask), response_mask], 1)
    tokens, mask, said = moved_right(whole, there, said)
    rows = Batch({k: v for k, v in (like or {}).items() if k != "response"})
    rows.update(
        tokens=tokens.masked_fill(~mask, padding),
        attention_mask=mask,
        response_mask=said & mask,
    )
    return rows


def padded(
    rows: Sequence[Tensor], *, padding: int = 0, left: bool = False, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows of different length as one tensor.

    Args:
        rows: (l,) int64 each.
        padding: id that is written where there is nothing.
        left: pad on the left.
        width: least number of columns.

    Returns:
        (B, L) int64 and the (B, L) bool mask of what is no padding.
    """
    if not rows:
        raise DataError("no rows to pad")
    lengths = torch.tensor([len(row) for row in rows])
    longest = max(1, width, int(lengths.max()))
    places = torch.arange(longest)[None]
    if left:
        mask = places >= longest - lengths[:, None]
    else:
        mask = places < lengths[:, None]
    tokens = torch.full(mask.shape, padding, dtype=torch.int64)
    tokens[mask] = torch.cat([row.long().cpu() for row in rows])
    device = rows[0].device
    return tokens.to(device), mask.to(device)


# What a position depends on ------------------------------------------------------------------


def prefix_keys(tokens: Tensor, mask: Tensor) -> Tensor:
    """A 63-bit number of every position's prefix, which is all that its logits depend on.

    Equal prefixes have equal numbers in whatever row and behind whatever padding, so what a
    causal model says of a text is kept once for all texts that begin alike.

    Args:
        tokens: (B, L) int64.
        mask: (B, L) bool, what is no padding; it stands in front or behind.

    Returns:
        (B, L) int64 >= 0 on the CPU; of no meaning at padding.
    """
    ids, there = tokens.cpu().numpy().astype(np.uint64), mask.cpu().numpy().astype(bool)
    with np.errstate(over="ignore"):
        # A polynomial in an odd number whose coefficients are the mixed tokens: its partial sums.
        powers = np.cumprod(np.full(ids.shape[1] + 1, _ODD, dtype=np.uint64))
        terms = np.where(there, _mixed(ids + np.uint64(1)), np.uint64(0))
        place = np.maximum(there.cumsum(1) - 1, 0)
        summed = (terms * powers[place]).cumsum(1, dtype=np.uint64)
        keys = _mixed(summed + place.astype(np.uint64) * _ODD) >> np.uint64(1)
    return torch.from_numpy(keys.astype(np.int64))


_ODD = np.uint64(0xD1B54A32D192ED03)


def _mixed(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
