"""A teacher whose answers were written down before: it reads them, and asks nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Batch, read_rows, together
from stillhouse.clock import Views
from stillhouse.engine.store import Store
from stillhouse.errors import TeacherError, nearest
from stillhouse.teacher import Frozen, Knowledge, Want, answered
from stillhouse.teachers.live import ACCESS, TAP

_WHY = {
    "fresh": "answers to input that did not exist before the step",
    "input_grad": "gradients in the teacher's input",
    "weights": "the teacher's weights",
}
_KINDS = {"logits": "logits", "embedding": "vector", "text": "text"}


class Stored:
    """A teacher over a store; to a method that only reads answers it is like the module itself.

    Args:
        store: an open store, or its folder.
        missing: "error" refuses a record that is not there, "mask" marks the row in
            `Knowledge.valid`.

    Attributes:
        store: the open store.
        provides: what its fields are; never fresh, input_grad or weights.

    Raises:
        CheckpointError: no store, or a damaged one.
    """

    def __init__(self, store: Store | Path | str, *, missing: str = "error") -> None:
        if missing not in {"error", "mask"}:
            raise TeacherError(
                f"missing records are no '{missing}'{nearest(missing, ('error', 'mask'))}"
            )
        self.store = store if isinstance(store, Store) else Store.open(store)
        self.missing = missing
        kinds = {_kind(field.name) for field in self.store.header.fields}
        self.provides = frozenset(kinds)
        self.name = f"store {self.store.path.name}"
        self._names: list[tuple[str, str]] | None = None
        self._wants: tuple[Want, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the header: teacher, data, preprocessing, fields and their form."""
        return hashlib.sha256(self.store.header.text().encode()).hexdigest()

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check that every want is stored, of this task's data and with its classes.

        Raises:
            TeacherError: the method needs the module itself; a field is not stored; the store
                is of other data, of other classes, or unfinished.
        """
        names: list[tuple[str, str]] = []
        for want in wants:
            if want.field in ACCESS:
                self._refuse_access(want.field)
            elif want.within.key in self.store.fields:
                names.append((want.within.key, want.within.key))
            elif not want.optional:
                raise TeacherError(
                    f"the store {self.store.path} keeps no '{want.key}'"
                    f"{nearest(want.key, self.store.fields)}; capture it with this method's recipe"
                )
        self._names = list(dict.fromkeys(names))
        self._wants = tuple(want for want in wants if want.field not in ACCESS)
        if self.missing == "error" and not self.store.complete:
            raise TeacherError(
                f"the capture of the store {self.store.path} is not finished: "
                f"{self.store.finished:,} of {len(self.store):,} records; finish it, or read with "
                "missing: mask"
            )
        if task is not None:
            self._check_classes(task)
            self._check_data(task)

    def _refuse_access(self, access: str) -> None:
        raise TeacherError(
            f"the method needs {_WHY[access]} ('{access}'), which the store {self.store.path} "
            "cannot give: give the teacher as a model"
        )

    def _check_classes(self, task: Any) -> None:
        classes = getattr(task, "about", {}).get("classes")
        field = self.store.fields.get("logits")
        if classes is None or field is None:
            return
        count = classes if isinstance(classes, int) else len(classes)
        axis = int(getattr(task, "class_axis", -1))
        # A record has no dimension of rows before the others.
        held = field.shape[axis - 1] if 0 < axis <= len(field.shape) else field.classes
        if field.shape and held != count:
            raise TeacherError(
                f"the store {self.store.path} holds logits of {held} classes, the data "
                f"'{task.splits.edition}' has {count}: teacher and student must mean the same ones"
            )

    def _check_data(self, task: Any) -> None:
        splits, head = task.splits, self.store.header
        open_roles = splits.open
        if not open_roles:
            return
        found = {splits[role].fingerprint for role in open_roles}
        if "train" in open_roles:
            pairs = [("train", role) for role in open_roles if role != "train"]
            found |= {together(splits, pair).fingerprint for pair in pairs}
        if head.data not in found:
            role = "train" if "train" in open_roles else open_roles[0]
            self.store.check(data=splits[role].fingerprint, edition=splits.edition)

    def reads(self, order: Any, views: int) -> None:
        """Check how the run will read: the engine calls it once the order is known.

        Args:
            order: its `draws` are the finite augmentations of a sample, None for a new one
                every epoch; with `augment` False samples are read as they are.
            views: the seed of the run's augmentations.

        Raises:
            TeacherError: the store holds other augmentations, or none.
        """
        source, draws = getattr(order, "source", None), getattr(order, "draws", None)
        if source is None:
            return
        if not getattr(order, "augment", True) or not (draws or augments(source)):
            self.store.check(draws=0)
            return
        if draws is None:
            raise TeacherError(
                "the run draws a new augmentation of every sample in every epoch, which no store "
                f"can hold ({self.store.path}): read with a finite number (teacher: store: "
                "{draws: 4})"
            )
        self.store.check(draws=draws, views=views)

    def knowledge(self, batch: Batch) -> Knowledge:
        """The batch's records, as float32 on the batch's device.

        Raises:
            TeacherError: a record is not there.
            CheckpointError: it is damaged.
        """
        return answered(self._wants, batch, self._answer)

    def _answer(self, batch: Batch, wants: Sequence[Want]) -> Knowledge:
        names = None if self._names is None else [stored for _, stored in self._names]
        values, valid = self.store.read(
            batch["id"],
            batch.get("draw", 0),
            names=names,
            device=batch.device,
            missing=self.missing,
        )
        return Knowledge(values, valid)

    def guest(self) -> Frozen:
        """Always refused: a store is no module.

        Raises:
            TeacherError: always.
        """
        raise TeacherError(f"the store {self.store.path} is no module: give the teacher as a model")

    def to(self, device: torch.device | str) -> Stored:
        """Nothing is to be moved: records go where the batch is."""
        return self


def _kind(name: str) -> str:
    field = name if name.startswith(TAP) else name.rpartition(":")[2].rpartition(".")[2]
    return "taps" if TAP in name else _KINDS.get(field, "scores")


def augments(source: Any) -> bool:
    """Whether a source changes samples at random: some are read twice with different chance."""
    rows = torch.arange(min(8, len(source)))
    plain = read_rows(source, rows, None)
    for seed in range(4):
        drawn = read_rows(source, rows, Views(seed))
        if any(_differ(plain[name], drawn[name]) for name in plain if name != "draw"):
            return True
    return False


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return not torch.equal(one, other)
    return isinstance(one, Tensor) != isinstance(other, Tensor)
