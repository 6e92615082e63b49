from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse.artifact import plain_state
from stillhouse.baselines.linear_probe import LinearProbe
from stillhouse.batch import Splits, TensorSource
from stillhouse.errors import TeacherError
from stillhouse.launch import open_job, run
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import Given, open_method

WORDS = ("red", "green", "blue")


class Reader(nn.Module):
    """A frozen "encoder" of strings, with a linear layer on top; counts its questions."""

    reads = "text"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6)
        self.classifier = nn.Linear(6, 3)
        self.asked = 0

    def forward(self, texts: list[str]) -> Tensor:
        self.asked += len(texts)
        rows = torch.tensor([WORDS.index(text.split()[0]) for text in texts])
        return self.classifier(self.table(rows))


def texts(rows: int = 48) -> Splits:
    target = torch.arange(rows) % 3
    views = {
        "x": (target[:, None] + 3 * torch.arange(4)) % 11 + 1,
        "text": [f"{WORDS[t]} thing" for t in target.tolist()],
        "target": target,
    }
    parts = {part: TensorSource(views, name=part) for part in ("train", "val", "test")}
    return Splits(parts, "colours", {"classes": list(WORDS), "input": {"length": 4}})


def recipe(**changes: Any):
    return load_recipe({**LinearProbe.example(0), "compare": [], **changes})


def trained(chosen: Any, folder: Path, given: Given | None = None):
    job = open_job(chosen, folder, given=given)
    try:
        return open_method(chosen).run(job), job
    finally:
        job.log.close()


def probe(folder: Path, seed: int = 0) -> Any:
    torch.manual_seed(7)
    given = Given(student=Reader(), splits=texts())
    budget = {"steps": 60, "batch": 16, "lr": 0.1, "optimizer": "sgd", "schedule": "constant"}
    chosen = recipe(data={"name": "given"}, student={"model": "given"}, budget=budget, seed=seed)
    artifact, job = trained(chosen, folder, given)
    return artifact.module, job


def test_only_the_head_moves_and_it_learns(tmp_path):
    net, job = probe(tmp_path)
    torch.manual_seed(7)
    fresh = Reader()
    assert torch.equal(net.module.table.weight, fresh.table.weight)
    assert not torch.equal(net.module.classifier.weight, fresh.classifier.weight)
    assert job.evaluate(net, "val")["accuracy"] == 1.0
    assert [(s["name"], s["kind"]) for s in job.stages] == [
        ("capture", "capture"),
        ("head", "train"),
    ]


def test_it_trains_as_the_head_alone_would_on_the_features(tmp_path):
    net, job = probe(tmp_path)
    torch.manual_seed(7)
    twin = Reader()
    data = texts()["train"]
    optimiser = torch.optim.SGD(
        twin.classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
    )
    order, step = job.order("train"), 0
    from stillhouse.clock import generator, seed_of

    seed = seed_of(0, ("head",), "order")
    while step < 60:
        epoch = step // len(order)
        for rows in order.epoch(epoch, lambda epoch=epoch: generator(seed, epoch)):
            batch = data.read(rows, None)
            loss = nn.functional.cross_entropy(twin(batch["text"]), batch["target"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    assert torch.allclose(net.module.classifier.weight, twin.classifier.weight, atol=1e-4)


def test_all_seeds_share_one_store(tmp_path):
    first, _ = probe(tmp_path / "a")
    second, job = probe(tmp_path / "b", seed=1)
    stores = list((Path(os.environ["STILLHOUSE_CACHE"]) / "stores").iterdir())
    assert len(stores) == 1
    assert second.module.asked < 48 <= first.module.asked
    assert [s["name"] for s in job.stages] == ["head"]


def test_a_probe_teaches_a_student_that_reads_another_view(tmp_path):
    """The teacher reads strings, the student token ids of the same rows."""
    spec = {
        "method": "kd",
        "data": {"name": "given"},
        "teacher": {
            "recipe": {
                "method": "linear-probe",
                "student": {"model": f"{__name__}:Reader"},
                "budget": {"steps": 60, "batch": 16, "lr": 0.1, "optimizer": "sgd"},
            },
            "store": True,
        },
        "student": {"model": "stillhouse:text_cnn", "options": {"width": 8, "filters": 8}},
        "settings": {"alpha": 1.0},
        "budget": {"steps": 60, "batch": 16, "lr": 0.01},
        "compare": [],
    }
    result = run(load_recipe(spec), folder=tmp_path, progress=False, given=Given(splits=texts()))
    assert result.sides["teacher"]["0"]["accuracy"] == 1.0
    assert result.sides["distilled"]["0"]["accuracy"] == 1.0
    assert result.summary["details"]["agreement"]
    state = plain_state(result.artifact.module)
    assert "embedding.table.weight" in state


def test_augmented_data_is_refused(tmp_path):
    chosen = recipe(
        data={"name": "digits", "options": {"subset": 60, "augment": "crop"}},
        student={"model": "stillhouse:small_cnn", "options": {"widths": [4]}},
    )
    with pytest.raises(TeacherError, match="augmented anew"):
        trained(chosen, tmp_path)
