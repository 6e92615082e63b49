"""What a causal language model says of fixed texts, kept token by token: no padding on disk.

A record is the distribution behind one prefix, found by the prefix' number
(`parts/token_rows.py`), so rows of any length are read from a store of fixed records, and what
several responses have in common is kept once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.engine.store import Store
from stillhouse.errors import TeacherError
from stillhouse.parts.token_rows import predicting, prefix_keys
from stillhouse.teacher import Frozen, Knowledge, TopK, Value, Want
from stillhouse.teachers.live import ACCESS

FIELD = "logits"


class StoredTokens:
    """A teacher over a store of prefixes: its logits where they speak of a response token.

    Args:
        store: an open store, or its folder.
        missing: "error" refuses a row of which not all is kept, "mask" marks it in
            `Knowledge.valid`.

    Attributes:
        store: the open store.
        provides: logits.

    Raises:
        CheckpointError: no store, or a damaged one.
        TeacherError: a store of something else.
    """

    provides = frozenset({"logits"})

    def __init__(self, store: Store | Path | str, *, missing: str = "error") -> None:
        self.store = store if isinstance(store, Store) else Store.open(store)
        if self.store.header.extra.get("records") != "prefixes" or FIELD not in self.store.fields:
            raise TeacherError(
                f"the store {self.store.path} is none of a language model's tokens: capture it on "
                "the task text-generation"
            )
        self.missing = missing
        self.name = f"store {self.store.path.name}"

    @property
    def fingerprint(self) -> str:
        """Of the header: teacher, data, fields and their form."""
        return hashlib.sha256(self.store.header.text().encode()).hexdigest()

    @property
    def classes(self) -> int:
        """Size of the vocabulary."""
        return self.store.fields[FIELD].classes

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check that nothing but logits is wanted, of a finished store of this vocabulary.

        Raises:
            TeacherError: another field, access to the module, an unfinished store, or another
                vocabulary.
        """
        for want in wants:
            if want.field != FIELD and not want.optional:
                access = " of the teacher itself" if want.field in ACCESS else ""
                raise TeacherError(
                    f"the method needs '{want.field}'{access}, which the store {self.store.path} "
                    "cannot give: leave out teacher.store"
                )
        if self.missing == "error" and not self.store.complete:
            raise TeacherError(
                f"the capture of the store {self.store.path} is not finished: "
                f"{self.store.finished:,} of {len(self.store):,} records; finish it"
            )
        vocabulary = getattr(task, "vocabulary", None)
        if vocabulary is not None and vocabulary.size != self.classes:
            raise TeacherError(
                f"the store {self.store.path} holds logits of {self.classes} tokens, the models of "
                f"this run share {vocabulary.size}"
            )

    def knowledge(self, batch: Batch) -> Knowledge:
        """Logits (B, L, V), or what was kept of them, at positions before a response token.

        Elsewhere dense logits are 0, and of kept classes all mass is in the rest. Rows of which
        not every position is kept are marked in `valid`, where `missing` is "mask".

        Raises:
            TeacherError: a record is not there.
        """
        at = predicting(batch["response_mask"])  # (B, L)
        keys = prefix_keys(batch["tokens"], batch["attention_mask"])[at.cpu()]
        device = batch["tokens"].device
        values, there = self.store.read(keys, names=[FIELD], device=device, missing=self.missing)
        found = spread_over(values[FIELD], at)
        if there is None:
            return Knowledge({FIELD: found})
        lacking = at.clone()
        lacking[at] = ~there.to(device)
        return Knowledge({FIELD: found}, ~lacking.any(1))

    def guest(self) -> Frozen:
        """Always refused: a store is no module.

        Raises:
            TeacherError: always.
        """
        raise TeacherError(f"the store {self.store.path} is no module: give the teacher as a model")

    def to(self, device: torch.device | str) -> StoredTokens:
        """Nothing is to be moved: records go where the batch is."""
        return self


def spread_over(value: Value, at: Tensor) -> Value:
    """Answers of n positions, put where they belong in (B, L) rows.

    Args:
        value: dense (n, V), or n kept distributions.
        at: (B, L) bool with n True.
    """

    def placed(part: Tensor, filler: float) -> Tensor:
        whole = part.new_full((*at.shape, *part.shape[1:]), filler)
        whole[at] = part
        return whole

    if isinstance(value, TopK):
        weights = None if value.weights is None else placed(value.weights, 0.0)
        ids, logp = placed(value.ids, 0), placed(value.logp, -math.inf)
        return TopK(ids, logp, placed(value.rest, 0.0), value.temperature, weights)
    if isinstance(value, Tensor):
        return placed(value, 0.0)
    raise TeacherError(f"answers about tokens do not come as {type(value).__name__}")


def dense_logits(value: Value, classes: int) -> Tensor:
    """Logits of whatever was kept: the missing mass in equal shares over the other classes.

    At the kept classes the distribution is the teacher's; its entropy over the others is the
    largest that their mass allows.

    Args:
        value: dense logits, or kept classes (..., k) with the rest's mass.
        classes: size V of the vocabulary.

    Returns:
        (..., V) logits at the temperature at which they were kept.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, TopK) or value.weights is not None:
        raise TeacherError("only dense logits, or the most probable classes, can be made dense")
    others = classes - value.ids.shape[-1]
    # The logits of positions without any kept class are finite: all alike.
    share = (value.rest - math.log(max(1, others))).clamp_min(-1e4)
    whole = share.unsqueeze(-1).expand(*share.shape, classes).clone()
    kept = torch.where(value.logp == -math.inf, share.unsqueeze(-1), value.logp)
    return whole.scatter_(-1, value.ids, kept)
