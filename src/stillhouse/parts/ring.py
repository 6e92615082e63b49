"""A ring of rows: the newest that training has seen, first in, first out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from stillhouse.errors import ModelError, RecipeError, nearest
from stillhouse.objective import Part

_SLOTS = "slots of "


class Ring(Part):
    """A queue of fixed capacity whose rows lie in place; a new row overwrites the oldest.

    `propose` says which rows come in and changes nothing; the end of the step commits them.
    Proposals of several micro-batches are pushed in their order, so that the content is that of
    the one batch; with several processes every process must propose the rows of the global
    batch in the global order (`whole_batch`). Place and content are buffers, so a resumed run
    goes on where it was.

    Users: queues of momentum embeddings with the ids of their samples, anchors of a teacher,
    negatives of a small batch, replayed token rows (`sample`), pools with random replacement
    (`replace`).

    Args:
        capacity: rows at most, >= 1.
        fields: name to the shape of one row, or to a tensor (n, ...) of first rows, oldest
            first, n <= capacity and equal for all fields.
        dtype: of fields that are given by shape; torch's default when None.

    Attributes:
        capacity: as given.
        place: the slot that is overwritten next, 0-dim int64.
        filled: how many slots hold a row, 0-dim int64.

    Raises:
        RecipeError: a capacity below 1, no field, or a name that cannot be a buffer's.
        ModelError: first rows of different number, or more than fit.
    """

    place: Tensor
    filled: Tensor

    def __init__(
        self,
        capacity: int,
        fields: Mapping[str, tuple[int, ...] | Tensor],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if capacity < 1 or not fields:
            raise RecipeError(f"a ring needs a capacity >= 1 and a field, not {capacity}")
        self.capacity = capacity
        self.names = tuple(fields)
        given = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        numbers = {len(rows) for rows in given.values()}
        if given and (len(numbers) > 1 or len(given) < len(fields) or max(numbers) > capacity):
            raise ModelError(
                f"first rows must be given for all fields, equally many and at most {capacity}: "
                f"{ {name: tuple(rows.shape) for name, rows in given.items()} }"
            )
        count = numbers.pop() if given else 0
        for name, value in fields.items():
            if not name.isidentifier() or name in ("place", "filled"):
                raise RecipeError(f"'{name}' cannot name a field of a ring")
            self.register_buffer(f"rows_{name}", _slots(capacity, value, dtype))
        self.register_buffer("place", torch.tensor(count % capacity))
        self.register_buffer("filled", torch.tensor(count))

    def __len__(self) -> int:
        return int(self.filled)

    def propose(self, **rows: Tensor) -> None:
        """Propose rows that push the oldest out.

        Args:
            rows: field to (B, ...), all fields with equal B; B may exceed the capacity, of
                which the last rows stay then.

        Raises:
            ModelError: a field is missing or unknown, or shapes do not fit.
        """
        self._check(rows)
        super().propose(**rows)

    def replace(self, slots: Tensor, **rows: Tensor) -> None:
        """Propose rows in the place of those in some slots; ages stay as they are.

        Args:
            slots: (B,) int64 in [0, len).
            rows: field to (B, ...); fields left out keep their values.

        Raises:
            ModelError: an unknown field, or shapes that do not fit.
        """
        self._check(rows, every=False)
        if any(len(value) != len(slots) for value in rows.values()):
            raise ModelError(f"{len(slots)} slots take {len(slots)} rows of each field")
        for name, value in rows.items():
            super().propose(**{_SLOTS + name: slots, f"in {name}": value})

    def commit(self, made: dict[str, list[Tensor]]) -> None:
        """Replace, then push, what the accepted micro-batches proposed, in their order."""
        for name in self.names:
            for slots, rows in zip(
                made.get(_SLOTS + name, ()), made.get(f"in {name}", ()), strict=True
            ):
                held = self.slots(name)
                held.index_copy_(0, slots.to(held.device), rows.to(held))
        if self.names[0] in made:
            self._push({name: torch.cat(made[name]) for name in self.names})

    def push(self, **rows: Tensor) -> None:
        """Push at once, outside of a training step: `propose` and the step's end in one."""
        self.propose(**rows)
        self.settle(True)

    def slots(self, field: str = "") -> Tensor:
        """(capacity, ...) the buffer itself, in no order of age: for what does not mind it.

        Slots that hold no row yet are 0. It must not be changed.

        Args:
            field: the only one when not given.
        """
        return self._buffer(field)

    def last(self, count: int | None = None, field: str = "") -> Tensor:
        """(count, ...) the newest rows, the oldest of them first.

        Args:
            count: at most `len`; all when None.
            field: the only one when not given.

        Raises:
            ModelError: fewer rows are held.
        """
        held = self._buffer(field)
        count = len(self) if count is None else count
        if not 0 <= count <= len(self):
            raise ModelError(f"{count} rows are asked of a ring that holds {len(self)}")
        ages = torch.arange(-count, 0, device=held.device)
        return held.index_select(0, (self.place + ages) % self.capacity)

    def sample(self, count: int, rng: Generator, *, replacement: bool = True) -> dict[str, Tensor]:
        """Rows drawn from those that are held, by field; `slots` says which.

        Args:
            count: rows.
            rng: the chance, on the CPU, equal on all processes.
            replacement: a row may be drawn twice.

        Raises:
            ModelError: nothing is held, or too few rows without replacement.
        """
        size = len(self)
        if size == 0 or (count > size and not replacement):
            raise ModelError(f"{count} rows are drawn from a ring that holds {size}")
        if replacement:
            chosen = torch.randint(size, (count,), generator=rng)
        else:
            chosen = torch.randperm(size, generator=rng)[:count]
        chosen = chosen.to(self.place.device)
        found = {name: self._buffer(name).index_select(0, chosen) for name in self.names}
        return {**found, "slots": chosen}

    def _push(self, rows: dict[str, Tensor]) -> None:
        count = len(next(iter(rows.values())))
        kept = min(count, self.capacity)
        # The slots are computed where they live: nothing waits for an accelerator.
        ahead = torch.arange(count - kept, count, device=self.place.device)
        slots = (self.place + ahead) % self.capacity
        for name, value in rows.items():
            held = self._buffer(name)
            held.index_copy_(0, slots, value[count - kept :].to(held))
        self.place.copy_((self.place + count) % self.capacity)
        self.filled.copy_((self.filled + count).clamp(max=self.capacity))

    def _buffer(self, field: str) -> Tensor:
        if not field and len(self.names) > 1:
            raise ModelError(f"the ring has several fields, name one: {', '.join(self.names)}")
        name = field or self.names[0]
        if name not in self.names:
            raise ModelError(f"the ring has no field '{name}'{nearest(name, self.names)}")
        found: Tensor = getattr(self, f"rows_{name}")
        return found

    def _check(self, rows: Mapping[str, Tensor], *, every: bool = True) -> None:
        for name, value in rows.items():
            wanted = self._buffer(name).shape[1:]
            if value.ndim == 0 or value.shape[1:] != wanted:
                raise ModelError(
                    f"rows of the ring's field '{name}' have the shape {tuple(wanted)}, not "
                    f"{tuple(value.shape[1:])}"
                )
        if every and set(rows) != set(self.names):
            raise ModelError(f"a row has the fields {self.names}, not {tuple(rows)}")
        if len({len(value) for value in rows.values()}) > 1:
            raise ModelError("the fields of a ring take equally many rows")


def _slots(capacity: int, value: tuple[int, ...] | Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.zeros(capacity, *value, dtype=dtype)
    held = value.new_zeros(capacity, *value.shape[1:])
    held[: len(value)] = value.detach()
    return held


__all__ = ["Ring"]
