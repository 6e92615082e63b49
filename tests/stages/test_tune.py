from __future__ import annotations

import pytest

from stillhouse.errors import RecipeError
from stillhouse.launch import open_job
from stillhouse.recipe import load_recipe
from stillhouse.stages.tune import best_of

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
