"""FitNet and RKD: terms on the embeddings beside soft targets."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse import catalogue
from stillhouse.batch import read_rows
from stillhouse.errors import RecipeError
from stillhouse.launch import open_job
from stillhouse.losses.logits import kl
from stillhouse.losses.relations import rkd_angle, rkd_distance
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method


def opened(entry, folder, **changes):
    chosen = load_recipe({**catalogue.load(entry).example(0), "compare": [], **changes})
    job = open_job(chosen, folder)
    teacher = job.teacher()
    objective = open_method(chosen).objective(job, job.student(), teacher)
    teacher.bind(objective.wants, job.task)
    batch = read_rows(job.splits["train"], torch.arange(9), None)
    return job, objective, teacher.knowledge(batch), batch


def test_fitnet_leads_the_projected_embedding(tmp_path):
    job, made, known, batch = opened("fitnet", tmp_path, settings={"weight": 3.0, "alpha": 0.25})
    terms = made(batch, known, job.clock("x"))
    out = made.student(batch["x"])
    guided = made.projector(out["taps"]["head:input"])
    assert guided.shape == (9, 16)
    theirs = known.tensor("tap:head:input")
    torch.testing.assert_close(terms["features"], 3 * F.mse_loss(guided, theirs))
    soft = kl(out["logits"], known.tensor("logits"), temperature=4.0)
    torch.testing.assert_close(terms["logits"], 0.25 * soft)
    assert terms.keys() == {"task", "logits", "features"}
    assert made.export() is made.student  # the projection stays behind


def test_rkd_relates_the_rows_of_a_batch(tmp_path):
    job, made, known, batch = opened("rkd", tmp_path, settings={"distance": 2.0, "angle": 5.0})
    terms = made(batch, known, job.clock("x"))
    own = made.student(batch["x"])["taps"]["head:input"]
    theirs = known.tensor("tap:head:input")
    torch.testing.assert_close(terms["relations/distance"], 2 * rkd_distance(own, theirs))
    torch.testing.assert_close(terms["relations/angle"], 5 * rkd_angle(own, theirs))
    few = made(batch.narrow(0, 2), known.narrow(0, 2), job.clock("x"))
    assert few["relations/angle"].item() == 0
    assert made.batchwide


def test_no_relation_at_all_is_refused():
    settings = {"distance": 0.0, "angle": 0.0}
    chosen = load_recipe({**catalogue.load("rkd").example(0), "settings": settings})
    with pytest.raises(RecipeError, match="plain distillation"):
        open_method(chosen)
