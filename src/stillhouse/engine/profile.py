"""Where the time of a training step goes, and what to do about it.

The step says what it has just done (`lap`); the time since it last spoke is booked there. On a
device that computes while Python runs ahead, each lap waits for it, so only some steps are
measured; the others run as they always do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

PHASES = (
    "data",
    "prepare",
    "teacher",
    "student forward",
    "backward",
    "optimiser",
    "log",
    "engine",
)
_WARM = 3
_EVERY_ON_DEVICE = 10


class StepProfile:
    """Seconds by phase, summed over the measured steps.

    Args:
        device: where the step computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.every = 1 if device.type == "cpu" else _EVERY_ON_DEVICE
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self._seen = 0
        self._on = False
        self._last = 0.0

    def begin(self) -> None:
        """A step begins; the first ones, which warm up, are not measured."""
        self._seen += 1
        self._on = self._seen > _WARM and self._seen % self.every == 0
        if self._on:
            self.steps += 1
            self._last = self._now()

    def lap(self, phase: str) -> None:
        """Book the time since the last call under `phase`."""
        if self._on:
            now = self._now()
            self.seconds[phase] += now - self._last
            self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Milliseconds a step by phase, the step's whole, and how many steps were measured."""
        count = max(1, self.steps)
        phases = {name: 1e3 * value / count for name, value in self.seconds.items()}
        return {
            "steps": self.steps,
            "ms": {k: round(v, 4) for k, v in phases.items()},
            "step_ms": round(sum(phases.values()), 4),
        }


def shares(figures: Mapping[str, Any]) -> dict[str, float]:
    """The share of the step by phase."""
    whole = float(figures["step_ms"]) or 1.0
    return {name: float(value) / whole for name, value in figures["ms"].items()}


def advice(
    figures: Mapping[str, Any],
    *,
    store_saving: float | None = None,
    workers: int = 0,
    device: str = "cpu",
    layout: Mapping[str, Any] | None = None,
    compiled: Mapping[str, Any] | None = None,
    labelling: Mapping[str, Any] | None = None,
) -> list[str]:
    """What would make the training faster, the largest lever first.

    Args:
        figures: of a `StepProfile`.
        store_saving: share of the training that a store of the teacher's outputs would save.
        workers: threads that read ahead.
        device: type of device.
        layout: of `engine.probe.channels_last`, when it was probed.
        compiled: of `engine.probe.compiled`, when it was probed.
        labelling: of `engine.probe.labelling`, when the teacher was probed.

    Returns:
        Sentences; one that says so when nothing stands out.
    """
    share = shares(figures)
    found: list[tuple[float, str]] = []
    if store_saving is not None and store_saving >= 0.02:
        found.append(
            (
                store_saving,
                f"the teacher takes {share['teacher']:.0%} of a step: a store of its outputs "
                f"would save about {store_saving:.0%} of the training (-o teacher.store=true; "
                "with -o teacher.store.draws=4 where the data are augmented)",
            )
        )
    if labelling and labelling["ratio"] < 0.9:
        found.append(
            (
                (1 - labelling["ratio"]) * (store_saving or 0.0) / 2,
                f"a store is captured quickest with {labelling['batch']} rows at a time: "
                f"{labelling['ratio']:.2f} of the time a row in a short probe "
                f"(-o teacher.store.batch={labelling['batch']})",
            )
        )
    if share["data"] > 0.15:
        told = (
            "read ahead with -o hardware.workers=2"
            if workers == 0
            else f"{workers} workers are not enough; try more, or decode the data once"
        )
        found.append((share["data"], f"reading takes {share['data']:.0%} of a step: {told}"))
    if share["log"] > 0.1:
        found.append((share["log"], f"the log takes {share['log']:.0%}: raise -o output.log_every"))
    if layout and layout["ratio"] < 0.95:
        found.append(
            (
                1 - layout["ratio"],
                f"channels_last won a short probe on this {device}: {layout['ratio']:.2f} of the "
                "time of forward and backward (-o hardware.channels_last=true)",
            )
        )
    if compiled and compiled["ratio"] < 0.95:
        found.append(
            (
                1 - compiled["ratio"],
                f"torch.compile won a short probe: {compiled['ratio']:.2f} of the time of forward "
                f"and backward after {compiled['seconds']:.0f} s of compiling "
                "(-o hardware.compile=true)",
            )
        )
    if share["engine"] > 0.1:
        found.append(
            (
                share["engine"] / 2,
                f"the engine itself takes {share['engine']:.0%}, for a step is only "
                f"{figures['step_ms']:.2f} ms long: a larger batch spreads it",
            )
        )
    if not found:
        return ["nothing stands out: the step is the student's own forward and backward"]
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])]
