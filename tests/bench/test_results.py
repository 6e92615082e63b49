from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from stillhouse.bench import results as recorded
from stillhouse.bench.results import Results, file_hash, judged, kept_from, stale, stamp_of
from stillhouse.bench.show import sense
from stillhouse.errors import CheckpointError
from stillhouse.method import Claim

CLAIM = Claim("ours beats theirs", "accuracy", "ours", "theirs", "higher", 0.01)


def measured(ours, theirs, *, seeds=None, seconds=(200.0, 150.0)) -> Results:
    results = Results("ours", "h1", seeds=list(range(len(ours))) if seeds is None else seeds)
    for side, values, took in (("ours", ours, seconds[0]), ("theirs", theirs, seconds[1])):
        for seed, value in enumerate(values):
            results.record(side, seed, {"accuracy": value, "seconds": took, "peak_mb": 100.0})
    return results


def test_a_claim_is_judged_from_paired_differences():
    # differences 0.02, 0.03, 0.04: mean 0.03, s 0.01, half 4.302653 * 0.01 / sqrt(3)
    (found,) = judged(measured([0.92, 0.83, 0.94], [0.90, 0.80, 0.90]), [CLAIM])
    assert found["difference"] == pytest.approx(0.03)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert found["interval"] == pytest.approx([0.03 - half, 0.03 + half], abs=1e-7)
    assert found["verdict"] == "inconclusive"  # 0.0052 .. 0.0548 holds the margin
    assert found["reason"] == ""
    assert found["seeds"] == 3
    assert found["seconds"] == {"ours": 200.0, "than": 150.0}
    assert found["per_second"] == pytest.approx(0.03 / 50)
    (other,) = judged(
        measured([0.92, 0.83, 0.94], [0.90, 0.80, 0.90]),
        [Claim("any", "accuracy", "ours", "theirs")],
    )
    assert other["verdict"] == "supported"


def test_an_unfavourable_result_is_recorded_as_it_is():
    (found,) = judged(measured([0.8, 0.8, 0.81], [0.9, 0.9, 0.9]), [CLAIM])
    assert found["verdict"] == "not supported"
    assert found["difference"] < 0


def test_three_seeds_do_not_count_where_a_side_is_fast():
    results = measured([0.93, 0.84, 0.95], [0.90, 0.80, 0.91], seconds=(200.0, 20.0))
    (found,) = judged(results, [Claim("any", "accuracy", "ours", "theirs")])
    assert found["verdict"] == "inconclusive"
    assert "asks for 5" in found["reason"]
    assert "'supported'" in found["reason"]
    five = measured([0.93] * 5, [0.90, 0.91, 0.90, 0.90, 0.89], seconds=(200.0, 20.0))
    (found,) = judged(five, [Claim("any", "accuracy", "ours", "theirs")])
    assert (found["verdict"], found["reason"]) == ("supported", "")


def test_no_verdict_before_all_planned_seeds_are_there():
    results = measured([0.9] * 4, [0.8] * 3, seeds=[0, 1, 2, 3])
    (found,) = judged(results, [CLAIM])
    assert found["verdict"] == "inconclusive"
    assert found["reason"] == "3 of 4 planned seeds are finished"
    assert results.missing() == {"theirs": [3]}


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (Claim("x", "accuracy", "ours", "gone"), "the side 'gone' was not run"),
        (Claim("x", "psnr", "ours", "theirs"), "has no figure 'psnr'"),
    ],
)
def test_what_is_missing_is_said(claim, reason):
    (found,) = judged(measured([0.9] * 3, [0.8] * 3), [claim])
    assert reason in found["reason"]
    assert found["verdict"] == "inconclusive"
    assert found["difference"] is None
    assert found["interval"] is None


def test_a_run_that_gave_nan_is_not_left_out_silently(tmp_path):
    results = measured([0.9, math.nan, 0.9, 0.9], [0.8] * 4)
    assert results.sides["ours"]["1"]["accuracy"] is None
    results.claims = judged(results, [CLAIM])
    assert "1 of 4 seeds gave no finite figure" in results.claims[0]["reason"]
    path = recorded.write(results, tmp_path / "ours.json")
    assert "NaN" not in path.read_text()


def test_written_and_read_back_equal(tmp_path):
    results = measured([0.9, 0.8, 0.85], [0.8, 0.7, 0.7])
    results.claims = judged(results, [CLAIM])
    results.more = {"tuning": "the same for all"}
    path = recorded.write(results, tmp_path / "deep" / "ours.json")
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    for key in ("method", "file_hash", "command", "seeds", "data", "sides", "claims"):
        assert key in document
    for key in ("versions", "hardware", "date", "note"):
        assert key in document
    assert document["sides"]["ours"]["0"] == {"accuracy": 0.9, "seconds": 200.0, "peak_mb": 100.0}
    assert recorded.read(path) == results
    assert [p.name for p in path.parent.iterdir()] == ["ours.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"schema": 2}',
        '{"schema": 1}',
        '{"schema": 1, "method": "m", "file_hash": "h", "sides": {"a": {"x": {}}}}',
    ],
)
def test_damaged_results_are_told(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"m\.json"):
        recorded.read(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = recorded.write(measured([0.9], [0.8]), tmp_path / "ours.json")
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError):
        recorded.write(measured([0.1], [0.2]), path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ours.json"]


def test_file_hash_and_staleness(tmp_path):
    file = tmp_path / "m.py"
    file.write_bytes(b"a = 1\nb = 2\n")
    results = Results("m", file_hash(file))
    assert not stale(results, file)
    file.write_bytes(b"a = 1\r\nb = 2\r\n")
    assert not stale(results, file)
    file.write_bytes(b"a = 1\nb = 3\n")
    assert stale(results, file)
    with pytest.raises(CheckpointError, match="gone"):
        file_hash(tmp_path / "gone.py")


def test_stamps_do_not_depend_on_the_order_of_keys():
    assert stamp_of({"a": 1, "b": [2]}) == stamp_of({"b": [2], "a": 1})
    assert stamp_of({"a": 1}) != stamp_of({"a": 2})


def planned(seeds, **stamps) -> Results:
    return Results("ours", "h1", seeds=seeds, stamps=stamps)


def test_a_resumed_bench_keeps_what_is_still_true():
    before = measured([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    before.stamps = {"ours": "s1", "theirs": "t1", "old": "o1"}
    before.record("old", 0, {"accuracy": 0.1})
    before.note = "tried a larger teacher"
    fresh = planned([0, 1, 2], ours="s1", theirs="t2")
    kept_from(before, fresh)
    assert set(fresh.sides) == {"ours", "old"}  # theirs has other settings now
    assert fresh.values("ours", "accuracy") == {0: 0.9, 1: 0.8, 2: 0.7}
    assert fresh.note == "tried a larger teacher"


def test_nothing_is_kept_of_another_method_file():
    before = measured([0.9], [0.8])
    before.stamps = {"ours": "s1"}
    fresh = Results("ours", "h2", seeds=[0], stamps={"ours": "s1"})
    kept_from(before, fresh)
    assert fresh.sides == {}


def test_seeds_never_shrink_and_growing_after_a_look_is_noted():
    before = measured([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    before.stamps = {"ours": "s", "theirs": "t"}
    fewer = planned([0], ours="s", theirs="t")
    kept_from(before, fewer)
    assert fewer.seeds == [0, 1, 2]
    assert fewer.note == ""
    more = planned([0, 1, 2, 3, 4], ours="s", theirs="t")
    kept_from(before, more)
    assert more.seeds == [0, 1, 2, 3, 4]
    assert "Seeds [3, 4] were added after" in more.note
    unfinished = measured([0.9], [0.8], seeds=[0, 1, 2])
    unfinished.stamps = {"ours": "s", "theirs": "t"}
    resumed = planned([0, 1, 2, 3], ours="s", theirs="t")
    kept_from(unfinished, resumed)
    assert resumed.note == ""


def test_results_are_found_here_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recorded.find("no-such-method") is None
    path = recorded.write(measured([0.9], [0.8]), tmp_path / "results" / "no-such-method.json")
    assert recorded.find("no-such-method") == path


def test_reading_results_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, stillhouse.bench.results, stillhouse.bench.show, stillhouse.bench.table;"
        "print([m for m in ('torch', 'pydantic', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_claim_may_compare_with_a_number_or_with_another_figure():
    results = Results("ours", "h1", seeds=[0, 1, 2])
    for seed, (whole, part) in enumerate([(0.90, 0.92), (0.91, 0.94), (0.92, 0.93)]):
        results.record("ours", seed, {"whole": whole, "part": part, "seconds": 200.0})
    number, figure = judged(
        results,
        [
            Claim("keeps it", "whole", "ours", "0.85"),
            Claim("no less", "part", "ours", "ours", than_metric="whole"),
        ],
    )
    assert number["difference"] == pytest.approx(0.06)
    assert (number["verdict"], number["reason"]) == ("supported", "")
    assert "than_metric" not in number
    assert figure["difference"] == pytest.approx(0.02)
    assert sense(figure) == "part: ours higher than whole of ours"
    assert sense(number) == "whole: ours higher than 0.85"
    (absent,) = judged(results, [Claim("no", "part", "ours", "ours", than_metric="other")])
    assert absent["verdict"] == "inconclusive"
