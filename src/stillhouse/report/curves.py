"""The curves of a run, stage by stage, beside those of the student alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stillhouse.report.charts import Chart, line_chart
from stillhouse.report.content import Group, words
from stillhouse.report.reading import Points, RunLogs, RunRecord, StageLog, finite

MOST_GROUPS = 10


def curves(run: RunRecord) -> tuple[list[Group], int]:
    """Charts of each stage, and how many stages are left out where there are too many."""
    groups = []
    for stage in run.logs.stages.values():
        charts = [chart for chart in _stage_charts(run, stage) if chart is not None]
        if charts:
            refused = f"{stage.refused} updates were refused." if stage.refused else ""
            groups.append(Group(stage.name, charts, refused))
    if len(groups) <= MOST_GROUPS:
        return groups, 0
    # The run's own stages say more than those of its children (experts, fresh networks).
    chosen = sorted(range(len(groups)), key=lambda i: (groups[i].title.count("/"), i))
    kept = [groups[i] for i in sorted(chosen[:MOST_GROUPS])]
    return kept, len(groups) - len(kept)


def _stage_charts(run: RunRecord, stage: StageLog) -> Iterable[Chart | None]:
    lines = dict(stage.terms)
    if len(lines) != 1:
        lines["loss"] = stage.loss
    yield _curve("loss terms", lines)
    for name, points in stage.scores.items():
        several = {"distilled": points, **same_score(run.side_logs, stage.name, name)}
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


def same_score(side_logs: Mapping[str, RunLogs], stage: str, score: str) -> dict[str, Points]:
    """A score's curves of the sides that trained a stage of the same name."""
    found = {}
    for side, logs in side_logs.items():
        points = logs.stages[stage].scores.get(score) if stage in logs.stages else None
        if points:
            found["alone" if side == "supervised" else side] = points
    return found
