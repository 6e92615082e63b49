from __future__ import annotations

import math

import pytest
import torch

from stillhouse.batch import Splits
from stillhouse.errors import DataError
from stillhouse.metrics.unseen import Unseen
from stillhouse.tasks.classification import Classification


def test_accuracy_on_classes_never_shown_and_on_the_rest():
    metric = Unseen([1, 3])
    target = torch.tensor([0, 1, 1, 2, 3, -100])
    answers = torch.tensor([0, 1, 0, 0, 3, 1])
    logits = torch.nn.functional.one_hot(answers, 4).float()
    metric.update({"logits": logits[:3]}, {"target": target[:3]})
    metric.update({"logits": logits[3:]}, {"target": target[3:]})
    found = metric.compute()
    assert found["unseen_accuracy"] == pytest.approx(2 / 3)
    assert found["seen_accuracy"] == pytest.approx(1 / 2)


def test_without_such_rows_there_is_no_figure():
    metric = Unseen([1])
    metric.update({"logits": torch.eye(2)[:1]}, {"target": torch.tensor([0])})
    assert math.isnan(metric.compute()["unseen_accuracy"])
    with pytest.raises(DataError, match="unseen"):
        Unseen([])


def test_the_task_measures_it_where_the_data_says_so():
    plain = Classification(Splits({}, "data", {"classes": ["a", "b"]}))
    told = Classification(Splits({}, "data", {"classes": ["a", "b"], "unseen": [1]}))
    assert "unseen" not in plain.metrics()
    assert told.metrics()["unseen"].classes == (1,)
