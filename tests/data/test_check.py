from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Splits, Subset, TensorSource
from stillhouse.data import check
from stillhouse.data.check import check_finite, check_labels, check_splits
from stillhouse.errors import DataError


def splits(x=None, target=None, *, classes=3, **more):
    x = torch.rand(30, 4) if x is None else x
    target = torch.arange(len(x)) % 3 if target is None else target
    train = TensorSource({"x": x, "target": target})
    return Splits(
        {"train": train, **more}, "toys (v1)", {"classes": [str(c) for c in range(classes)]}
    )


def test_sound_data_passes():
    check_splits(splits())
    check_splits(splits(torch.zeros(30, 3, 2, 2, dtype=torch.uint8)))


def test_labels_out_of_range_are_told_with_data_split_and_row():
    target = torch.arange(30) % 3
    target[17] = 3
    with pytest.raises(DataError, match=r"toys \(v1\), split 'train', row 17: the label 3 is out"):
        check_splits(splits(target=target))
    target[17] = -1
    with pytest.raises(DataError, match="row 17: the label -1"):
        check_splits(splits(target=target))


def test_the_test_split_is_checked_too():
    test = TensorSource({"x": torch.rand(4, 4), "target": torch.tensor([0, 1, 2, 7])})
    with pytest.raises(DataError, match="split 'test', row 3: the label 7"):
        check_splits(splits(test=test))


def test_one_class_is_refused_in_train_only():
    with pytest.raises(DataError, match="all 30 labels are 1; at least two"):
        check_splits(splits(target=torch.ones(30, dtype=torch.int64)))
    one = TensorSource({"x": torch.rand(4, 4), "target": torch.zeros(4, dtype=torch.int64)})
    check_splits(splits(val=one))


@pytest.mark.parametrize("target", [torch.rand(30), torch.ones(30, 2, dtype=torch.int64)])
def test_targets_that_are_no_classes_are_refused_where_classes_are_named(target):
    with pytest.raises(DataError, match="split 'train': no class labels"):
        check_splits(splits(target=target))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_told_with_their_row(bad):
    x = torch.rand(30, 4)
    x[11, 2] = bad
    with pytest.raises(DataError, match=f"split 'train', view 'x', row 11: holds {bad}"):
        check_splits(splits(x))


def test_rows_are_those_of_the_split_not_of_the_source():
    x = torch.rand(30, 4)
    x[11, 2] = float("nan")
    source = TensorSource({"x": x, "target": torch.arange(30) % 3})
    check_splits(Splits({"train": Subset(source, torch.arange(11))}))
    with pytest.raises(DataError, match="row 1: holds nan"):
        check_splits(Splits({"train": Subset(source, torch.arange(10, 20))}))


def test_large_data_is_looked_at_by_a_sample(monkeypatch):
    monkeypatch.setattr(check, "_WHOLE", 100)
    value = torch.zeros(5000, 4)
    value[4999] = float("nan")
    with pytest.raises(DataError, match="row 4999: holds nan"):
        check_finite(value, "toys")
    value[4999], value[1] = 0.0, float("nan")
    check_finite(value, "toys")  # row 1 is not in the sample of 512


class Lazy:
    fingerprint = "lazy"
    targets = torch.tensor([0, 1, 0, 1])

    def __init__(self, fails: bool = False, length: int = 4) -> None:
        self.fails, self.length = fails, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item):
        if self.fails:
            raise ValueError("half a file")
        return {"x": torch.full((2,), float("nan")), "target": self.targets[item[0]]}


def test_lazy_sources_are_read_a_little():
    with pytest.raises(DataError, match="split 'train', view 'x', row 0: holds nan"):
        check_splits(Splits({"train": Lazy()}))
    with pytest.raises(DataError, match="first rows cannot be read: ValueError: half a file"):
        check_splits(Splits({"train": Lazy(fails=True)}))
    with pytest.raises(DataError, match="split 'train': it is empty"):
        check_splits(Splits({"train": Lazy(length=0)}))


def test_missing_labels():
    with pytest.raises(DataError, match="toys: no class labels"):
        check_labels(None, 3, "toys")


def test_complex_numbers_are_refused():
    with pytest.raises(DataError, match="complex"):
        check_splits(splits(torch.zeros(30, 2, dtype=torch.complex64)))
