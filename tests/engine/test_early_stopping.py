"""Early stopping: when a training ends, which state is kept, what a recipe without it hashes to."""

from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Batch
from stillhouse.engine.job import Best
from stillhouse.launch import open_job
from stillhouse.recipe import BudgetSpec, load_recipe
from stillhouse.stages.supervised import Supervised

SCORES = [0.2, 0.5, 0.4, 0.5, 0.3, 0.3, 0.3, 0.9]


def trained(folder, keep, scores=SCORES):
    recipe = load_recipe(
        {
            "method": "supervised", "data": "generated",
            "student": {"model": "stillhouse:mlp", "options": {"widths": [4]}},
            "budget": {"steps": len(scores), "batch": 16, "lr": 0.05},
        }
    )  # fmt: skip
    job = open_job(recipe, folder)
    told = iter(scores)
    objective = Supervised(job.student(), job.task)
    return job.fit(
        "student", objective, job.order(), keep=keep, validate_every=1,
        validate=lambda: {"accuracy": next(told)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "best", "steps"),
    [
        (Best(), 8, 8),
        (Best(patience=2), 2, 6),
        (Best(patience=3), 2, 7),
        (Best(patience=3, latest=True), 4, 7),
        (Best(patience=4, latest=True), 8, 8),
    ],
)
def test_when_it_ends_and_what_is_kept(tmp_path, keep, best, steps):
    fit = trained(tmp_path, keep)
    assert (fit.best_step, fit.steps) == (best, steps)
    assert fit.scores["accuracy"] == SCORES[best - 1]
    assert bool(fit.stopped) == (steps < len(SCORES))


def test_the_finished_stage_tells_the_same(tmp_path):
    first = trained(tmp_path, Best(patience=2))
    again = trained(tmp_path, Best(patience=2))
    assert (again.best_step, again.steps, again.stopped) == (
        first.best_step, first.steps, first.stopped,
    )  # fmt: skip


def test_lower_may_be_better(tmp_path, monkeypatch):
    from stillhouse.tasks.classification import Classification

    monkeypatch.setattr(Classification, "higher_is_better", False)
    fit = trained(tmp_path, Best(patience=2, latest=True), [3.0, 1.0, 2.0, 1.0, 4.0, 4.0, 0.0])
    assert (fit.best_step, fit.steps) == (4, 6)


def test_budgets_without_patience_are_written_as_before():
    assert "patience" not in BudgetSpec(steps=3).model_dump()
    kept = BudgetSpec(steps=3, select="best", patience=5)
    assert kept.model_dump()["patience"] == 5
    assert BudgetSpec(**kept.model_dump()) == kept


def test_the_count_of_supervised_training_is_the_tasks(tmp_path):
    recipe = load_recipe(
        {
            "method": "supervised", "task": "node-classification", "data": "generated-graph",
            "student": {"model": "stillhouse:node_mlp", "options": {"width": 4}},
        }
    )  # fmt: skip
    job = open_job(recipe, tmp_path)
    objective = Supervised(job.student(), job.task)
    assert int(objective.count(Batch(target=torch.tensor([1, -100, 0])))) == 2
