"""What a report says: the same words and figures for the page and for the terminal.

Each section is made of what a run folder holds. What is not there leaves its section out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stillhouse.report import details
from stillhouse.report.content import Grid, Report, Time, words
from stillhouse.report.curves import curves
from stillhouse.report.figures import count, duration, number, share, size
from stillhouse.report.reading import RunRecord, number_of, read_run
from stillhouse.report.sides import Sides, milliseconds, tiles, time_to_target

MOST_STAGES = 10


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
    sides = Sides(run, method)
    report.about = _about(run)
    report.columns = sides.columns
    report.results, report.results_note = sides.table(), sides.note()
    report.strip = sides.strip()
    report.sizes = _sizes(run)
    report.tiles = tiles(run, sides)
    report.findings = [*sides.findings(), *time_to_target(run, sides)]
    report.curves, report.curves_left = curves(run)
    report.agreement = details.agreement(run)
    report.calibration = details.calibration(run)
    report.confusion = details.confusion(run)
    report.pictures = details.pictures(run)
    report.times, report.time_notes = _times(run), _time_notes(run)
    report.tables, report.texts = details.tables(run), details.texts(run)
    report.warnings = _warnings(run)
    report.versions = [(str(k), str(v)) for k, v in run.part("versions").items()]
    return report


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
        wanted.append((f"latency, batch {batch}, p50", ("latency_ms", batch, "p50"), milliseconds))
        wanted.append((f"latency, batch {batch}, p95", ("latency_ms", batch, "p95"), milliseconds))
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


# ---- warnings --------------------------------------------------------------------------


def _warnings(run: RunRecord) -> list[str]:
    told = [
        text if times == 1 else f"{text} ({times} times)"
        for text, times in run.logs.warnings.items()
        if text
    ]
    if run.logs.unreadable > 1:
        told.append(f"{run.logs.unreadable} lines of the log could not be read.")
    return [*told, *run.troubles]
