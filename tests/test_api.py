"""The Python front door: plain modules, plain loaders."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import stillhouse as still
from stillhouse.batch import Batch
from stillhouse.errors import DataError, ModelError, RecipeError, StillhouseError


def rows(count, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=rng)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def network(width, classes=3):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))


def test_three_lines(tmp_path):
    train = DataLoader(rows(96, 0), batch_size=16)
    student = network(4)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = still.distill(
        network(32), student, train, DataLoader(rows(48, 1)), method="kd", epochs=2,
        folder=tmp_path / "run", progress=False,
    )  # fmt: skip
    assert set(result.sides) == {"distilled", "alone", "teacher"}
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())
    result.report()
    reopened = still.load(tmp_path / "run", module=network(4))
    view = torch.randn(5, 6)
    with torch.no_grad():
        ours = result.artifact.module(view)["logits"]
        assert torch.equal(reopened.module(view)["logits"], ours)
    assert reopened.predict([torch.zeros(6)])[0]["class"] in {"0", "1", "2"}
    with pytest.raises(StillhouseError, match="module=your_model"):
        still.load(tmp_path / "run")


def test_the_same_call_goes_on_where_it_was(tmp_path):
    def call():
        torch.manual_seed(0)  # the models are the caller's
        return still.distill(
            network(32), network(4), rows(64, 0), rows(32, 1), method="kd", steps=6, batch=16,
            folder=tmp_path, progress=False, compare=(),
        )  # fmt: skip

    first, second = call(), call()
    assert first.sides == second.sides
    states = first.artifact.module.state_dict(), second.artifact.module.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"student": network(4, classes=5)}, ModelError, "5 outputs.*3 classes"),
        ({"teacher": network(4, classes=4)}, StillhouseError, "4.*3"),
        ({"method": "kdd"}, RecipeError, "'kd'"),
        ({"settings": {"temprature": 2.0}}, RecipeError, "temperature"),
        ({"settings": {"alpha": 2.0}}, RecipeError, "alpha"),
        ({"epohcs": 3}, RecipeError, "epochs"),
        ({"val": None}, DataError, "val or test"),
    ],
)
def test_what_does_not_fit_is_told_before_training(tmp_path, changes, error, words):
    call = {
        "teacher": network(8), "student": network(4), "train": rows(32, 0), "val": rows(16, 1),
        "method": "kd", "folder": tmp_path, "progress": False,
    }  # fmt: skip
    with pytest.raises(error, match=f"(?s){words}"):
        still.distill(**{**call, **changes})
    assert not list(tmp_path.rglob("step-*.state"))


def test_empty_and_iterable_data_are_told(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    class Empty(Dataset):
        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

    for data, words in ((Stream(), "map-style"), (Empty(), "empty")):
        with pytest.raises(DataError, match=words):
            still.distill(network(8), network(4), data, rows(8, 0), folder=tmp_path)


def test_an_objective_in_a_plain_loop():
    big, small = network(16), network(4)
    teacher = still.teacher(big)
    objective = still.objective("kd", small, teacher=teacher, classes=3, temperature=2.0)
    x, y = rows(16, 0).tensors
    terms = objective.terms(Batch(x=x, target=y), teacher)
    assert set(terms) == {"task", "logits"}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in big.parameters())
    assert objective.export().module is small


def test_a_method_of_stages_has_no_single_objective():
    with pytest.raises(RecipeError, match="sequence of stages"):
        still.objective("datadam", network(4), classes=3)


def test_no_artifact_is_told(tmp_path):
    with pytest.raises(StillhouseError, match=r"artifact\.json is missing"):
        still.load(tmp_path)
