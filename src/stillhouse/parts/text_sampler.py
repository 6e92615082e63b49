"""Sampling from a causal language model: batched, with cached keys and values, repeatable."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.net import in_eval_mode


class TextSampler:
    """Continues prompts token by token until the end token.

    Every row has its own uniform number per token, drawn before the first one and turned into a
    token by the inverse of the cumulative distribution. So what a row samples depends on its
    prompt and its numbers alone: not on how far it is padded, not on when its neighbours end,
    not on which rows stand beside it when the numbers are given.

    Args:
        max_new: most new tokens, >= 1; fewer where the model's context is full before.
        end: ids that end a response.
        padding: id written behind it.
        temperature: of the softmax; 0 takes the most probable token.
        top_p: in (0, 1]: the smallest set of tokens that holds this probability is drawn from.
        top_k: this many most probable tokens are drawn from; 0 for all.

    Raises:
        RecipeError: a setting out of range.
    """

    def __init__(
        self,
        max_new: int,
        *,
        end: int | Iterable[int],
        padding: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        if max_new < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise RecipeError(
                "sampling needs max_new >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0, "
                f"not max_new {max_new}, temperature {temperature}, top_p {top_p}, top_k {top_k}"
            )
        self.max_new = max_new
        self.end = (end,) if isinstance(end, int) else tuple(end)
        self.padding = padding
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def ending(self, end: int | Iterable[int], padding: int, max_new: int = 0) -> TextSampler:
        """The same sampler for another vocabulary.

        Args:
            end: ids that end a response.
            padding: id written behind it.
            max_new: most new tokens; 0 for as many as here.
        """
        return TextSampler(
            max_new or self.max_new,
            end=end,
            padding=padding,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )

    def __call__(
        self, net: nn.Module, prompts: Tensor, mask: Tensor, rng: Generator | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a continuation of every prompt.

        The model is put into eval mode and back into the mode it was in.

        Args:
            net: a `Net` around a causal language model, or the model: called with `input_ids`,
                `attention_mask`, `past_key_values`, `use_cache` (and `position_ids` where it
                takes them), it gives `logits` and `past_key_values`; or `cache` in its place.
            prompts: (B, P) int64, padded on the left.
            mask: (B, P) bool, what is no padding; at least one token in each row.
            rng: a generator, from which (B, max_new) uniform numbers are drawn; or these
                numbers, in [0, 1) (`Clock.rand` gives rows of a batch their own). None for
                temperature 0.

        Returns:
            The new tokens (B, n) int64, n <= max_new, and their mask (B, n) bool: True up to
            the end token, which is included. Rows that reached no end have no end token.

        Raises:
            ModelError: a prompt is empty, padded on the right, or as long as the context.
            RecipeError: a temperature above 0 without a source of chance.
        """
        mask = mask.bool()
        _refuse_strange(prompts, mask)
        steps = self._steps(net, mask)
        chance = self._chance(len(prompts), rng, prompts.device)
        with _asked(net), torch.no_grad():
            return self._sampled(net, prompts, mask, chance, steps)

    def _steps(self, net: nn.Module, mask: Tensor) -> int:
        context = context_of(net)
        longest = int(mask.sum(1).max())
        if context is None:
            return self.max_new
        if longest >= context:
            raise ModelError(
                f"a prompt has {longest} tokens and the model's context {context}: nothing can be "
                "added to it; cut prompts (data option prompt_length)"
            )
        return min(self.max_new, context - longest)

    def _chance(
        self, rows: int, rng: Generator | Tensor | None, device: torch.device
    ) -> Tensor | None:
        if self.temperature == 0:
            return None
        if rng is None:
            raise RecipeError("sampling at a temperature above 0 needs a generator")
        if isinstance(rng, Tensor):
            if rng.shape[0] != rows or rng.ndim != 2 or rng.shape[1] < self.max_new:
                raise ModelError(
                    f"sampling {rows} rows of {self.max_new} tokens needs as many uniform numbers, "
                    f"not a tensor of shape {tuple(rng.shape)}"
                )
            return rng.to(device)
        return torch.rand(rows, self.max_new, generator=rng, device=rng.device).to(device)

    def _sampled(
        self, net: nn.Module, prompts: Tensor, mask: Tensor, chance: Tensor | None, steps: int
    ) -> tuple[Tensor, Tensor]:
        ends = torch.tensor(self.end, device=prompts.device)
        call = _Cached(net)
        tokens, seen, active = prompts, mask, torch.arange(len(prompts), device=prompts.device)
        going = torch.ones_like(active, dtype=torch.bool)
        found = prompts.new_full((len(prompts), steps), self.padding)
        valid = torch.zeros_like(found, dtype=torch.bool)
        for step in range(steps):
            logits = call(tokens, seen)
            chosen = self._chosen(logits, None if chance is None else chance[active, step])
            chosen = chosen.masked_fill(~going, self.padding)
            found[active, step], valid[active, step] = chosen, going
            seen = torch.cat([seen, going[:, None]], 1)
            going = going & ~torch.isin(chosen, ends)
            left = int(going.sum())
            if not left:
                return found[:, : step + 1], valid[:, : step + 1]
            tokens = chosen[:, None]
            if 2 * left <= len(active) and call.keep(going):
                active, seen, tokens = active[going], seen[going], tokens[going]
                going = going[going]
        return found, valid

    def _chosen(self, logits: Tensor, chance: Tensor | None) -> Tensor:
        """(B,) tokens from (B, V) logits and one uniform number each."""
        if chance is None:
            return logits.argmax(-1)
        return drawn(self.probabilities(logits), chance)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) what is drawn from, for logits (B, V) and a temperature above 0."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, places = p.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, places, outside), 0.0)
        return p


def drawn(p: Tensor, chance: Tensor) -> Tensor:
    """One class per row by the inverse of the cumulative distribution.

    Args:
        p: (B, V) >= 0, of any positive sum.
        chance: (B,) in [0, 1).

    Returns:
        (B,) int64; never a class of probability 0.
    """
    # In float64 the point stays below the whole mass, so a class of some probability is found.
    exact = torch.float32 if p.device.type == "mps" else torch.float64
    mass = p.to(exact).cumsum(-1)
    point = chance.to(exact)[:, None] * mass[:, -1:]
    found = torch.searchsorted(mass, point, right=True).squeeze(-1)
    if exact is torch.float64:
        return found
    last = p.shape[-1] - 1 - p.flip(-1).gt(0).to(torch.uint8).argmax(-1)
    return found.minimum(last)


class _Cached:
    """Logits of the last position, the keys and values of all before it kept."""

    def __init__(self, net: nn.Module) -> None:
        module = getattr(net, "module", net)
        self.module: Any = module
        self.size: int | None = getattr(net, "vocabulary", None)
        self.placed = takes(module, "position_ids")
        self.last_only = {"logits_to_keep": 1} if takes(module, "logits_to_keep") else {}
        self.name = cache_name(module)
        self.past: Any = None

    def __call__(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """(B, V) logits that follow `tokens`, the newest of all that `seen` (B, all) marks."""
        given: dict[str, Any] = {"attention_mask": seen.long()}
        if self.placed:
            places = (seen.long().cumsum(1) - 1).clamp_min(0)
            given["position_ids"] = places[:, -tokens.shape[1] :]
        given |= {self.name: self.past, **self.last_only}
        out = self.module(input_ids=tokens, use_cache=True, **given)
        self.past = out[self.name]
        logits: Tensor = out["logits"][:, -1]
        return logits if self.size is None else logits[:, : self.size]

    def keep(self, rows: Tensor) -> bool:
        """Go on with these rows alone, (B,) bool; False where the cache cannot be cut."""
        cut = getattr(self.past, "batch_select_indices", None)
        if cut is None:
            return False
        cut(rows.nonzero()[:, 0])
        return True


def takes(module: nn.Module, name: str) -> bool:
    """Whether a model's forward has an argument of that name; of what adapters stand around."""
    inner = getattr(module, "get_base_model", lambda: module)()
    kind: Any = type(inner)
    return name in _arguments(kind)


@lru_cache(64)
def _arguments(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_name(module: nn.Module) -> str:
    """How a model calls its keys and values: releases of transformers differ."""
    return "cache" if takes(module, "cache") else "past_key_values"


def context_of(net: nn.Module) -> int | None:
    """Most tokens of a row that a model reads; None where it does not say."""
    config = getattr(getattr(net, "module", net), "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


@contextmanager
def _asked(net: nn.Module) -> Iterator[None]:
    """Eval mode with cached keys and values, and back to what it was, module by module."""
    configs = {
        id(c): c for m in net.modules() if (c := getattr(m, "config", None)) is not None
        and hasattr(c, "use_cache")
    }  # fmt: skip
    cached = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = True
        with in_eval_mode(net):
            yield
    finally:
        for key, value in cached.items():
            configs[key].use_cache = value


def _refuse_strange(prompts: Tensor, mask: Tensor) -> None:
    if prompts.shape != mask.shape or prompts.ndim != 2:
        raise ModelError(
            f"prompts of shape {tuple(prompts.shape)} and a mask of shape {tuple(mask.shape)} do "
            "not fit: both are (rows, tokens)"
        )
    if not len(prompts) or not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise ModelError(
            "prompts to go on from are padded on the left, and none is empty "
            "(parts.token_rows.prompts makes such of a batch)"
        )
