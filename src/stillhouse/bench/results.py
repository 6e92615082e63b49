"""Recorded results: `results/<id>.json`, read, written whole, merged, judged by the rules."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import CheckpointError
from stillhouse.metrics.statistics import (
    FAST_SECONDS,
    LEAST_SEEDS,
    Interval,
    interval,
    paired,
    required_seeds,
    verdict,
)

if TYPE_CHECKING:
    from stillhouse.method import Claim

SCHEMA = 1
COST = ("seconds", "peak_mb")
TEACHER = "teacher"

Figures = dict[str, float | None]


@dataclass
class Results:
    """What a bench measured, as it is recorded.

    Attributes:
        method: id of the method.
        file_hash: of the method's file when it was measured.
        command: that repeats the bench.
        seeds: that were planned before the run; a seed may still be missing in `sides`.
        data: name, edition and hash of each data set.
        sides: side to seed (as text) to figures, `seconds` and `peak_mb` among them.
        claims: each judged: see `judged`.
        versions: of the packages that matter.
        hardware: in words.
        date: of the last change, ISO 8601.
        note: what a reader must know.
        stamps: side to the hash of what its figures depend on; figures of another stamp
            are never mixed in.
        more: further keys of the file, kept as they are.
    """

    method: str
    file_hash: str
    command: str = ""
    seeds: list[int] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    sides: dict[str, dict[str, Figures]] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    date: str = ""
    note: str = ""
    stamps: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def values(self, side: str, metric: str) -> dict[int, float]:
        """A side's finite figures of one metric by seed."""
        found = {}
        for seed, figures in self.sides.get(side, {}).items():
            value = figures.get(metric)
            if value is not None and math.isfinite(value):
                found[int(seed)] = float(value)
        return dict(sorted(found.items()))

    def summary(self, side: str, metric: str) -> Interval:
        """Mean and interval of a side's figures over seeds."""
        return interval(list(self.values(side, metric).values()))

    def metrics(self) -> list[str]:
        """All metrics: those of claims first, then the rest, cost left out."""
        claimed = [str(claim["metric"]) for claim in self.claims]
        seen = [m for runs in self.sides.values() for f in runs.values() for m in f]
        return [m for m in dict.fromkeys([*claimed, *seen]) if m not in COST]

    def missing(self) -> dict[str, list[int]]:
        """Planned seeds that a side has not finished, by side."""
        left = {
            side: [seed for seed in self.seeds if str(seed) not in runs]
            for side, runs in self.sides.items()
        }
        return {side: seeds for side, seeds in left.items() if seeds}

    def record(self, side: str, seed: int, figures: Mapping[str, float]) -> None:
        """Put in the figures of one finished run; what is not finite becomes null."""
        self.sides.setdefault(side, {})[str(seed)] = {
            name: float(value) if math.isfinite(value) else None for name, value in figures.items()
        }
        runs = self.sides[side]
        self.sides[side] = {key: runs[key] for key in sorted(runs, key=int)}

    def grow(self, seeds: Sequence[int]) -> None:
        """Plan more seeds; if all planned before had been seen, the note says so."""
        added = sorted(set(seeds) - set(self.seeds))
        if added and self.sides and not self.missing():
            line = f"Seeds {added} were added after seeds {self.seeds} had been seen."
            self.note = f"{self.note} {line}".strip()
        self.seeds = sorted(set(seeds) | set(self.seeds))

    def as_dict(self) -> dict[str, Any]:
        """The document that is written."""
        own = asdict(self)
        more = own.pop("more")
        return {"schema": SCHEMA, **own, **more}


def judged(results: Results, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Each claim with its paired difference, interval and verdict.

    A verdict is given only when all planned seeds of both sides are there and the rule's
    number of seeds is met; until then it is "inconclusive", with the reason.

    Args:
        results: with all figures so far.
        claims: as the method states them.

    Returns:
        Per claim: text, metric, ours, than, expect, margin, difference (mean of ours - than,
        null when there is none), interval ([low, high] or null), verdict, seeds (pairs),
        reason ("" when the interval alone decided), seconds ({"ours", "than"} mean wall
        time of one run) and per_second (difference per extra second of ours, null when ours
        was not slower).
    """
    return [_judge(results, claim) for claim in claims]


def _judge(results: Results, claim: Claim) -> dict[str, Any]:
    ours = results.values(claim.ours, claim.metric)
    fixed = number_of(claim.than)
    than = results.values(claim.than, claim.than_metric or claim.metric)
    if fixed is not None:
        than = dict.fromkeys(ours, fixed)
    pairs = paired(ours, than)
    found = interval(list(pairs.values()))
    by_interval = verdict(found, claim.expect, claim.margin)
    reason = _reason(results, claim, pairs, found, by_interval)
    took = {
        role: _mean(results.values(side, "seconds").values())
        for role, side in (("ours", claim.ours), ("than", claim.than))
    }
    extra = None if None in took.values() else (took["ours"] or 0.0) - (took["than"] or 0.0)
    slower = extra is not None and extra > 0 and bool(pairs)
    return {
        "text": claim.text,
        "metric": claim.metric,
        "ours": claim.ours,
        "than": claim.than,
        **({"than_metric": claim.than_metric} if claim.than_metric else {}),
        "expect": claim.expect,
        "margin": claim.margin,
        "difference": found.mean if math.isfinite(found.mean) else None,
        "interval": [found.low, found.high] if found.known else None,
        "verdict": "inconclusive" if reason else by_interval,
        "seeds": len(pairs),
        "reason": reason,
        "seconds": took,
        "per_second": found.mean / extra if slower and extra else None,
    }


def number_of(than: str) -> float | None:
    """The number that a claim compares with; None where it is a side."""
    try:
        return float(than)
    except ValueError:
        return None


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return math.fsum(known) / len(known) if known else None


def _reason(
    results: Results,
    claim: Claim,
    pairs: Mapping[int, float],
    found: Interval,
    by_interval: str,
) -> str:
    compared = {claim.ours: claim.metric}
    if number_of(claim.than) is None:
        compared.setdefault(claim.than, claim.than_metric or claim.metric)
    for side, metric in compared.items():
        runs = results.sides.get(side, {})
        if not runs:
            return f"the side '{side}' was not run"
        if not any(metric in figures for figures in runs.values()):
            return f"the side '{side}' has no figure '{metric}'"
    done = [
        seed for seed in results.seeds if all(str(seed) in results.sides[side] for side in compared)
    ]
    if len(done) < len(results.seeds):
        return f"{len(done)} of {len(results.seeds)} planned seeds are finished"
    if len(pairs) < len(done):
        return f"{len(done) - len(pairs)} of {len(done)} seeds gave no finite figure"
    taken = {
        side: list(results.values(side, "seconds").values()) for side in compared if side != TEACHER
    }
    needed = required_seeds(taken)
    if len(pairs) < needed:
        fast = f" where a side takes under {FAST_SECONDS:.0f} s" if needed > LEAST_SEEDS else ""
        alone = f"; the interval alone would say '{by_interval}'" if found.known else ""
        return f"{len(pairs)} seeds, and the rule asks for {needed}{fast}{alone}"
    return ""


def file_hash(path: Path | str) -> str:
    """sha256 of a method's file, the same whatever its line ends are.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        text = Path(path).read_bytes().replace(b"\r\n", b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return hashlib.sha256(text).hexdigest()


def stamp_of(value: Any) -> str:
    """A hash of anything that JSON can hold; mappings in any order are equal."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folders() -> list[Path]:
    """Where recorded results are looked for: here, in the checkout, in the package."""
    package = Path(__file__).resolve().parents[1]
    places = [Path.cwd() / "results", package.parents[1] / "results", package / "_shipped/results"]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def find(method: str) -> Path | None:
    """The recorded results of a method, or None."""
    for folder in folders():
        path = folder / f"{method}.json"
        if path.is_file():
            return path
    return None


def read(path: Path | str) -> Results:
    """Read a results file.

    Raises:
        CheckpointError: unreadable, damaged, or of another schema.
    """
    place = Path(path)
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the results '{place}' cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise CheckpointError(f"'{place}' has schema {schema!r}, where {SCHEMA} is read")
    known = {k: found.pop(k) for k in list(found) if k in Results.__dataclass_fields__}
    found.pop("schema")
    try:
        results = Results(**{**known, "more": found})
        results.seeds = [int(seed) for seed in results.seeds]
        for runs in results.sides.values():
            for seed, figures in runs.items():
                int(seed), dict(figures)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the results '{place}' are damaged: {error}") from error
    return results


def write(results: Results, path: Path | str) -> Path:
    """Write results whole or not at all: aside first, then renamed.

    Raises:
        CheckpointError: the disk refuses; the file before is untouched.
    """
    from stillhouse.engine.checkpoint import write_atomic

    text = json.dumps(_finite(results.as_dict()), indent=1, ensure_ascii=False, allow_nan=False)
    place = Path(path)
    write_atomic(place, f"{text}\n".encode())
    return place


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def stale(results: Results, method_file: Path | str) -> bool:
    """Whether the method's file has changed since these results were measured."""
    return results.file_hash != file_hash(method_file)


def kept_from(before: Results, fresh: Results) -> None:
    """Take over from an earlier file what is still true: figures of equal stamps, the note.

    Every run stays in the file: seeds and sides that this bench does not run are kept as
    long as their side's stamp is the same. If the planned seeds grow after figures were
    seen, the note says so.

    Args:
        before: as read.
        fresh: of this bench, its stamps set for every side known to it; changed in place.
    """
    if before.method != fresh.method or before.file_hash != fresh.file_hash:
        return
    same = {s for s, stamp in before.stamps.items() if fresh.stamps.get(s, stamp) == stamp}
    for side in before.sides:
        if side not in same:
            continue
        fresh.stamps[side] = before.stamps[side]
        for seed, figures in before.sides[side].items():
            fresh.sides.setdefault(side, {}).setdefault(seed, figures)
    fresh.note = fresh.note or before.note
    if fresh.sides:
        seeds = sorted(set(fresh.seeds) | set(before.seeds))
        fresh.seeds = list(before.seeds)
        fresh.grow(seeds)
    fresh.more = {**before.more, **fresh.more}
