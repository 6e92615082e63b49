"""What a report says: the same words and figures for the page and for the terminal.

Each section is made of what a run folder holds. What is not there leaves its section out.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.bench.figures import count, duration, number, share, size, with_interval
from stillhouse.bench.statistics import Interval, interval, paired
from stillhouse.report.charts import (
    Bar,
    Chart,
    Matrix,
    Strip,
    confusion,
    line_chart,
    reliability,
    strip,
)
from stillhouse.report.reading import (
    Points,
    RunLogs,
    RunRecord,
    StageLog,
    finite,
    number_of,
    read_run,
    rows_of,
)

TEACHER, ALONE, DISTILLED = "teacher", "alone", "distilled"
COST = ("seconds", "peak_mb")
MOST_IMAGE_BYTES = 8_000_000
MOST_STAGES = 10
_ORDER = {TEACHER: 0, ALONE: 1, DISTILLED: 9}
_CAPITALS = ("ece", "nll", "f1", "psnr", "ssim", "auc", "kl", "iou", "em", "y", "rgb")
_CAPITALS += ("ior", "hlr", "lrs", "ars")
_SPELT = {"brier": "Brier", "miou": "mIoU", "map": "mAP", "top1": "top-1", "top5": "top-5"}
_SPELT |= {word: word.upper() for word in _CAPITALS}
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Column:
    """One side of the final table."""

    key: str
    name: str
    role: str


@dataclass
class Grid:
    """A table: headings, and rows whose first cell names them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Tile:
    """A figure worth being seen first."""

    value: str
    label: str
    detail: str = ""


@dataclass
class Group:
    """Charts that belong together."""

    title: str
    charts: list[Chart]
    detail: str = ""


@dataclass
class Time:
    """A stage's time, as shares of the longest stage for its bar."""

    name: str
    kind: str
    seconds: float
    width: float
    teacher: float
    detail: str


@dataclass
class Calibrated:
    """A reliability diagram with its figures."""

    name: str
    bars: list[Bar]
    figures: list[tuple[str, str]]


@dataclass
class Picture:
    """A PNG picture as data: base64.

    Attributes:
        title: above it.
        data: base64.
        caption: below it.
        width: at which it is shown, in pixels.
        small: it is enlarged, and its pixels are to stay visible.
    """

    title: str
    data: str
    caption: str = ""
    width: int = 0
    small: bool = False


@dataclass
class Report:
    """All that a report says; an empty section is not shown."""

    title: str
    method: str
    status: str
    finished: bool
    about: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    strip: Strip | None = None
    columns: list[Column] = field(default_factory=list)
    results: list[tuple[str, list[str]]] = field(default_factory=list)
    results_note: str = ""
    findings: list[str] = field(default_factory=list)
    curves: list[Group] = field(default_factory=list)
    curves_left: int = 0
    agreement: list[Grid] = field(default_factory=list)
    calibration: list[Calibrated] = field(default_factory=list)
    confusion: Matrix | None = None
    pictures: list[Picture] = field(default_factory=list)
    sizes: Grid | None = None
    times: list[Time] = field(default_factory=list)
    time_notes: list[str] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    versions: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""


def make_report(folder: Path | str) -> Report:
    """The report of a run folder, finished or not.

    Raises:
        RunFolderError: there is no such folder, or no run in it.
    """
    return compose(read_run(folder))


def compose(run: RunRecord) -> Report:
    """The report of what was read from a run folder."""
    method = str(run.summary.get("method") or run.recipe.get("method") or run.folder.name)
    report = Report(
        title=str(run.summary.get("title") or method),
        method=method,
        status=_status(run),
        finished=run.finished,
        recipe=run.recipe_text,
    )
    sides = _Sides(run, method)
    report.about = _about(run)
    report.columns = sides.columns
    report.results, report.results_note = sides.table(), sides.note()
    report.strip = sides.strip()
    report.sizes = _sizes(run)
    report.tiles = _tiles(run, sides)
    report.findings = [*sides.findings(), *_time_to_target(run, sides)]
    report.curves, report.curves_left = _curves(run)
    report.agreement = _agreement(run)
    report.calibration = _calibration(run)
    report.confusion = _confusion(run)
    report.pictures = _pictures(run)
    report.times, report.time_notes = _times(run), _time_notes(run)
    report.tables, report.texts = _tables(run), _texts(run)
    report.warnings = _warnings(run)
    report.versions = [(str(k), str(v)) for k, v in run.part("versions").items()]
    return report


def words(name: str) -> str:
    """A figure's name for people: macro_f1 becomes macro F1."""
    return " ".join(_SPELT.get(part, part) for part in name.split("_"))


# ---- what was done -----------------------------------------------------------------------


def _status(run: RunRecord) -> str:
    if run.finished:
        return "finished"
    begun = [s for s in run.logs.stages.values() if s.kind or s.last_step]
    if not begun:
        return "not finished; no stage has begun"
    last = begun[-1]
    at = f", step {last.last_step}" if last.last_step else ""
    return f"not finished; last seen in stage {last.name}{at}"


def _about(run: RunRecord) -> list[tuple[str, str]]:
    summary, recipe = run.summary, run.recipe
    data = run.part("data")
    seeds = summary.get("seeds", summary.get("seed(s)", recipe.get("seed")))
    facts = [
        ("task", summary.get("task") or recipe.get("task")),
        ("data", data.get("edition") or data.get("name") or _named(recipe.get("data"), "name")),
        ("data hash", str(data.get("hash") or "")[:16]),
        ("teacher", _model(recipe.get("teacher"))),
        ("student", _model(recipe.get("student"))),
        ("settings", _settings(recipe)),
        ("budget", _budget(recipe.get("budget"))),
        ("seeds", ", ".join(map(str, seeds)) if isinstance(seeds, list) else seeds),
        ("hardware", summary.get("hardware")),
        ("date", summary.get("date")),
        ("wall time", _of(run.figure("seconds"), duration)),
        ("peak memory", _of(run.figure("peak_mb"), lambda mb: f"{mb:,.0f} MiB")),
    ]
    return [(key, str(value)) for key, value in facts if value not in (None, "")]


def _of(value: float | None, say: Any) -> str:
    return "" if value is None else str(say(value))


def _named(value: Any, key: str) -> str:
    return str(value.get(key) or "") if isinstance(value, dict) else str(value or "")


def _model(spec: Any) -> str:
    """A model in a recipe in one line: what it is, its weights, how it is stored."""
    if not isinstance(spec, dict):
        return str(spec or "")
    endpoint, inner = spec.get("endpoint"), spec.get("recipe")
    said = (
        spec.get("model")
        or spec.get("artifact")
        or spec.get("callable")
        or (_named(endpoint, "base_url") or "endpoint" if endpoint else None)
        or (f"recipe of {_named(inner, 'method')}" if inner else None)
        or "store"
    )
    parts = [str(said)]
    options = spec.get("options")
    if isinstance(options, dict) and options:
        parts.append(", ".join(f"{k}={v}" for k, v in options.items()))
    if spec.get("weights"):
        parts.append(f"weights {spec['weights']}")
    if spec.get("train"):
        parts.append("trained as a stage")
    if spec.get("store"):
        parts.append("outputs stored")
    return "; ".join(parts)


def _settings(recipe: Mapping[str, Any]) -> str:
    settings = recipe.get("settings")
    said = [f"variant {recipe['variant']}"] if recipe.get("variant") else []
    if isinstance(settings, dict):
        said += [f"{k}={v}" for k, v in settings.items()]
    return ", ".join(said)


def _budget(budget: Any) -> str:
    if not isinstance(budget, dict):
        return ""
    said = []
    for name in ("epochs", "steps"):
        if budget.get(name) is not None:
            said.append(f"{budget[name]} {name}")
    if budget.get("batch") is not None:
        said.append(f"batch {budget['batch']}")
    if budget.get("optimizer"):
        said.append(f"{budget['optimizer']}, lr {budget.get('lr')}")
    if budget.get("schedule"):
        said.append(f"{budget['schedule']} schedule")
    if budget.get("select"):
        said.append(f"{budget['select']} state kept")
    return ", ".join(said)


# ---- figures of the sides ----------------------------------------------------------------


class _Sides:
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
        names = [m for m in dict.fromkeys(seen) if m not in COST]
        return [main, *(m for m in names if m != main)] if main in names else names

    @property
    def main(self) -> str:
        """The metric that counts, "" when there is none."""
        return self.metrics[0] if self.metrics else ""

    def values(self, side: str, metric: str) -> dict[int, float]:
        seeds = self.figures.get(side, {})
        return {seed: figures[metric] for seed, figures in seeds.items() if metric in figures}

    def summary(self, side: str, metric: str) -> Interval:
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
        if not self.columns:
            return ""
        counts = {c.name: len(self.figures[c.key]) for c in self.columns}
        if max(counts.values()) == 1:
            return "One seed, so there is no interval."
        told = ", ".join(f"{name} {seeds}" for name, seeds in counts.items())
        return f"Mean ± 95% t interval over seeds ({told})."

    def strip(self) -> Strip | None:
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


def _tiles(run: RunRecord, sides: _Sides) -> list[Tile]:
    tiles = []
    ours = sides.summary(DISTILLED, sides.main) if sides.main else interval([])
    if ours.count and math.isfinite(ours.mean):
        names = {c.key: c.name for c in sides.columns}
        tiles.append(Tile(with_interval(ours), words(sides.main), names[DISTILLED]))
    gain = sides.gain() if sides.main else interval([])
    if gain.count and math.isfinite(gain.mean):
        detail = f"{gain.low:+.3g} to {gain.high:+.3g}" if gain.known else "one seed"
        tiles.append(Tile(f"{gain.mean:+.3g}", "against alone", detail))
    for keys, label, say, than in (
        (("parameters",), "parameters", count, "of the teacher's"),
        (("latency_ms", "1", "p50"), "latency, batch 1", _ms, "of the teacher's"),
    ):
        student = run.figure("sizes", "student", *keys)
        teacher = run.figure("sizes", "teacher", *keys)
        if student is not None:
            ratio = f"{share(student / teacher)} {than}" if teacher else ""
            tiles.append(Tile(say(student), label, ratio))
    return tiles


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


# ---- size, time --------------------------------------------------------------------------


def _sizes(run: RunRecord) -> Grid | None:
    roles = [r for r in ("teacher", "student") if run.part("sizes", r)]
    roles += [r for r in run.part("sizes") if r not in roles and run.part("sizes", r)]
    if not roles:
        return None
    batches = sorted(
        {b for role in roles for b in run.part("sizes", role, "latency_ms")},
        key=lambda b: (not str(b).isdigit(), int(b) if str(b).isdigit() else 0),
    )
    wanted: list[tuple[str, tuple[str, ...], Any]] = [
        ("parameters", ("parameters",), count),
        ("size", ("bytes",), size),
        ("MACs per input", ("macs",), count),
    ]
    for batch in batches:
        wanted.append((f"latency, batch {batch}, p50", ("latency_ms", batch, "p50"), _ms))
        wanted.append((f"latency, batch {batch}, p95", ("latency_ms", batch, "p95"), _ms))
    wanted.append(("inputs per second", ("throughput",), count))
    both = roles[:2] == ["teacher", "student"]
    rows = []
    for name, keys, say in wanted:
        values = [run.figure("sizes", role, *keys) for role in roles]
        if any(value is not None for value in values):
            row = [name, *(say(value) for value in values)]
            rows.append([*row, _ratio(values[0], values[1])] if both else row)
    head = ["", *roles, *(["student / teacher"] if both else [])]
    if not rows:
        return None
    return Grid("Size and speed", head, rows, "Latency without preprocessing, models interleaved.")


def _ratio(teacher: float | None, student: float | None) -> str:
    if not teacher or student is None:
        return "–"
    ratio = student / teacher
    return f"{ratio:.2g} ×" if ratio < 10 else f"{ratio:.0f} ×"


def _stages(run: RunRecord) -> list[dict[str, Any]]:
    told = run.items("stages")
    if told:
        return told
    stages = run.logs.stages.values()
    return [{"name": s.name, "kind": s.kind, "seconds": s.seconds} for s in stages if s.seconds]


def _times(run: RunRecord) -> list[Time]:
    stages = _stages(run)
    if len(stages) > MOST_STAGES:
        stages = _gathered(stages)
    longest = max((number_of(s.get("seconds")) or 0.0 for s in stages), default=0.0)
    return [_time(stage, longest) for stage in stages[: 3 * MOST_STAGES]]


def _gathered(stages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages of child jobs (path with a slash) added up under the first part of their path."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages:
        name, kind = str(stage.get("name", "")), str(stage.get("kind", ""))
        top = name.partition("/")[0]
        entry = found.setdefault((top, kind), {"name": top, "kind": kind, "stages": 0})
        entry["stages"] += 1
        for key in ("seconds", "teacher_seconds", "loop_seconds", "steps"):
            entry[key] = entry.get(key, 0.0) + (number_of(stage.get(key)) or 0.0)
    return list(found.values())


def _time(stage: Mapping[str, Any], longest: float) -> Time:
    seconds = number_of(stage.get("seconds")) or 0.0
    steps, asked = number_of(stage.get("steps")), number_of(stage.get("teacher_seconds")) or 0.0
    detail = [duration(seconds)]
    if stage.get("stages", 1) != 1:
        detail.append(f"{stage['stages']} stages")
    if steps and seconds and stage.get("kind") in {"train", "synthesis"}:
        loop = number_of(stage.get("loop_seconds")) or seconds
        detail.append(f"{steps:.0f} steps, {number(steps / loop)} a second")
    if asked:
        detail.append(f"teacher {duration(asked)}")
    width = 100 * seconds / longest if longest else 0.0
    teacher = min(100.0, 100 * asked / seconds) if seconds else 0.0
    name, kind = str(stage.get("name", "")), str(stage.get("kind", ""))
    return Time(name, kind, seconds, width, teacher, "; ".join(detail))


def _time_notes(run: RunRecord) -> list[str]:
    notes = []
    asked = run.figure("teacher_share")
    if asked is not None:
        notes.append(f"The teacher took {share(asked)} of the time of the training steps.")
        saving = run.figure("store_saving")
        if saving is not None and saving >= 0.01:
            notes.append(
                f"A store of its outputs (teacher: {{store: true}}) would save an estimated "
                f"{share(saving)} of that time."
            )
    batch = number_of((run.recipe.get("budget") or {}).get("batch")) if run.recipe else None
    student = next((s for s in run.items("stages") if s.get("name") == "student"), {})
    steps = number_of(student.get("steps"))
    loop = number_of(student.get("loop_seconds")) or number_of(student.get("seconds"))
    if batch and steps and loop:
        notes.append(f"The student's training read {number(steps * batch / loop)} rows a second.")
    for name, value in run.part("store").items():
        notes.append(f"Store, {words(str(name))}: {value}.")
    return notes


# ---- curves ------------------------------------------------------------------------------


def _curves(run: RunRecord) -> tuple[list[Group], int]:
    """Charts of each stage, and how many stages are left out where there are too many."""
    groups = []
    for stage in run.logs.stages.values():
        charts = [chart for chart in _stage_charts(run, stage) if chart is not None]
        if charts:
            refused = f"{stage.refused} updates were refused." if stage.refused else ""
            groups.append(Group(stage.name, charts, refused))
    if len(groups) <= MOST_STAGES:
        return groups, 0
    # The run's own stages say more than those of its children (experts, fresh networks).
    chosen = sorted(range(len(groups)), key=lambda i: (groups[i].title.count("/"), i))
    kept = [groups[i] for i in sorted(chosen[:MOST_STAGES])]
    return kept, len(groups) - len(kept)


def _stage_charts(run: RunRecord, stage: StageLog) -> Iterable[Chart | None]:
    lines = dict(stage.terms)
    if len(lines) != 1:
        lines["loss"] = stage.loss
    yield _curve("loss terms", lines)
    for name, points in stage.scores.items():
        several = {"distilled": points, **_same_score(run.side_logs, stage.name, name)}
        lines = several if len(several) > 1 else {name: points}
        yield _curve(f"validation: {words(name)}", lines, log=False)
    for name, points in stage.notes.items():
        yield _curve(words(name), {name: points})
    if len({y for _, y in finite(stage.rate)}) > 1:
        yield _curve("learning rate", {"lr": stage.rate}, log=False)


def _curve(title: str, lines: Mapping[str, Points], *, log: bool | None = None) -> Chart | None:
    """A chart, where some line has two points: one alone is no curve."""
    if all(len(finite(points)) < 2 for points in lines.values()):
        return None
    return line_chart(title, lines, log=log)


def _same_score(side_logs: Mapping[str, RunLogs], stage: str, score: str) -> dict[str, Points]:
    found = {}
    for side, logs in side_logs.items():
        points = logs.stages[stage].scores.get(score) if stage in logs.stages else None
        if points:
            found["alone" if side == "supervised" else side] = points
    return found


def _time_to_target(run: RunRecord, sides: _Sides) -> list[str]:
    """When the distilled student passed what the one alone had at its end, on validation data."""
    if not sides.main:
        return []
    for stage in run.logs.stages.values():
        ours = finite(stage.scores.get(sides.main, []))
        alone = finite(_same_score(run.side_logs, stage.name, sides.main).get("alone", []))
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


# ---- details -----------------------------------------------------------------------------


def _agreement(run: RunRecord) -> list[Grid]:
    found = run.part("details", "agreement")
    nested = {k: v for k, v in found.items() if isinstance(v, dict)}
    plain = {k: v for k, v in found.items() if number_of(v) is not None}
    grids = []
    if plain:
        nested = {"": plain, **nested}
    for name, figures in nested.items():
        rows = [[_fidelity(str(k)), number(number_of(v))] for k, v in figures.items()]
        if rows:
            grids.append(Grid(str(name), ["", "value"], rows))
    return grids


_FIDELITY = {
    "agreement": "same class as the teacher, share of inputs",
    "teacher_kl": "mean KL(teacher ‖ student), nats",
}


def _fidelity(name: str) -> str:
    return _FIDELITY.get(name, words(name))


def _calibration(run: RunRecord) -> list[Calibrated]:
    found = run.part("details", "calibration")
    given = {"student": found} if "bins" in found else found
    shown = []
    for name, told in given.items():
        if not isinstance(told, dict):
            continue
        bins = [
            {k: v for k, v in ((str(k), number_of(v)) for k, v in b.items()) if v is not None}
            for b in rows_of(told.get("bins"))
        ]
        bars = reliability(bins)
        figures = [
            (words(k), number(number_of(told[k]))) for k in ("ece", "nll", "brier") if k in told
        ]
        if bars:
            shown.append(Calibrated(str(name), bars, figures))
    return shown


def _confusion(run: RunRecord) -> Matrix | None:
    found = run.part("details", "confusion")
    matrix, labels = found.get("matrix"), found.get("labels")
    if not isinstance(matrix, list) or not all(isinstance(row, list) for row in matrix):
        return None
    rows = [[number_of(value) for value in row] for row in matrix]
    if any(value is None or value < 0 for row in rows for value in row):
        return None
    known = [[float(value or 0.0) for value in row] for row in rows]
    return confusion([str(x) for x in labels] if isinstance(labels, list) else [], known)


def _pictures(run: RunRecord) -> list[Picture]:
    pictures = []
    for told in run.items("details", "images"):
        data = _png(run.folder, told)
        title = str(told.get("title", ""))
        if data is None:
            run.troubles.append(f"the picture '{title}' is no PNG inside the run folder")
        else:
            width, small = _shown_width(data)
            pictures.append(Picture(title, data, str(told.get("caption", "")), width, small))
    return pictures


def _png(folder: Path, told: Mapping[str, Any]) -> str | None:
    """A PNG as base64: given as such, or a file of the run folder and nowhere else."""
    try:
        if isinstance(told.get("png_base64"), str):
            data = base64.b64decode(told["png_base64"], validate=True)
        else:
            place = (folder / str(told.get("path", ""))).resolve()
            if not place.is_relative_to(folder.resolve()) or not place.is_file():
                return None
            if place.stat().st_size > MOST_IMAGE_BYTES:
                return None
            data = place.read_bytes()
    except (binascii.Error, ValueError, OSError):
        return None
    if not data.startswith(_PNG) or len(data) > MOST_IMAGE_BYTES:
        return None
    return base64.b64encode(data).decode()


def _shown_width(data: str) -> tuple[int, bool]:
    """The width to show a PNG at, and whether it is enlarged (a whole number of times)."""
    own = int.from_bytes(base64.b64decode(data[:32])[16:20], "big")
    times = max(1, min(8, 320 // max(1, own)))
    return own * times, times > 1


def _tables(run: RunRecord) -> list[Grid]:
    grids = []
    for told in run.items("details", "tables"):
        columns, rows = told.get("columns"), told.get("rows")
        if isinstance(rows, list) and rows:
            head = [str(c) for c in columns] if isinstance(columns, list) else []
            cells = [[_cell(v) for v in r] for r in map(_as_row, rows)]
            grids.append(
                Grid(str(told.get("title", "")), head, cells, str(told.get("caption", "")))
            )
    return grids


def _as_row(row: Any) -> Sequence[Any]:
    if isinstance(row, dict):
        return list(row.values())
    return row if isinstance(row, list) else [row]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def _texts(run: RunRecord) -> list[tuple[str, str]]:
    found = run.part("details").get("texts")
    texts = []
    for told in found if isinstance(found, list) else []:
        if isinstance(told, dict):
            body = str(told.get("text", told.get("body", "")))
            texts.append((str(told.get("title", "")), body))
        elif isinstance(told, str):
            texts.append(("", told))
    return [text for text in texts if any(text)]


def _warnings(run: RunRecord) -> list[str]:
    told = [
        text if times == 1 else f"{text} ({times} times)"
        for text, times in run.logs.warnings.items()
        if text
    ]
    if run.logs.unreadable > 1:
        told.append(f"{run.logs.unreadable} lines of the log could not be read.")
    return [*told, *run.troubles]
