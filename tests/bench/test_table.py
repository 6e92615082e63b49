from __future__ import annotations

import io

import pytest
from rich.console import Console

from stillhouse.bench import results as recorded
from stillhouse.bench import table
from stillhouse.bench.results import Results, judged
from stillhouse.bench.show import difference, show
from stillhouse.method import Claim
from stillhouse.metrics.statistics import interval
from stillhouse.report.figures import count, duration, number, share, size, with_interval


def measured(name="ours", note="") -> Results:
    results = Results(name, "h1", seeds=[0, 1, 2, 3, 4], note=note, date="2030-01-02T00:00:00")
    for seed in range(5):
        results.record(name, seed, {"accuracy": 0.9 + 0.001 * seed, "seconds": 30.0})
        results.record("<b>|theirs", seed, {"accuracy": 0.8, "seconds": 10.0})
    results.claims = judged(
        results, [Claim("beats | <script>alert(1)</script>", "accuracy", name, "<b>|theirs")]
    )
    return results


def test_numbers_and_intervals_are_rounded_alike():
    assert number(None) == number(float("nan")) == "–"
    assert number(0.123456) == "0.1235"
    assert number(1234567.0) == "1,234,567"
    assert number(0.0) == "0"
    assert with_interval(interval([0.9])) == "0.9"
    assert with_interval(interval([])) == "–"
    assert with_interval(interval([0.5, 0.5])) == "0.5 ± 0"
    assert with_interval(interval([0.91, 0.92, 0.93])) == "0.920 ± 0.025"
    assert with_interval(interval([30.0, 31.0, 33.0])) == "31.3 ± 3.8"
    assert difference({"difference": None}) == "–"


def test_counts_sizes_times_and_shares():
    assert [count(v) for v in (12, 1234, 45_600_000, 7.89e9, None)] == [
        "12",
        "1.23 k",
        "45.6 M",
        "7.89 G",
        "–",
    ]
    assert [size(v) for v in (640, 2600, 14_300_000, None)] == ["640 B", "2.6 kB", "14.3 MB", "–"]
    assert [duration(v) for v in (0.0421, 38.2, 185.0, 7800.0, None)] == [
        "0.042 s",
        "38 s",
        "3 min 05 s",
        "2 h 10 min",
        "–",
    ]
    assert [share(v) for v in (0.624, 0.0, 0.004, None)] == ["62 %", "0 %", "under 1 %", "–"]


def test_page_has_every_verdict_and_no_markup_of_others(tmp_path):
    found = measured(note="a <note>")
    page = table.markdown([found], {"ours": "h1"})
    assert "**supported**" in page
    assert "| ours | 1 | 0 | 0 | 2030-01-02 |" in page
    assert "(stale)" not in page
    for line in page.splitlines():
        assert "<script>" not in line.replace("\\<", "")
    row = next(line for line in page.splitlines() if "alert" in line)
    assert row.replace("\\|", "").count("|") == 5
    assert "a \\<note\\>" in page


def test_stale_results_are_marked(tmp_path):
    page = table.markdown([measured()], {"ours": "other"})
    assert "## ours (stale)" in page
    assert "2030-01-02 (stale)" in page


def test_a_further_case_of_a_method_is_told_by_its_data(tmp_path):
    first, further = measured(), measured()
    further.data = [{"name": "subj", "edition": "subj (real)", "hash": "abc"}]
    recorded.write(first, tmp_path / "ours.json")
    recorded.write(further, tmp_path / "text" / "ours.json")
    page = table.markdown(table.read_all(tmp_path), {"ours": "h1"})
    assert page.index("## ours\n") < page.index("## ours on subj\n")
    assert "| ours on subj | 1 | 0 | 0 |" in page


def test_further_cases_on_the_same_data_are_told_by_their_recipes(tmp_path):
    for name in ("first", "small", "large"):
        case = measured()
        case.data = [{"name": "subj", "edition": "subj (real)", "hash": "abc"}]
        own = "" if name == "first" else f" --recipe recipes/ours-{name}.yaml --seeds 5"
        case.command = f"stillhouse bench ours{own}"
        place = tmp_path if name == "first" else tmp_path / name
        recorded.write(case, place / "ours.json")
    titles = [
        line for line in table.markdown(table.read_all(tmp_path)).splitlines() if "## " in line
    ]
    assert titles == ["## ours", "## ours: large", "## ours: small"]


def test_written_from_a_folder(tmp_path):
    for name in ("zeta", "alpha"):
        recorded.write(measured(name), tmp_path / "results" / f"{name}.json")
    path = table.write(tmp_path / "results", tmp_path / "docs" / "results.md")
    page = path.read_text()
    assert page.index("## alpha") < page.index("## zeta")
    empty = table.write(tmp_path / "nothing", tmp_path / "docs" / "empty.md")
    assert "No results are recorded yet" in empty.read_text()


def test_a_narrow_terminal_breaks_no_figure():
    results = measured("a-method-with-a-long-name")
    for side in results.sides:
        for seed in range(5):
            figures = results.sides[side][str(seed)]
            results.record(side, seed, {**figures, "nll": 0.1 * seed, "ece": 0.01 * seed})
    for width in (60, 80, 160):
        out = io.StringIO()
        show(results, Console(file=out, width=width))
        text = out.getvalue()
        assert "a-method-with-a-long-name" in text
        assert "0.9020 ± 0.0020" in text
        assert ("nll" in text) == (width == 160)


@pytest.mark.parametrize("terminal", [True, False])
def test_shown_on_a_terminal_and_off_it(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    results = measured(note="[bold]not markup[/bold]")
    show(results, console, stale=True)
    text = out.getvalue()
    assert ("\x1b[" in text) == terminal
    for expected in ("supported", "0.9020 ± 0.0020", "accuracy per extra second", "stale"):
        assert expected in text
    assert "[bold]not markup[/bold]" in text
    assert "ours higher than <b>|theirs" in text
