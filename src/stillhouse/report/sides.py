"""The sides of a run: figures by seed, the final table, and what may be said of them."""

from __future__ import annotations

import math
from typing import Any

from stillhouse.metrics.statistics import Interval, interval, paired
from stillhouse.report.charts import Strip, strip
from stillhouse.report.content import Column, Tile, words
from stillhouse.report.curves import same_score
from stillhouse.report.figures import count, duration, number, share, with_interval
from stillhouse.report.reading import RunRecord, finite, number_of

TEACHER, ALONE, DISTILLED = "teacher", "alone", "distilled"
COST = ("seconds", "peak_mb")
_ORDER = {TEACHER: 0, ALONE: 1, DISTILLED: 9}


class Sides:
    """The sides of a run: figures by seed, and what may be said of them."""

    def __init__(self, run: RunRecord, method: str) -> None:
        self.figures: dict[str, dict[int, dict[str, float]]] = {}
        for side, seeds in run.part("sides").items():
            found = _by_seed(seeds)
            if found:
                self.figures[str(side)] = found
        self.higher = bool(run.summary.get("higher_is_better", True))
        self.metrics = self._metrics(str(run.summary.get("metric") or ""))
        keys = sorted(self.figures, key=lambda side: _ORDER.get(side, 5))
        self.columns = [Column(key, self._name(key, method), _role(key)) for key in keys]

    def _name(self, key: str, method: str) -> str:
        if key == TEACHER:
            return "teacher"
        if key == ALONE:
            return "student alone"
        if key == DISTILLED:
            compared = TEACHER in self.figures or ALONE in self.figures
            return "student distilled" if compared else method
        return key

    def _metrics(self, main: str) -> list[str]:
        seen = [m for seeds in self.figures.values() for f in seeds.values() for m in f]
        names = [m for m in dict.fromkeys(seen) if m not in COST and not self._is_said(m)]
        return [main, *(m for m in names if m != main)] if main in names else names

    def _is_said(self, metric: str) -> bool:
        """Whether it is a figure of the teacher that the teacher's own column has already."""
        own = metric.removeprefix("teacher_")
        known = self.values(TEACHER, own) if own != metric else {}
        return bool(known) and all(
            known.get(seed, value) == value
            for side in self.figures
            for seed, value in self.values(side, metric).items()
        )

    @property
    def main(self) -> str:
        """The metric that counts, "" when there is none."""
        return self.metrics[0] if self.metrics else ""

    def values(self, side: str, metric: str) -> dict[int, float]:
        """A side's figures of one metric by seed."""
        seeds = self.figures.get(side, {})
        return {seed: figures[metric] for seed, figures in seeds.items() if metric in figures}

    def summary(self, side: str, metric: str) -> Interval:
        """Mean and interval of a side's figures over seeds."""
        return interval(list(self.values(side, metric).values()))

    def table(self) -> list[tuple[str, list[str]]]:
        """(metric, one cell for each column)."""
        rows = [
            (words(m), [with_interval(self.summary(c.key, m)) for c in self.columns])
            for m in self.metrics
        ]
        for metric, name, say in (
            ("seconds", "training time", duration),
            ("peak_mb", "peak memory", lambda mb: f"{mb:,.0f} MiB"),
        ):
            means = [self.summary(c.key, metric).mean for c in self.columns]
            if any(math.isfinite(mean) for mean in means):
                rows.append((name, [say(m) if math.isfinite(m) else "–" for m in means]))
        return rows

    def note(self) -> str:
        """What the figures of the table are."""
        if not self.columns:
            return ""
        counts = {c.name: len(self.figures[c.key]) for c in self.columns}
        if max(counts.values()) == 1:
            return "One seed, so there is no interval."
        told = ", ".join(f"{name} {seeds}" for name, seeds in counts.items())
        return f"Mean ± 95% t interval over seeds ({told})."

    def strip(self) -> Strip | None:
        """The main metric of all sides on one axis; None when there is nothing to compare."""
        if not self.main or sum(len(seeds) for seeds in self.figures.values()) < 2:
            return None
        rows = [
            (c.name, c.role, list(self.values(c.key, self.main).values()), found)
            for c in self.columns
            if math.isfinite((found := self.summary(c.key, self.main)).mean)
        ]
        return strip(words(self.main), rows, words(self.main))

    def gain(self) -> Interval:
        """Paired differences distilled - alone of the main metric."""
        ours, than = self.values(DISTILLED, self.main), self.values(ALONE, self.main)
        return interval(list(paired(ours, than).values()))

    def findings(self) -> list[str]:
        """Sentences that the figures bear out, and no more."""
        found = self.gain()
        if not found.count or not math.isfinite(found.mean):
            return []
        said = []
        if found.known:
            said.append(
                f"Distilled against alone: {words(self.main)} {found.mean:+.4g}, 95% interval "
                f"{found.low:+.4g} to {found.high:+.4g} (paired over {found.count} seeds)"
                f"{self._sense(found)}."
            )
        else:
            said.append(
                f"Distilled against alone: {words(self.main)} {found.mean:+.4g} with one seed, "
                "which says nothing about other seeds."
            )
        said += self._per_second(found.mean)
        return said

    def _sense(self, found: Interval) -> str:
        low, high = found.low or 0.0, found.high or 0.0
        if not self.higher:
            low, high = -high, -low
        if low > 0:
            return ": better on this data"
        return ": worse on this data" if high < 0 else ": no difference is shown"

    def _per_second(self, gain: float) -> list[str]:
        ours, than = self.summary(DISTILLED, "seconds").mean, self.summary(ALONE, "seconds").mean
        if not (math.isfinite(ours) and math.isfinite(than)):
            return []
        if ours <= than:
            return ["The distilled student took no longer to train than the one alone."]
        extra = ours - than
        return [
            f"That cost {duration(extra)} more training (the teacher's included where it was "
            f"trained here): {gain / extra:+.3g} {words(self.main)} per extra second."
        ]


def _by_seed(seeds: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    if not isinstance(seeds, dict):
        return found
    for seed, figures in seeds.items():
        if not isinstance(figures, dict) or not str(seed).lstrip("-").isdigit():
            continue
        known = {str(k): number_of(v) for k, v in figures.items()}
        found[int(seed)] = {k: v for k, v in known.items() if v is not None}
    return dict(sorted(found.items()))


def _role(key: str) -> str:
    return key if key in _ORDER else "other"


def tiles(run: RunRecord, sides: Sides) -> list[Tile]:
    """The figures to be seen first: the result, the gain, size and speed."""
    found = []
    ours = sides.summary(DISTILLED, sides.main) if sides.main else interval([])
    if ours.count and math.isfinite(ours.mean):
        names = {c.key: c.name for c in sides.columns}
        found.append(Tile(with_interval(ours), words(sides.main), names[DISTILLED]))
    gain = sides.gain() if sides.main else interval([])
    if gain.count and math.isfinite(gain.mean):
        detail = f"{gain.low:+.3g} to {gain.high:+.3g}" if gain.known else "one seed"
        found.append(Tile(f"{gain.mean:+.3g}", "against alone", detail))
    for keys, label, say, than in (
        (("parameters",), "parameters", count, "of the teacher's"),
        (("latency_ms", "1", "p50"), "latency, batch 1", milliseconds, "of the teacher's"),
    ):
        student = run.figure("sizes", "student", *keys)
        teacher = run.figure("sizes", "teacher", *keys)
        if student is not None:
            ratio = f"{share(student / teacher)} {than}" if teacher else ""
            found.append(Tile(say(student), label, ratio))
    return found


def time_to_target(run: RunRecord, sides: Sides) -> list[str]:
    """When the distilled student passed what the one alone had at its end, on validation data."""
    if not sides.main:
        return []
    for stage in run.logs.stages.values():
        ours = finite(stage.scores.get(sides.main, []))
        alone = finite(same_score(run.side_logs, stage.name, sides.main).get("alone", []))
        if not ours or not alone:
            continue
        target, total = alone[-1][1], stage.last_step
        sign = 1.0 if sides.higher else -1.0
        step = next((x for x, y in ours if sign * y >= sign * target), None)
        what = f"the validation {words(sides.main)} that the student alone had at its end"
        said = f"{what} ({number(target)})"
        if step is None:
            return [f"The distilled student did not reach {said}."]
        return [f"The distilled student reached {said} by step {step:.0f} of {total}."]
    return []


def milliseconds(value: float | None) -> str:
    """A latency with three significant digits."""
    return "–" if value is None else f"{value:.3g} ms"
