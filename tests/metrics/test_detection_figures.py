"""Average precision: hand examples, a plain reference, sizes, crowds, several processes."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.metrics.detection import Detections, average_precision, matched
from stillhouse.parts.boxes import areas, iou


def scene(seed: int, classes: int = 3):
    """Some true boxes, and detections near and far from them."""
    rng = torch.Generator().manual_seed(seed)
    true = torch.rand(6, 2, generator=rng) * 70
    true = torch.cat([true, true + 6 + torch.rand(6, 2, generator=rng) * 24], 1)
    near = true.repeat(2, 1) + torch.randn(12, 4, generator=rng) * 2.5
    far = torch.rand(5, 2, generator=rng) * 70
    far = torch.cat([far, far + 8 + torch.rand(5, 2, generator=rng) * 20], 1)
    kinds = torch.randint(0, classes, (6,), generator=rng)
    boxes = torch.cat([near, far])
    labels = torch.cat([kinds.repeat(2), torch.randint(0, classes, (5,), generator=rng)])
    return boxes, torch.rand(17, generator=rng), labels, true, kinds


def reference(images, kind: int, low: float = 0.0, high: float = math.inf) -> float:
    """Average precision written out: greedy, image by image, COCO's rule for sizes."""
    rows = []
    positives = 0
    for boxes, scores, labels, true, kinds in images:
        real = true[kinds == kind]
        counted = (areas(real) >= low) & (areas(real) < high)
        positives += int(counted.sum())
        taken: set[int] = set()
        own = [i for i in range(len(boxes)) if labels[i] == kind]
        for i in sorted(own, key=lambda i: -float(scores[i])):
            candidates = []
            for j in range(len(real)):
                overlap = float(iou(boxes[i : i + 1], real[j : j + 1]))
                if j not in taken and overlap >= 0.5:
                    candidates.append((bool(counted[j]), overlap, j))
            if candidates:
                asked, _, j = max(candidates)
                taken.add(j)
                if asked:
                    rows.append((float(scores[i]), True))
            elif low <= float(areas(boxes[i : i + 1])) < high:
                rows.append((float(scores[i]), False))
    if positives == 0:
        return math.nan
    rows.sort(key=lambda row: -row[0])
    area, last, right = 0.0, 0.0, 0
    precision, recall = [], []
    for number, (_, hit) in enumerate(rows, 1):
        right += hit
        precision.append(right / number)
        recall.append(right / positives)
    for i in range(len(rows)):
        area += (recall[i] - last) * max(precision[i:])
        last = recall[i]
    return area


@pytest.mark.parametrize("seed", [0, 7])
def test_figures_are_those_of_the_reference_by_class_and_size(seed):
    images = [scene(seed + n) for n in range(5)]
    metric = Detections(3, sizes=(15.0, 24.0))
    for boxes, scores, labels, true, kinds in images:
        metric.add(boxes, scores, labels, true, kinds)
    limits = {"all": (-1, math.inf), "small": (-1, 225), "medium": (225, 576),
              "large": (576, math.inf)}  # fmt: skip
    for size, (low, high) in limits.items():
        wanted = [reference(images, kind, low, high) for kind in range(3)]
        found = metric.by_class(size)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), equal_nan=True)


def test_rules_on_a_hand_example():
    # right, wrong, right of 4 true boxes: precision 1 at recall .25, 2/3 at recall .5
    scores, hits = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])
    assert average_precision(scores, hits, 4) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(scores, hits, 4, "voc11") == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert average_precision(scores, hits, 4, "coco101") == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert math.isnan(average_precision(scores, hits, 0))
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) == 0


def test_the_second_detection_of_an_object_is_wrong_unless_it_is_a_crowd():
    true = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    boxes = torch.tensor([[0.0, 0.0, 20.0, 19.0], [0.0, 0.0, 20.0, 20.0], [1.0, 1.0, 6.0, 6.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    found, skipped = matched(boxes, scores, true)
    assert found.tolist() == [0, -1, -1]
    crowd = torch.tensor([True])
    found, skipped = matched(boxes, scores, true, ignored=crowd, crowd=crowd)
    assert found.tolist() == [0, 0, 0]
    assert skipped.all()


def test_misses_and_false_alarms_count_confident_detections_only():
    true = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 90.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 88.0], [20.0, 0.0, 30.0, 9.0]])
    metric = Detections(1, sizes=(20.0, 60.0))
    kinds = torch.zeros(2, dtype=torch.int64)
    metric.add(boxes, torch.tensor([0.4, 0.9, 0.6]), torch.zeros(3, dtype=torch.int64), true, kinds)
    figures = metric.compute()
    assert figures["missed"] == 1
    assert figures["missed_small"] == 1
    assert figures["recall"] == 0.5
    assert figures["recall_small"] == 0
    assert figures["false_alarms"] == 1
    assert figures["ap50"] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_novel_classes_are_judged_apart():
    metric = Detections(2, novel=[1])
    box = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    one = torch.ones(1)
    for kind, shift in ((0, 0.0), (1, 100.0)):
        label = torch.tensor([kind])
        metric.add(box, one, label, box + shift, label)
    figures = metric.compute()
    assert (figures["ap50_base"], figures["ap50_novel"], figures["ap50"]) == (1.0, 0.0, 0.5)


def test_processes_add_up_to_nearly_the_same():
    images = [scene(n) for n in range(6)]
    whole, parts = Detections(3), [Detections(3), Detections(3)]
    for number, image in enumerate(images):
        for metric in (whole, parts[number % 2]):
            metric.add(*image)
    both = Detections(3)
    both.take(parts[0].totals() + parts[1].totals())
    for name, value in whole.compute().items():
        if not math.isnan(value):
            assert both.compute()[name] == pytest.approx(value, abs=5e-3), name
