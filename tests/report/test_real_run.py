from __future__ import annotations

import pytest

from stillhouse import catalogue, launch, report
from stillhouse.recipe import load_recipe
from stillhouse.report.sections import make_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = load_recipe(
        {**catalogue.load("kd").example(0), "seeds": 2, "compare": ["supervised"]},
        ["budget.validate_every=2", "budget.steps=8", "output.log_every=2"],
    )
    folder = tmp_path_factory.mktemp("real") / "run"
    launch.run(recipe, folder=folder, progress=False)
    return folder


def test_the_report_of_a_real_run_is_complete(finished):
    assert (finished / "report.html").is_file()
    found = make_report(finished)
    assert found.finished
    assert [c.name for c in found.columns] == ["teacher", "student alone", "student distilled"]
    assert found.results[0][0] == "accuracy"
    assert all("±" in cell for cell in found.results[0][1][1:])
    assert found.confusion.rows == 32
    assert found.calibration
    assert found.agreement
    assert {row[0] for row in found.sizes.rows} >= {"parameters", "size", "MACs per input"}
    (student,) = [g for g in found.curves if g.title == "student"]
    charts = {c.title: [line.name for line in c.lines] for c in student.charts}
    assert charts["loss terms"] == ["task", "logits", "loss"]
    assert charts["validation: accuracy"] == ["distilled", "alone"]
    assert any("by step" in text or "did not reach" in text for text in found.findings)
    assert "simulated" in dict(found.about)["data"]
    (warning,) = found.warnings
    assert "knows nothing" in warning  # the example's teacher is not trained


def test_it_can_be_written_again_and_is_equal(finished):
    before = (finished / "report.html").read_text()
    report.write(finished)
    assert (finished / "report.html").read_text() == before
