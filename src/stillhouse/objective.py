"""What is learned and by which loss: the portable unit of a method.

`forward` proposes, the end of the step commits: forward never changes persistent state
(running statistics of normalisation layers excepted). So gradient accumulation, a second
forward for sharpness, refused steps and recomputation are all safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.teacher import Frozen, Knowledge, Want

if TYPE_CHECKING:
    from stillhouse.teacher import Teacher

PREPARE = -1


class Part(nn.Module):
    """Whatever moves without gradients: queues, running means, thresholds.

    State is registered as buffers. During a step new values are only proposed; the loop
    commits them when the step is accepted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._slot = PREPARE
        self._made: dict[int, dict[str, Tensor]] = {}

    def propose(self, **values: Tensor) -> None:
        """Propose new values; the first proposal of a micro-batch counts.

        A second forward of the same micro-batch (sharpness, recomputation) proposes again
        and is not heard.
        """
        made = self._made.setdefault(self._slot, {})
        for name, value in values.items():
            made.setdefault(name, value.detach())

    def commit(self, made: dict[str, list[Tensor]]) -> None:
        """Take the accepted proposals over into persistent state.

        Args:
            made: name to the proposals of the micro-batches, in order.

        By default a name that is a buffer takes the mean of its proposals. A part that
        gathers rows overrides this.
        """
        for name, values in made.items():
            buffer = dict(self.named_buffers(recurse=False)).get(name)
            if buffer is None:
                raise ModelError(f"{type(self).__name__} proposed '{name}', which is no buffer")
            value = values[0] if len(values) == 1 else torch.stack(values).mean(0)
            buffer.copy_(value)

    def begin_slot(self, slot: int) -> None:
        """The loop says which micro-batch comes next (-1: prepare)."""
        # A module's own way of setting attributes takes 10 microseconds of every step.
        object.__setattr__(self, "_slot", slot)

    def settle(self, accepted: bool) -> None:
        """The loop ends the step: commit all, or only what `prepare` proposed."""
        slots = sorted(s for s in self._made if accepted or s == PREPARE)
        gathered: dict[str, list[Tensor]] = {}
        for slot in slots:
            for name, value in self._made[slot].items():
                gathered.setdefault(name, []).append(value)
        self._made = {}
        self._slot = PREPARE
        if gathered:
            with torch.no_grad():
                self.commit(gathered)


Count = float | int | Tensor | Mapping[str, "float | int | Tensor"]


class Objective(Part):
    """Named, weighted loss terms; holds the student and what is learned beside it.

    Attributes:
        wants: what is asked of the teacher for every batch.
        batchwide: the terms are not means over rows, so a batch cannot be cut into
            micro-batches.
        turns: the players, one after another. A turn moves the parameters whose names begin
            with it; "main" moves all.
        functional: a term differentiates through functional parameters, so the objective
            cannot be wrapped by DDP or FSDP.
        scratch: what one step hands on to a later turn; cleared at each step.
    """

    wants: Sequence[Want] = ()
    batchwide: bool = False
    turns: tuple[str, ...] = ("main",)
    functional: ClassVar[bool] = False

    def __init__(self, student: nn.Module | None = None) -> None:
        super().__init__()
        if student is not None:
            self.student = student
        self.scratch: dict[str, Any] = {}
        self.notes: dict[str, Tensor] = {}

    def before_step(self, clock: Clock) -> None:
        """Before anything is read: scheduled buffers, clamps, renormalisation."""

    def prepare(self, batch: Batch, clock: Clock) -> Batch:
        """Once a step on all rows of this process, before it is split; no gradient."""
        return batch

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The named terms of a batch: weighted means whose sum is the loss.

        A term of weight 0 is not computed and left out. Terms of one name are means over
        what `count` says.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def count(self, batch: Batch) -> Count:
        """What the means are over: rows by default.

        Returns:
            A number, or a dict from a term's name up to the slash to a number ("" for the
            rest) when terms are means over different things. All zero: the step is refused.
        """
        return batch.size

    def after_backward(self, terms: Mapping[str, Tensor], clock: Clock) -> bool:
        """After the gradients are complete; may edit `.grad`. False refuses the update."""
        return True

    def after_step(self, clock: Clock) -> None:
        """After an update: EMA, pools, masks on the update."""

    def after_validation(self, scores: Mapping[str, float], clock: Clock) -> None:
        """After a validation: what is driven by it."""

    def export(self) -> nn.Module:
        """What is deployed: the student without what was learned beside it."""
        student: nn.Module = self.student
        return student

    def guests(self) -> Iterator[Frozen]:
        """Frozen modules that `forward` calls; the engine moves and times them."""
        return iter(())

    def note(self, name: str, value: Tensor | float) -> None:
        """A diagnostic for the log; kept as a tensor until the log is written."""
        self.notes[name] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)

    def terms(
        self, batch: Batch, teacher: Teacher | None, clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """The one call for a foreign loop: prepare, ask the teacher, forward."""
        clock = clock or Clock()
        with torch.no_grad():
            batch = self.prepare(batch, clock)
        knowledge = Knowledge.none if teacher is None else teacher.knowledge(batch)
        terms: dict[str, Tensor] = self(batch, knowledge, clock)
        return terms

    def parts(self) -> Iterator[Part]:
        """Every part within, the objective itself included."""
        return (module for module in self.modules() if isinstance(module, Part))
