"""What lies in a run folder, read with patience: a killed run has a report too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.errors import RunFolderError

Points = list[tuple[float, float]]

LOG, SUMMARY, RECIPE = "log.jsonl", "run.json", "recipe.yaml"


@dataclass
class StageLog:
    """What the log says about one stage.

    Attributes:
        name: of the stage within the run.
        kind: train, capture, label, closed, synthesis, judge, or "" when not said.
        terms: loss term to (step, value).
        loss: (step, sum of the terms).
        rate: (step, learning rate).
        notes: diagnostic to (step, value).
        scores: validation figure to (step, value).
        seconds: of the stage; None while it runs.
        refused: steps whose update was refused.
    """

    name: str
    kind: str = ""
    terms: dict[str, Points] = field(default_factory=dict)
    loss: Points = field(default_factory=list)
    rate: Points = field(default_factory=list)
    notes: dict[str, Points] = field(default_factory=dict)
    scores: dict[str, Points] = field(default_factory=dict)
    seconds: float | None = None
    refused: int = 0

    @property
    def last_step(self) -> int:
        """The last step the log knows, 0 when none."""
        lines = (self.loss, *self.terms.values(), *self.scores.values())
        return int(max((points[-1][0] for points in lines if points), default=0))


@dataclass
class RunLogs:
    """What a `log.jsonl` says.

    Attributes:
        stages: in the order they began.
        warnings: each once, with how often it was given.
        unreadable: lines that are no JSON object (the last line of a killed run may be torn).
    """

    stages: dict[str, StageLog] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0


@dataclass
class RunRecord:
    """Everything a report is made of.

    Attributes:
        folder: of the run.
        summary: the content of `run.json`; empty when the run has not finished.
        recipe: the recipe as a mapping; empty when it cannot be read.
        recipe_text: as it was written.
        logs: of the run itself.
        side_logs: of the sides it was compared with, at the run's own seed.
        troubles: files that could not be read.
    """

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    logs: RunLogs = field(default_factory=RunLogs)
    side_logs: dict[str, RunLogs] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    def part(self, *path: str) -> dict[str, Any]:
        """A mapping within the summary; empty when it is absent or of another type."""
        found: Any = self.summary
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def items(self, *path: str) -> list[dict[str, Any]]:
        """The mappings of a list within the summary; empty when it is absent."""
        return rows_of(self.part(*path[:-1]).get(path[-1]))

    def figure(self, *path: str) -> float | None:
        """A finite number within the summary, or None."""
        return number_of(self.part(*path[:-1]).get(path[-1]))


def rows_of(value: Any) -> list[dict[str, Any]]:
    """The mappings of a JSON array; none when it is something else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number_of(value: Any) -> float | None:
    """A finite number, or None for all else; flags are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def read_run(folder: Path | str) -> RunRecord:
    """Read a run folder; what is missing or damaged is left out and named in `troubles`.

    Raises:
        RunFolderError: there is no such folder, or no run in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise RunFolderError(f"there is no run folder '{place}'")
    if not any((place / name).exists() for name in (LOG, SUMMARY, RECIPE)):
        raise RunFolderError(
            f"'{place}' holds no run: none of {RECIPE}, {LOG} and {SUMMARY} is in it"
        )
    record = RunRecord(place)
    record.summary = _read_summary(place / SUMMARY, record.troubles)
    record.recipe_text, record.recipe = _read_recipe(place / RECIPE, record.troubles)
    record.logs = read_log(place / LOG, record.troubles)
    seed = record.recipe.get("seed", 0)
    for path in sorted(place.glob(f"sides/*/seed-{seed}/{LOG}")):
        record.side_logs[path.parent.parent.name] = read_log(path, record.troubles)
    return record


def _read_summary(path: Path, troubles: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        troubles.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(found, dict):
        troubles.append(f"{path.name} is no JSON object")
        return {}
    return found


def _read_recipe(path: Path, troubles: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        troubles.append(f"{path.name} cannot be read: {error}")
        return "", {}
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        troubles.append(f"{path.name} is not valid YAML")
        return text, {}
    return text, found if isinstance(found, dict) else {}


def read_log(path: Path, troubles: list[str]) -> RunLogs:
    """Read a log; lines that a kill has repeated or torn are put right.

    After a kill the lines since the last checkpoint come twice: of equal (event, stage,
    step) the later counts.
    """
    logs = RunLogs()
    later: dict[tuple[str, str, int], dict[str, Any]] = {}
    for event in _events(path, logs, troubles):
        kind, stage = str(event.get("event", "")), str(event.get("stage", ""))
        if kind == "warning":
            text = str(event.get("text", "")).strip()
            logs.warnings[text] = logs.warnings.get(text, 0) + 1
        elif kind == "stage":
            _take_stage(logs, stage, event)
        elif kind in {"step", "validation", "note"}:
            step = number_of(event.get("step"))
            if step is not None:
                name = f"{kind}:{event.get('name', '')}" if kind == "note" else kind
                later[(name, stage, int(step))] = event
    for (name, stage, step), event in sorted(later.items(), key=lambda item: item[0][2]):
        _take_line(_stage(logs, stage), name.partition(":")[0], step, event)
    return logs


def _events(path: Path, logs: RunLogs, troubles: list[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    event = json.loads(line)
                except (ValueError, RecursionError):
                    event = None
                if isinstance(event, dict):
                    yield event
                else:
                    logs.unreadable += 1
    except OSError as error:
        troubles.append(f"{path.name} cannot be read: {error}")


def _stage(logs: RunLogs, name: str) -> StageLog:
    return logs.stages.setdefault(name, StageLog(name))


def _take_stage(logs: RunLogs, name: str, event: Mapping[str, Any]) -> None:
    stage = _stage(logs, name)
    stage.kind = str(event.get("kind") or stage.kind)
    if event.get("state") in {"end", "reloaded"}:
        stage.seconds = number_of(event.get("seconds"))


def _take_line(stage: StageLog, kind: str, step: int, event: Mapping[str, Any]) -> None:
    if kind == "validation":
        _add(stage.scores, step, event.get("scores"))
    elif kind == "note":
        _add(stage.notes, step, {str(event.get("name", "")): event.get("value")})
    else:
        _add(stage.terms, step, event.get("terms"))
        _add(stage.notes, step, event.get("notes"))
        _add(stage.notes, step, event.get("metrics"))
        _point(stage.loss, step, event.get("loss"))
        _point(stage.rate, step, event.get("lr"))
        refused = number_of(event.get("refused"))
        stage.refused = max(stage.refused, int(refused or 0))


def _add(lines: dict[str, Points], step: int, values: Any) -> None:
    if isinstance(values, Mapping):
        for name, value in values.items():
            _point(lines.setdefault(str(name), []), step, value)


def _point(points: Points, step: int, value: Any) -> None:
    # What is not a number stays as a gap: a curve must not be drawn across it.
    found = number_of(value)
    if value is not None:
        points.append((float(step), math.nan if found is None else found))


def finite(points: Iterable[tuple[float, float]]) -> Points:
    """The points whose value is a number."""
    return [(x, y) for x, y in points if math.isfinite(y)]
