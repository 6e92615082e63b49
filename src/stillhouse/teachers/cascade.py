"""Two teachers in a row: what one has written down, and the other is asked for the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.errors import TeacherError
from stillhouse.teacher import Frozen, Knowledge, Teacher, Want
from stillhouse.teachers.live import ACCESS
from stillhouse.teachers.stored_tokens import dense_logits


class Cascade:
    """Answers from a store where it has them, row by row, and live ones elsewhere.

    A student's own texts are new in every step, the ground truth is not: a method that mixes
    both asks a cascade and need not know which row is which. All answers are dense; logits of
    which a store kept the most probable classes come back as `dense_logits` makes them.

    Args:
        stored: marks rows that it lacks in `Knowledge.valid` (missing: "mask").
        live: asked about these rows alone.
        classes: of stored logits that were kept in part; the store's own number when it tells.

    Attributes:
        asked: rows that the live teacher was asked about.
        read: rows that were answered from the store.
    """

    def __init__(self, stored: Any, live: Teacher, *, classes: int = 0) -> None:
        if getattr(stored, "missing", "mask") != "mask":
            raise TeacherError("a cascade reads a store with missing: mask, to know what it lacks")
        self.stored, self.live = stored, live
        self.classes = classes or int(getattr(stored, "classes", 0))
        self.provides = live.provides
        self.name = f"{getattr(live, 'name', type(live).__name__)} and its store"
        self.asked = self.read = 0

    @property
    def fingerprint(self) -> str:
        """Of both."""
        text = f"{self.stored.fingerprint}|{self.live.fingerprint}"
        return hashlib.sha256(text.encode()).hexdigest()

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Both are bound; access to the module is the live one's alone."""
        self.live.bind(wants, task)
        self.stored.bind([want for want in wants if want.field not in ACCESS], task)

    def knowledge(self, batch: Batch) -> Knowledge:
        """Dense answers for every row.

        Raises:
            TeacherError: kept classes whose number is not known.
        """
        kept = self.stored.knowledge(batch)
        lacking = None if kept.valid is None else ~kept.valid
        missed = 0 if lacking is None else int(lacking.sum())
        self.read, self.asked = self.read + batch.size - missed, self.asked + missed
        if missed == batch.size:
            return self.live.knowledge(batch)
        values = {key: self._dense(value) for key, value in kept.items()}
        if not missed:
            return Knowledge(values)
        assert lacking is not None
        fresh = self.live.knowledge(batch.select(lacking))
        for key, value in values.items():
            answer = fresh.tensor(key)
            value = value.to(answer.dtype)
            value[lacking.to(value.device)] = answer
            values[key] = value
        return Knowledge(values)

    def _dense(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) and not self.classes:
            raise TeacherError("the cascade's store keeps some classes of an unknown number")
        return dense_logits(value, self.classes)

    def guest(self) -> Frozen:
        """The live teacher's module."""
        return self.live.guest()

    def head_layer(self) -> Any:
        """The live teacher's last linear layer."""
        return self.live.head_layer()  # type: ignore[attr-defined]

    def to(self, device: torch.device | str) -> Cascade:
        """Move the live teacher."""
        mover = getattr(self.live, "to", None)
        if mover is not None:
            mover(device)
        return self
