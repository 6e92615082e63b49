"""Exponential moving averages of networks: self-teachers, and what is deployed in their place.

An average is a part of the objective: a child module that is checkpointed with it, that no
optimiser moves, and that `export` may choose. It is no Teacher.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.clock import Clock
from stillhouse.errors import ModelError

Decay = float | Callable[[Clock], float]
When = Literal["before", "step", "epoch"]
Buffers = Literal["mean", "copy", "keep"]


def average_into(
    held: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    decay: float,
    *,
    truncate: bool = False,
) -> None:
    """`held = decay * held + (1 - decay) * new`, in place, name by name.

    Args:
        held: the average so far.
        new: of the same names and shapes.
        decay: share of the old value, in [0, 1]: 1 keeps it, 0 copies the new one.
        truncate: whole numbers (counters) are averaged and cut to whole ones; else they are
            copied, for an average of counts means nothing.

    Raises:
        ModelError: names or shapes differ.
    """
    if held.keys() != new.keys():
        differing = sorted(held.keys() ^ new.keys())
        raise ModelError(f"an average and its source differ in '{differing[0]}'")
    with torch.no_grad():
        for name, value in held.items():
            other = new[name].detach()
            if other.shape != value.shape:
                raise ModelError(
                    f"the average of '{name}' is {tuple(value.shape)}, its source "
                    f"{tuple(other.shape)}"
                )
            if value.is_floating_point() or value.is_complex():
                value.mul_(decay).add_(other.to(value), alpha=1.0 - decay)
            elif truncate:
                mixed = decay * value.double() + (1.0 - decay) * other.double().to(value.device)
                value.copy_(mixed.trunc())
            else:
                value.copy_(other)


class EMA(nn.Module):
    """A copy of a module whose weights follow those of the original slowly.

    Register it in an objective and call `before_step` and `after_step` from the hooks of the
    same names; which of them moves the average is said by `when`. It is always in eval mode, its
    parameters take no gradient, and its state dict holds the copy alone.

    Args:
        source: what is followed. To average some of a model's parts alone, hand in an
            `nn.ModuleDict` of them.
        decay: share of the old value at an update, or a function of the clock (a schedule).
        when: "before" each step, while nothing is read yet (ALBEF); after each accepted "step";
            or after the last step of each "epoch" (LPLD).
        buffers: running statistics are averaged ("mean"), copied ("copy") or left as they were
            ("keep"). Counters are copied under "mean".
        truncate: under "mean", counters are averaged and cut instead, as released code does that
            averages a whole state dict.

    Attributes:
        module: the averaged copy.

    Raises:
        ModelError: a decay outside [0, 1], or an unknown rule.
    """

    def __init__(
        self,
        source: nn.Module,
        decay: Decay,
        *,
        when: When = "step",
        buffers: Buffers = "mean",
        truncate: bool = False,
    ) -> None:
        super().__init__()
        if when not in ("before", "step", "epoch") or buffers not in ("mean", "copy", "keep"):
            raise ModelError(f"an average moves before, step or epoch, not '{when}' ('{buffers}')")
        if not callable(decay):
            _checked(decay)
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        # In a tuple it is no child: the original is saved and trained by whoever owns it.
        self._source = (source,)
        self.decay, self.when, self.rule, self.truncate = decay, when, buffers, truncate

    def train(self, mode: bool = True) -> EMA:
        """The average stays in eval mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's answer; without a gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def before_step(self, clock: Clock) -> None:
        """Moves it, where `when` is "before"."""
        if self.when == "before":
            self.update(clock)

    def after_step(self, clock: Clock) -> None:
        """Moves it, where `when` is "step", or "epoch" and the epoch ends."""
        if self.when == "step" or (self.when == "epoch" and clock.ends_epoch):
            self.update(clock)

    def update(self, clock: Clock | None = None) -> None:
        """One update, whatever `when` says."""
        decay = _checked(self.decay(clock or Clock()) if callable(self.decay) else self.decay)
        source = self._source[0]
        average_into(dict(self.module.named_parameters()), dict(source.named_parameters()), decay)
        held, new = dict(self.module.named_buffers()), dict(source.named_buffers())
        if self.rule == "copy":
            average_into(held, new, 0.0)
        elif self.rule == "mean":
            average_into(held, new, decay, truncate=self.truncate)

    def restart(self) -> None:
        """The average becomes what the source is now."""
        self.module.load_state_dict(self._source[0].state_dict())


def _checked(decay: float) -> float:
    if not 0.0 <= decay <= 1.0:
        raise ModelError(f"the decay of an average must lie in [0, 1], not {decay}")
    return float(decay)
