from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.classification import Accuracy, Confusion

LOGITS = torch.tensor(
    [
        [3.0, 2.0, 1.0, 0.0],  # label 0: first
        [3.0, 2.0, 1.0, 0.0],  # label 1: second
        [3.0, 2.0, 1.0, 0.0],  # label 3: fourth
        [0.0, 0.0, 9.0, 0.0],  # label 2: first
    ]
)
TARGET = torch.tensor([0, 1, 3, 2])


def test_accuracy_by_hand():
    metric = Accuracy(top=(1, 2, 3, 5))
    metric.update({"logits": LOGITS}, {"target": TARGET})
    # top 5 of 4 classes is right by definition and says nothing
    assert metric.compute() == {"accuracy": 0.5, "top2": 0.75, "top3": 0.75}
    assert metric.higher_is_better


def test_batches_and_processes_add_up():
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(101, 7, generator=rng)
    target = torch.randint(0, 7, (101,), generator=rng)
    for make in (Accuracy, lambda: Confusion(7)):
        whole, first, second = make(), make(), make()
        whole.update({"logits": logits}, {"target": target})
        for part, metric in (
            (slice(0, 40), first),
            (slice(40, 60), first),
            (slice(60, 101), second),
        ):
            metric.update({"logits": logits[part]}, {"target": target[part]})
        first.take(first.totals() + second.totals())
        assert first.compute() == whole.compute()
    expected = float((logits.argmax(1) == target).float().mean())
    metric = Accuracy()
    metric.update({"logits": logits}, {"target": target})
    assert metric.compute()["accuracy"] == pytest.approx(expected)
    top5 = float((logits.topk(5).indices == target[:, None]).any(1).float().mean())
    assert metric.compute()["top5"] == pytest.approx(top5)


def test_a_process_without_a_batch_adds_nothing():
    seen, unseen = Accuracy(), Accuracy()
    seen.update({"logits": LOGITS}, {"target": TARGET})
    alone = seen.compute()
    seen.take(seen.totals() + unseen.totals())
    assert seen.compute() == alone


def test_totals_may_be_reduced_in_place_after_inference_mode():
    metric = Accuracy()
    with torch.inference_mode():
        metric.update({"logits": LOGITS}, {"target": TARGET})
    totals = metric.totals()
    totals.mul_(2)
    assert metric.compute()["accuracy"] == 0.5
    metric.take(totals)
    assert metric.compute()["accuracy"] == 0.5


def test_ties_and_nan_are_never_right():
    metric = Accuracy(top=(1,))
    metric.update({"logits": torch.zeros(4, 3)}, {"target": torch.tensor([0, 1, 2, 0])})
    assert metric.compute()["accuracy"] == 0.0
    metric = Accuracy(top=(1,))
    metric.update({"logits": torch.full((2, 3), math.nan)}, {"target": torch.tensor([0, 1])})
    assert metric.compute()["accuracy"] == 0.0


def test_unlabelled_and_masked_rows_do_not_count():
    logits = torch.tensor([[[2.0, 1.0], [1.0, 2.0], [5.0, 0.0]]])
    target = torch.tensor([[0, 0, -100]])
    metric = Accuracy(top=(1,))
    metric.update({"logits": logits}, {"target": target})
    assert metric.compute() == {"accuracy": 0.5}
    metric = Accuracy(top=(1,))
    mask = torch.tensor([[True, False, True]])
    metric.update({"logits": logits}, {"target": target, "mask": mask})
    assert metric.compute() == {"accuracy": 1.0}


def test_soft_labels_count_by_their_largest():
    metric = Accuracy(top=(1,))
    metric.update(
        {"logits": torch.tensor([[2.0, 1.0], [2.0, 1.0]])},
        {"target": torch.tensor([[0.9, 0.1], [0.2, 0.8]])},
    )
    assert metric.compute() == {"accuracy": 0.5}


def test_nothing_seen_is_nan():
    assert math.isnan(Accuracy().compute()["accuracy"])
    assert math.isnan(Confusion(3).compute()["macro_f1"])


def test_confusion_and_macro_f1_by_hand():
    metric = Confusion(3, labels=["a", "b", "c"])
    answers = torch.tensor([0, 0, 1, 1, 1, 0])
    truth = torch.tensor([0, 0, 0, 1, 1, 1])
    metric.update({"logits": torch.eye(3)[answers]}, {"target": truth})
    assert metric.matrix() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    # class c neither occurs nor is answered: F1 of a and b is 2*2/(3+3)
    assert metric.compute() == {"macro_f1": pytest.approx(2 / 3)}
    assert metric.record()["labels"] == ["a", "b", "c"]


def test_macro_f1_equals_scikit_learn():
    from sklearn.metrics import confusion_matrix, f1_score

    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 5, generator=rng)
    truth = torch.randint(0, 5, (200,), generator=rng)
    metric = Confusion(5)
    metric.update({"logits": logits}, {"target": truth})
    answers = logits.argmax(1).numpy()
    assert metric.compute()["macro_f1"] == pytest.approx(
        f1_score(truth.numpy(), answers, average="macro")
    )
    assert metric.matrix() == confusion_matrix(truth.numpy(), answers).tolist()


@pytest.mark.parametrize("label", [4, -1, 99])
def test_labels_out_of_range_are_told(label):
    target = torch.tensor([0, 1, 3, label])
    for metric in (Accuracy(), Confusion(4)):
        metric.update({"logits": LOGITS}, {"target": target})
        with pytest.raises(DataError, match="1 rows carry a label"):
            metric.compute()


def test_shapes_that_do_not_fit_are_told_with_both():
    with pytest.raises(DataError, match=r"\(4, 4\).*\(3,\)"):
        Accuracy().update({"logits": LOGITS}, {"target": TARGET[:3]})
    with pytest.raises(DataError, match="4 classes, where 5"):
        Confusion(5).update({"logits": LOGITS}, {"target": TARGET})
    with pytest.raises(DataError, match="two classes"):
        Confusion(1)
    with pytest.raises(DataError, match="2 names for 3"):
        Confusion(3, labels=["a", "b"])
    with pytest.raises(DataError, match="k >= 1"):
        Accuracy(top=(0,))
    with pytest.raises(DataError, match="sums"):
        Accuracy().take(torch.zeros(99))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_sums_stay_on_the_device():
    metric = Accuracy()
    metric.update({"logits": LOGITS.cuda()}, {"target": TARGET.cuda()})
    assert metric.totals().is_cuda
