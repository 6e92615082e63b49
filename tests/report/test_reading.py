from __future__ import annotations

import json
import math

import pytest

from stillhouse.errors import RunFolderError
from stillhouse.report.reading import finite, number_of, read_log, read_run


def lines(*events) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def step(number, loss, stage="student", **more):
    return {"event": "step", "stage": stage, "step": number, "terms": {"task": loss},
            "loss": loss, "lr": 0.1, **more}  # fmt: skip


def read(tmp_path, text: str):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    return read_log(path, [])


def test_lines_repeated_after_a_kill_count_once_and_the_later_wins(tmp_path):
    logs = read(
        tmp_path,
        lines(step(10, 3.0), step(20, 2.0), step(30, 9.0), step(20, 2.5), step(30, 1.5)),
    )
    assert logs.stages["student"].terms["task"] == [(10, 3.0), (20, 2.5), (30, 1.5)]
    assert logs.stages["student"].loss[-1] == (30, 1.5)
    assert logs.stages["student"].last_step == 30


def test_equal_steps_of_other_stages_and_events_are_kept_apart(tmp_path):
    logs = read(
        tmp_path,
        lines(
            step(10, 1.0, "teacher"),
            step(10, 2.0),
            {"event": "validation", "stage": "student", "step": 10, "scores": {"accuracy": 0.5}},
            {"event": "note", "stage": "student", "step": 10, "name": "a", "value": 1},
            {"event": "note", "stage": "student", "step": 10, "name": "b", "value": 2},
        ),
    )
    assert list(logs.stages) == ["teacher", "student"]
    student = logs.stages["student"]
    assert student.terms == {"task": [(10, 2.0)]}
    assert student.scores == {"accuracy": [(10, 0.5)]}
    assert student.notes == {"a": [(10, 1.0)], "b": [(10, 2.0)]}


@pytest.mark.parametrize("torn", ['{"event": "step", "sta', "\x00\x00", "[1, 2]", "null"])
def test_a_torn_last_line_is_passed_over(tmp_path, torn):
    logs = read(tmp_path, lines(step(10, 3.0)) + torn)
    assert logs.stages["student"].terms["task"] == [(10, 3.0)]
    assert logs.unreadable == 1


def test_a_line_of_wrong_types_hurts_nothing(tmp_path):
    logs = read(
        tmp_path,
        lines(
            {"event": "step", "stage": "s", "step": "ten", "terms": {"task": 1.0}},
            {"event": "step", "stage": "s", "step": 1, "terms": [1, 2], "loss": "x", "lr": None},
            {"event": "validation", "stage": "s", "step": 2, "scores": None},
            {"event": 7},
            {"event": "stage", "stage": "s", "state": "end", "seconds": "long"},
        ),
    )
    stage = logs.stages["s"]
    assert stage.terms == {}
    assert finite(stage.loss) == []
    assert stage.seconds is None


def test_nan_becomes_a_gap(tmp_path):
    text = '{"event": "step", "stage": "s", "step": 1, "terms": {"task": NaN}}\n'
    points = read(tmp_path, text).stages["s"].terms["task"]
    assert len(points) == 1
    assert math.isnan(points[0][1])


def test_warnings_count(tmp_path):
    logs = read(tmp_path, lines(*[{"event": "warning", "text": "slow"}] * 3))
    assert logs.warnings == {"slow": 3}


def test_notes_and_refusals_inside_steps(tmp_path):
    logs = read(tmp_path, lines(step(1, 1.0, notes={"cosine": -0.5}, refused=2)))
    assert logs.stages["student"].notes == {"cosine": [(1, -0.5)]}
    assert logs.stages["student"].refused == 2


def test_numbers():
    assert number_of(3) == 3.0
    for nothing in (True, None, "3", math.nan, math.inf, [], 10**400):
        assert number_of(nothing) is None


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder"):
        read_run(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="holds no run"):
        read_run(tmp_path)


def test_damaged_files_are_named_and_left_out(run_folder):
    folder = run_folder(log=[step(1, 1.0)], recipe="a: [")
    (folder / "run.json").write_text('{"schema": 1, "met')
    run = read_run(folder)
    assert not run.finished
    assert [t.split()[0] for t in run.troubles] == ["run.json", "recipe.yaml"]
    assert run.recipe_text == "a: ["
    assert run.logs.stages["student"].last_step == 1
