"""One training step, whatever the objective: read, prepare, ask, differentiate, move, commit.

The bare objective with one flat sum of gradients over the processes is the definition; one
process is the reference that several must reproduce.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.batch import Batch, Order, Rows, Shuffled, read_block
from stillhouse.clock import Clock, Views, generator, seed_of
from stillhouse.engine import sharding
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.log import RunLog
from stillhouse.engine.profile import StepProfile
from stillhouse.errors import RecipeError, TrainingError
from stillhouse.objective import PREPARE, Count, Objective
from stillhouse.teacher import Knowledge, Teacher

Factory = Callable[[Iterable[Any]], Optimizer]
Schedule = Callable[[Clock], float]
_WHOLE = [{"": 1.0}]
Grads = Callable[..., list[list[Tensor | None]]]


class Gradient(Protocol):
    """How the gradients of sets of terms become the gradient of the step.

    `grads(*sets)` runs all micro-batches forward once and returns, per set of term names
    (None: all terms), the gradient of the set's sum by parameter, reduced over processes.
    """

    def __call__(self, grads: Grads, params: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """The gradient of the step, by parameter."""
        ...


@dataclass(frozen=True)
class Clip:
    """Limits on the gradient: of its whole norm, of each value, of each parameter's norm."""

    norm: float | None = None
    value: float | None = None
    parameter: float | None = None

    def apply(self, params: Sequence[nn.Parameter]) -> None:
        """Clip in place."""
        held = [p for p in params if p.grad is not None]
        if self.norm is not None:
            nn.utils.clip_grad_norm_(held, self.norm)
        if self.value is not None:
            nn.utils.clip_grad_value_(held, self.value)
        if self.parameter is not None:
            for parameter in held:
                nn.utils.clip_grad_norm_([parameter], self.parameter)


@dataclass
class Group:
    """An optimiser, the names of what it moves, and the schedule of its learning rate."""

    pattern: str
    names: list[str]
    optimizer: Optimizer
    schedule: Schedule | None
    base: list[float]

    def set_rate(self, clock: Clock) -> float:
        """Write the learning rate of this step; returns the first group's."""
        if self.schedule is not None:
            factor = self.schedule(clock)
            for base, group in zip(self.base, self.optimizer.param_groups, strict=True):
                group["lr"] = base * factor
        return float(self.optimizer.param_groups[0]["lr"])


def make_groups(
    params: Mapping[str, nn.Parameter],
    optim: Factory | Mapping[str, Factory],
    schedule: Schedule | Mapping[str, Schedule] | None,
) -> list[Group]:
    """Give every trainable parameter to exactly one optimiser.

    Args:
        params: by name, in the objective.
        optim: one factory, or one by glob pattern of names.
        schedule: of the learning rate, as a factor; one, or one by the same patterns.

    Raises:
        RecipeError: a pattern matches nothing, or a parameter is matched by none or by two.
    """
    factories = {"*": optim} if callable(optim) else dict(optim)
    owner: dict[str, str] = {}
    groups = []
    for pattern, factory in factories.items():
        names = [n for n in params if fnmatch.fnmatchcase(n, pattern) or n == pattern]
        if not names:
            raise RecipeError(f"the optimiser pattern '{pattern}' matches no parameter")
        for name in names:
            if name in owner:
                raise RecipeError(
                    f"the parameter '{name}' is matched by two optimisers: "
                    f"'{owner[name]}' and '{pattern}'"
                )
            owner[name] = pattern
        optimizer = factory([params[n] for n in names])
        plan = schedule.get(pattern) if isinstance(schedule, Mapping) else schedule
        base = [float(group["lr"]) for group in optimizer.param_groups]
        groups.append(Group(pattern, names, optimizer, plan, base))
    missed = [n for n in params if n not in owner]
    if missed:
        raise RecipeError(f"no optimiser moves '{missed[0]}' (and {len(missed) - 1} more)")
    return groups


class Training:
    """The state and the body of a training: what `Job.fit` hands to the loop.

    Args:
        objective: on its device, in train mode.
        order: what is read.
        teacher: asked for every micro-batch; None when there is none.
        optim: see `make_groups`.
        seed: of the run; `path` of the stage.
        log_every: steps between lines of the log.
    """

    def __init__(
        self,
        objective: Objective,
        order: Order,
        *,
        teacher: Teacher | None,
        optim: Factory | Mapping[str, Factory],
        schedule: Schedule | Mapping[str, Schedule] | None = None,
        gradient: Gradient | None = None,
        accumulate: int = 1,
        clip: Clip | None = None,
        hardware: Hardware,
        log: RunLog,
        stage: str,
        clock: Clock,
        log_every: int = 50,
        ema: float | None = None,
        prefetch: int = 0,
        profile: StepProfile | None = None,
    ) -> None:
        self.objective, self.order, self.teacher = objective, order, teacher
        self.hardware, self.log, self.stage = hardware, log, stage
        self.gradient, self.clip = gradient, clip
        self.accumulate = max(1, accumulate)
        self.clock = clock
        self.log_every = max(1, log_every)
        self.sharded = hardware.strategy == "fsdp" and hardware.world > 1
        self._refuse_what_cannot_be(ema)
        self.params = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        if not self.params:
            raise RecipeError("the objective has no trainable parameter")
        self.groups = make_groups(self.params, optim, schedule)
        self.players = [(t, *self._player(t)) for t in objective.turns]
        self.parts = list(objective.parts())
        self.index = 0
        self._rows: Sequence[Rows] = ()
        self._rows_epoch = -1
        self._views = Views(seed_of(clock.seed, "views"))
        self._order_seed = seed_of(clock.seed, clock.path, "order")
        self._noise = seed_of(clock.seed, clock.path, "noise", hardware.rank)
        self._amounts: dict[str, float] = {}
        self._sums: dict[str, Any] = {}
        self._summed = 0
        self._refused = 0
        self._pending: Tensor | None = None
        self._rate = 0.0
        self._asked: list[tuple[Any, Any]] = []
        self.teacher_seconds = 0.0
        self.last: dict[str, float] = {}
        self._on_cpu = hardware.device.type == "cpu"
        self._mixed = hardware.precision.endswith("-mixed")
        self._scaler = (
            torch.amp.GradScaler(hardware.device.type) if hardware.precision == "16-mixed" else None
        )
        self.module = self._wrap()
        self.ema = (
            None
            if ema is None
            else {n: p.detach().clone() for n, p in objective.student.state_dict().items()}
        )
        self.ema_decay = ema or 0.0
        self._reader = _ReadAhead(self, prefetch) if prefetch else _together(self)
        self.profile = profile

    def _refuse_what_cannot_be(self, ema: float | None) -> None:
        if self.sharded and (ema is not None or self.hardware.precision == "16-mixed"):
            raise RecipeError(
                "strategy 'fsdp' goes with neither ema nor 16-mixed precision; "
                "use strategy: flat, or bf16-mixed"
            )
        if self.objective.batchwide and self.accumulate > 1:
            raise RecipeError(
                f"{type(self.objective).__name__} needs the whole batch at once, so accumulate "
                "must be 1: take the largest batch that fits instead"
            )
        if self.hardware.strategy in {"ddp", "fsdp"} and self.hardware.world > 1:
            plain = self.objective.turns == ("main",) and not self.objective.functional
            if not plain or self.gradient is not None:
                raise RecipeError(
                    f"strategy '{self.hardware.strategy}' wraps the objective, which "
                    f"{type(self.objective).__name__} does not allow (several players, an altered "
                    "gradient or functional terms); use strategy: flat"
                )

    def _player(self, turn: str) -> tuple[list[nn.Parameter], list[Group]]:
        names = [n for n in self.params if turn == "main" or n.startswith(turn)]
        if not names:
            raise RecipeError(f"the turn '{turn}' moves no parameter: none begins with its name")
        chosen = set(names)
        groups = [g for g in self.groups if chosen.intersection(g.names)]
        for group in groups:
            if not chosen.issuperset(group.names):
                raise RecipeError(
                    f"the optimiser '{group.pattern}' moves parameters of several players; "
                    "give each player its own"
                )
        return [self.params[n] for n in names], groups

    def _wrap(self) -> nn.Module:
        if self.hardware.world == 1 or self.hardware.strategy == "flat":
            return self.objective
        if self.hardware.strategy == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            return DistributedDataParallel(self.objective, broadcast_buffers=False)
        return self.objective  # fsdp: the parameters are shards already

    # ---- state -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; nothing random is among it."""
        return {
            "objective": self.objective_state(),
            "optimizers": [self._optimizer_state(g.optimizer) for g in self.groups],
            "epoch": self.clock.epoch,
            "index": self.index,
            "ema": self.ema,
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "sums": {k: float(v) for k, v in self._sums.items()},
            "summed": self._summed,
            "refused": self._refused,
            "teacher_seconds": self.teacher_time(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.load_objective_state(state["objective"])
        for group, saved in zip(self.groups, state["optimizers"], strict=True):
            if self.sharded:
                sharding.load_full_optimizer_state(self.objective, group.optimizer, saved)
            else:
                group.optimizer.load_state_dict(saved)
        self.clock.epoch, self.index = state["epoch"], state["index"]
        if self.ema is not None:
            self.ema = {k: v.to(self.hardware.device) for k, v in state["ema"].items()}
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._sums, self._summed = dict(state["sums"]), state["summed"]
        self._refused = state["refused"]
        self.teacher_seconds = state["teacher_seconds"]

    def objective_state(self) -> dict[str, Any]:
        """The whole state of the objective; a collective call when it is sharded."""
        if self.sharded:
            return sharding.full_state(self.objective)
        return self.objective.state_dict()

    def load_objective_state(self, state: dict[str, Any]) -> None:
        """The inverse of `objective_state`."""
        if self.sharded:
            sharding.load_full_state(self.objective, state)
        else:
            self.objective.load_state_dict(state)

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.sharded:
            return sharding.full_optimizer_state(self.objective, optimizer)
        return optimizer.state_dict()

    # ---- the step ----------------------------------------------------------------------

    def __call__(self, _: Any, clock: Clock) -> None:
        """One step; the body of the loop."""
        profile = self.profile
        if profile is not None:
            profile.begin()
        rows = self._next_rows(clock)
        objective = self.objective
        if objective.scratch:
            objective.scratch = {}
        objective.before_step(clock)
        if profile is not None:
            profile.lap("engine")
        batch = self._read(rows, clock)
        if profile is not None:
            profile.lap("data")
        self._amounts = {}
        if type(objective).prepare is not Objective.prepare:
            for part in self.parts:
                part.begin_slot(PREPARE)
            with torch.no_grad():
                batch = objective.prepare(batch, clock)
            if profile is not None:
                profile.lap("prepare")
        micro = batch.split(self.accumulate)
        shares = self._shares(micro)
        accepted = shares is not None
        terms: dict[str, Tensor] = {}
        if shares is not None:
            knowledge: list[Knowledge | None] = [None] * len(micro)
            for turn, params, groups in self.players:
                clock.turn = turn
                done = self._turn(micro, shares, knowledge, params, groups, clock)
                terms.update(done[0])
                accepted = accepted and done[1]
            clock.turn = "main"
        self._guard(terms, clock)
        for part in self.parts:
            if part._made:
                part.settle(accepted)
        if accepted:
            objective.after_step(clock)
            self._move_ema()
        else:
            self._refused += 1
        if profile is not None:
            profile.lap("engine")
        self._keep(terms, clock)
        self._advance(clock)
        if profile is not None:
            profile.lap("log")

    def _next_rows(self, clock: Clock) -> Rows:
        if self._rows_epoch != clock.epoch:
            epoch = clock.epoch
            self._rows = self.order.epoch(epoch, lambda: generator(self._order_seed, epoch))
            self._rows_epoch = epoch
            clock.epoch_steps = len(self._rows)
        clock.begins_epoch = self.index == 0
        clock.ends_epoch = self.index == len(self._rows) - 1
        return self._rows[self.index]

    def _advance(self, clock: Clock) -> None:
        self.index += 1
        if self.index >= len(self._rows):
            self.index = 0
            clock.epoch += 1

    def _read(self, rows: Rows, clock: Clock) -> Batch:
        if self._reader is not None:
            batch = self._reader.take(clock.epoch, self.index)
        else:
            batch = self.read_block(rows, clock.epoch)
        return batch if self._on_cpu else batch.to(self.hardware.device)

    def read_block(self, rows: Rows, epoch: int) -> Batch:
        """This process's contiguous block of a step's rows."""
        hardware = self.hardware
        return read_block(self.order, rows, self.views_of(epoch), hardware.rank, hardware.world)

    def views_of(self, epoch: int) -> Views:
        """The chance of an epoch's readings."""
        views = self._views
        if views.epoch != epoch:
            views = self._views = Views(views.seed, epoch)
        return views

    def _shares(self, micro: list[Batch]) -> list[dict[str, float]] | None:
        """What part of the step's mean each micro-batch holds, by term; None: refuse."""
        alone = len(micro) == 1 and self.hardware.world == 1
        first = self.objective.count(micro[0])
        if alone and isinstance(first, int):
            return _WHOLE if first > 0 else None
        counts = [_by_name(first), *(_by_name(self.objective.count(part)) for part in micro[1:])]
        if alone:
            shares = {name: float(count > 0) for name, count in counts[0].items()}
            return [shares] if any(shares.values()) else None
        names = sorted({name for count in counts for name in count})
        own = torch.tensor([[count.get(n, 0.0) for n in names] for count in counts])
        whole = self.hardware.total(own.sum(0).to(self.hardware.device)).cpu()
        if not bool((whole > 0).any()):
            return None
        return [
            {n: float(row[i] / whole[i]) if whole[i] > 0 else 0.0 for i, n in enumerate(names)}
            for row in own
        ]

    def _turn(
        self,
        micro: list[Batch],
        shares: list[dict[str, float]],
        knowledge: list[Knowledge | None],
        params: list[nn.Parameter],
        groups: list[Group],
        clock: Clock,
    ) -> tuple[dict[str, Tensor], bool]:
        terms: dict[str, Tensor] = {}

        def forward(number: int) -> dict[str, Tensor]:
            return self._terms(number, micro, shares, knowledge, clock)

        for parameter in params:
            parameter.grad = None
        if self.gradient is None:
            for number in range(len(micro)):
                weighted = forward(number)
                _add(terms, weighted)
                if weighted:
                    self._backward(_sum(weighted), params)
                if self.profile is not None:
                    self.profile.lap("backward")
            self._reduce(params, terms)
        else:
            self._combined(micro, forward, params, terms)
            if self.profile is not None:
                self.profile.lap("backward")
        finite = self._finite(terms, clock)
        accepted = self.objective.after_backward(terms, clock) and finite
        accepted = self.hardware.same(accepted)
        if self.profile is not None:
            self.profile.lap("engine")
        if accepted:
            accepted = self._update(params, groups, clock)
        if self.profile is not None:
            self.profile.lap("optimiser")
        return terms, accepted

    def _terms(
        self,
        number: int,
        micro: list[Batch],
        shares: list[dict[str, float]],
        knowledge: list[Knowledge | None],
        clock: Clock,
    ) -> dict[str, Tensor]:
        # The same noise for the same micro-batch, however often it is run in this step.
        torch.default_generator.manual_seed(seed_of(self._noise, clock.step, number, clock.turn))
        if not self._on_cpu:
            seed_device(self.hardware.device, seed_of(self._noise, clock.step, number, clock.turn))
        for part in self.parts:
            if part._slot != number:
                part.begin_slot(number)
        known = knowledge[number]
        if self.profile is not None:
            self.profile.lap("engine")
        if known is None:
            known = knowledge[number] = self._ask(micro[number])
            if self.profile is not None:
                self.profile.lap("teacher")
        if self._mixed:
            with self.hardware.autocast():
                terms: dict[str, Tensor] = self.module(micro[number], known, clock)
        else:
            terms = self.module(micro[number], known, clock)
        if self.profile is not None:
            self.profile.lap("student forward")
        share = shares[number]
        if share is _WHOLE[0]:
            return terms
        if len(micro) == 1 and self.hardware.world == 1:
            return {n: v for n, v in terms.items() if share.get(_prefix(n, share), 0.0) > 0}
        return {
            name: value * share[_prefix(name, share)]
            for name, value in terms.items()
            if share.get(_prefix(name, share), 0.0) > 0
        }

    def _ask(self, batch: Batch) -> Knowledge:
        if self.teacher is None:
            return Knowledge.none
        if self.hardware.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            known = self.teacher.knowledge(batch)
            end.record()
            self._asked.append((begin, end))
            return known
        began = time.perf_counter()
        known = self.teacher.knowledge(batch)
        self.teacher_seconds += time.perf_counter() - began
        return known

    def teacher_time(self) -> float:
        """Seconds spent asking the teacher so far."""
        if self._asked:
            self._asked[-1][1].synchronize()
            self.teacher_seconds += sum(a.elapsed_time(b) for a, b in self._asked) / 1000.0
            self._asked = []
        return self.teacher_seconds

    def _backward(self, loss: Tensor, params: list[nn.Parameter]) -> None:
        if self.module is not self.objective or self.sharded:
            loss = loss * self.hardware.world  # the wrap averages what shares already divide
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        if len(self.players) == 1:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward(loss, inputs=params)

    def _combined(
        self,
        micro: list[Batch],
        forward: Callable[[int], dict[str, Tensor]],
        params: list[nn.Parameter],
        terms: dict[str, Tensor],
    ) -> None:
        assert self.gradient is not None
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        calls = 0

        def grads(*sets: Sequence[str] | None) -> list[list[Tensor | None]]:
            nonlocal calls
            wanted = sets or (None,)
            sums: list[list[Tensor | None]] = [[None] * len(params) for _ in wanted]
            for number in range(len(micro)):
                with still_statistics(self.objective, calls > 0):
                    found = forward(number)
                if calls == 0:
                    _add(terms, found)
                chosen = [_chosen(found, names) for names in wanted]
                for place, loss in enumerate(chosen):
                    if loss is None:
                        continue
                    keep = any(later is not None for later in chosen[place + 1 :])
                    made = torch.autograd.grad(
                        loss * scale, params, retain_graph=keep, allow_unused=True
                    )
                    sums[place] = [_plus(a, b) for a, b in zip(sums[place], made, strict=True)]
            for place, values in enumerate(sums):
                sums[place] = self._reduced(values, params, {})
                if scale != 1.0:
                    sums[place] = [None if g is None else g / scale for g in sums[place]]
            calls += 1
            return sums

        combined = self.gradient(grads, params)
        if self.hardware.world > 1:
            # Also where this process has no rows, and so no terms: the others wait for it.
            self._reduced([], [], terms)
        for parameter, value in zip(params, combined, strict=True):
            parameter.grad = None if value is None else value * scale

    def _reduce(self, params: list[nn.Parameter], terms: dict[str, Tensor]) -> None:
        if self.hardware.world == 1:
            return
        if self.module is not self.objective or self.sharded:
            self._reduced([], [], terms)
            return
        summed = self._reduced([p.grad for p in params], params, terms)
        for parameter, value in zip(params, summed, strict=True):
            parameter.grad = value

    def _reduced(
        self,
        values: Sequence[Tensor | None],
        params: Sequence[nn.Parameter],
        terms: dict[str, Tensor],
    ) -> list[Tensor | None]:
        """Sum gradients, and terms beside them, over the processes in one flat tensor.

        A flag per parameter travels along: no gradient on any process stays None, one on
        some processes counts as zero elsewhere.
        """
        if self.hardware.world == 1:
            return list(values)
        device = self.hardware.device
        names = self._all_names(terms)
        flat = [
            (torch.zeros_like(p) if g is None else g).reshape(-1).float()
            for g, p in zip(values, params, strict=True)
        ]
        flags = torch.tensor([0.0 if g is None else 1.0 for g in values], device=device)
        scalars = [
            terms[n].detach().float().reshape(1) if n in terms else torch.zeros(1, device=device)
            for n in names
        ]
        whole = self.hardware.total(torch.cat([*flat, flags, *scalars]))
        found: list[Tensor | None] = []
        place = 0
        reached = whole[whole.numel() - len(names) - len(values) :]
        for number, parameter in enumerate(params):
            piece = whole[place : place + parameter.numel()].view_as(parameter).to(parameter.dtype)
            place += parameter.numel()
            found.append(piece if float(reached[number]) > 0 else None)
        for number, name in enumerate(names):
            terms[name] = whole[whole.numel() - len(names) + number]
        return found

    def _all_names(self, terms: Mapping[str, Tensor]) -> list[str]:
        """Names of the terms on any process, in one order; a batch may lack some."""
        if not hasattr(self, "_known_names"):
            self._known_names: list[str] = []
        fresh = self.hardware.any(not set(terms) <= set(self._known_names))
        if fresh:
            gathered: list[Any] = [None] * self.hardware.world
            torch.distributed.all_gather_object(gathered, list(terms))
            for names in gathered:
                self._known_names += [n for n in names if n not in self._known_names]
        return self._known_names if terms or self._known_names else []

    def _update(self, params: list[nn.Parameter], groups: list[Group], clock: Clock) -> bool:
        if self._scaler is not None:
            for group in groups:
                self._scaler.unscale_(group.optimizer)
        if self.clip is not None:
            self.clip.apply(params)
        for number, group in enumerate(groups):
            rate = group.set_rate(clock)
            self._rate = rate if number == 0 else self._rate
            if self._scaler is None:
                group.optimizer.step()
            else:
                self._scaler.step(group.optimizer)
        if self._scaler is not None:
            self._scaler.update()
        return True

    # ---- guards and figures --------------------------------------------------------------

    def _finite(self, terms: Mapping[str, Tensor], clock: Clock) -> bool:
        if not self._on_cpu:
            # Reading a value would wait for the device: the check is made before it matters,
            # which is when something is logged or saved.
            bad = torch.stack([(~torch.isfinite(v.detach())).float() for v in terms.values()])
            self._pending = bad if self._pending is None else torch.maximum(self._pending, bad)
            self._pending_names = list(terms)
            return True
        amounts = {name: value.item() for name, value in terms.items()}
        for name, amount in amounts.items():
            if not math.isfinite(amount):
                self._not_finite([name], clock)
        self._amounts.update(amounts)
        return True

    def _guard(self, terms: Mapping[str, Tensor], clock: Clock) -> None:
        if self._pending is not None and clock.step % self.log_every == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Make the pending check of the last steps.

        Raises:
            TrainingError: a term was not finite; it is named.
        """
        if self._pending is None:
            return
        bad, self._pending = self._pending, None
        if bool((bad > 0).any()):
            names = [n for n, b in zip(self._pending_names, bad.tolist()) if b > 0]
            self._not_finite(names, self.clock)

    def _not_finite(self, names: list[str], clock: Clock) -> None:
        told = " and ".join(f"'{n}'" for n in names)
        raise TrainingError(
            f"the term {told} is no longer finite at step {clock.step} of stage '{self.stage}'. "
            "The last checkpoint is from before and is kept. Likely causes: a learning rate that "
            f"is too high (now {self._rate:g}), NaN in the data, or half precision"
        )

    def _move_ema(self) -> None:
        if self.ema is None:
            return
        with torch.no_grad():
            for name, value in self.objective.student.state_dict().items():
                kept = self.ema[name]
                if kept.is_floating_point():
                    kept.lerp_(value.to(kept.dtype), 1.0 - self.ema_decay)
                else:
                    kept.copy_(value)

    def _keep(self, terms: Mapping[str, Tensor], clock: Clock) -> None:
        sums = self._sums
        # On the CPU the guard has read the numbers; elsewhere reading waits for the device.
        amounts = self._amounts if self._on_cpu else {n: v.detach() for n, v in terms.items()}
        for name, amount in amounts.items():
            sums[name] = sums[name] + amount if name in sums else amount
        self._summed += 1
        if (clock.step + 1) % self.log_every == 0 or clock.step + 1 == clock.total:
            self._write_line(clock)

    def _write_line(self, clock: Clock) -> None:
        count = max(1, self._summed)
        self.last = {k: float(v) / count for k, v in self._sums.items()}
        notes = {k: float(v) for k, v in self.objective.notes.items()}
        extra: dict[str, Any] = {"notes": notes} if notes else {}
        if self._refused:
            extra["refused"] = self._refused
        self.log.step(
            self.stage,
            clock.step + 1,
            self.last,
            epoch=clock.epoch,
            loss=sum(self.last.values()),
            lr=self._rate,
            **extra,
        )
        self._sums, self._summed = {}, 0

    def close(self) -> None:
        """Let go of gradients and reading threads."""
        if self._reader is not None:
            self._reader.close()
        for parameter in self.params.values():
            parameter.grad = None

    def figures(self) -> dict[str, float]:
        """For the progress display."""
        if self.last or not self._summed:
            return self.last
        return {k: float(v) / self._summed for k, v in self._sums.items()}


class _ReadAhead:
    """Reads coming blocks in threads; what is read is a function of epoch and index alone."""

    def __init__(self, training: Training, workers: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.training, self.workers = training, workers
        self.pool = ThreadPoolExecutor(workers)
        self.pending: dict[tuple[int, int], Any] = {}

    def take(self, epoch: int, index: int) -> Batch:
        """The block of this step; the next ones are begun."""
        rows = self.training._rows
        for ahead in range(index, min(len(rows), index + self.workers + 1)):
            if (epoch, ahead) not in self.pending:
                self.pending[epoch, ahead] = self.pool.submit(
                    self.training.read_block, rows[ahead], epoch
                )
        batch: Batch = self.pending.pop((epoch, index)).result()
        return batch

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class _Together:
    """Reads some coming steps at once, where steps are so small that each call is felt.

    What a step gets does not depend on which steps were read with it, so that a resumed run
    may begin anywhere.
    """

    def __init__(self, training: Training, order: Shuffled) -> None:
        self.training, self.order = training, order
        self.count = order.together
        self.held: list[Batch] = []
        self.begins = (-1, 0)

    def take(self, epoch: int, index: int) -> Batch:
        """The batch of this step."""
        at = index - self.begins[1]
        if epoch != self.begins[0] or not 0 <= at < len(self.held):
            steps = self.training._rows[index : index + self.count]
            self.held = self.order.read_together(steps, self.training.views_of(epoch))
            self.begins, at = (epoch, index), 0
        batch = self.held[at]
        size = len(batch["id"])
        batch["rows"] = slice(0, size)
        batch["of"] = size
        return batch

    def close(self) -> None:
        """Let go of what was read."""
        self.held = []


def _together(training: Training) -> _Together | None:
    order = training.order
    if training.hardware.world > 1 or type(order) is not Shuffled or order.together < 2:
        return None
    return _Together(training, order)


@contextmanager
def still_statistics(module: nn.Module, still: bool) -> Iterator[None]:
    """Inside the block running statistics of normalisation layers do not move.

    For a further pass over the rows of a step, whose activations are none of the data's.
    """
    kinds = nn.modules.batchnorm._NormBase
    layers = [m for m in module.modules() if isinstance(m, kinds)] if still else []
    held = [layer.momentum for layer in layers]
    counted = [layer.num_batches_tracked for layer in layers]
    before = [None if c is None else c.clone() for c in counted]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count, value in zip(layers, held, counted, before, strict=True):
            layer.momentum = momentum
            # Only an average over all batches (momentum None) reads the count: released codes
            # count both passes, which is harmless otherwise.
            if momentum is None and count is not None and value is not None:
                count.copy_(value)


def _by_name(count: Count) -> dict[str, float]:
    if isinstance(count, Mapping):
        return {name: float(value) for name, value in count.items()}
    return {"": float(count)}


def _prefix(name: str, share: Mapping[str, float]) -> str:
    head = name.partition("/")[0]
    return head if head in share else ""


def _add(sums: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    values = list(terms.values())
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _chosen(terms: Mapping[str, Tensor], names: Sequence[str] | None) -> Tensor | None:
    kept = {
        n: v
        for n, v in terms.items()
        if names is None or n in names or n.partition("/")[0] in names
    }
    return _sum(kept) if kept else None


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the noise of an accelerator; that of the CPU is the default generator's."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
