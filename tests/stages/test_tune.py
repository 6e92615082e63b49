from __future__ import annotations

from functools import partial

import pytest
import torch

from stillhouse.errors import RecipeError
from stillhouse.launch import open_job
from stillhouse.recipe import load_recipe
from stillhouse.stages.tune import best_of, outputs_of

RECIPE = {
    "method": "supervised",
    "data": {"name": "generated", "options": {"kind": "vectors"}},
    "student": {"model": "stillhouse:mlp", "options": {"widths": [4]}},
}


def test_the_best_point_wins_and_is_not_measured_twice(tmp_path):
    asked = []

    def measure(job, point):
        asked.append(point)
        return -((point - 2.0) ** 2)

    for _ in range(2):
        job = open_job(load_recipe(RECIPE), tmp_path)
        best, table = best_of(job, "scan", [1.0, 2.0, 4.0], measure)
        assert best == 2.0
        assert [row["measure"] for row in table] == [-1.0, 0.0, -4.0]
    assert asked == [1.0, 2.0, 4.0]


def test_the_first_of_equal_points_wins_and_none_is_refused(tmp_path):
    job = open_job(load_recipe(RECIPE), tmp_path)
    assert best_of(job, "scan", [3.0, 1.0], lambda _job, _point: 0.5)[0] == 3.0
    with pytest.raises(RecipeError, match="one point"):
        best_of(job, "other", [], lambda _job, _point: 0.0)


def test_outputs_are_kept_row_by_row(tmp_path):
    job = open_job(load_recipe(RECIPE), tmp_path)
    net = job.student()
    found = outputs_of(job, net, "val", ("logits",))
    source = job.splits["val"]
    with torch.no_grad():
        expected = net(source.views["x"])["logits"]
    torch.testing.assert_close(found["logits"], expected)
    assert torch.equal(found["target"], source.views["target"])
    assert not found["logits"].is_inference()
    # stored as a stage they come back the same
    for _ in range(2):
        again = open_job(load_recipe(RECIPE), tmp_path / "stage")
        kept = again.once("outputs", partial(outputs_of, again, net, "val", ("logits",)))
        torch.testing.assert_close(kept["logits"], expected)
