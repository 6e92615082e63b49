from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.segmentation import (
    SegmentationIoU,
    iou,
    label_maps,
    mean_iou,
    near_borders,
)


def strips(*classes: int, width: int = 10) -> torch.Tensor:
    """(1, 8, ...): vertical strips of these classes."""
    row = torch.tensor([c for c in classes for _ in range(width)])
    return row.expand(1, 8, len(row)).clone()


def brute(labels: torch.Tensor, width: int) -> torch.Tensor:
    found = torch.zeros_like(labels, dtype=torch.bool)
    rows, height, across = labels.shape
    for b in range(rows):
        for y in range(height):
            for x in range(across):
                near = labels[
                    b, max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1
                ]
                own = labels[b, y, x]
                found[b, y, x] = own != 255 and bool(((near != own) & (near != 255)).any())
    return found


def test_near_borders_is_what_it_says():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 4, 5), generator=rng).repeat_interleave(3, 1)
    labels = labels.repeat_interleave(3, 2)
    labels[:, 3:7, 5:9] = 255
    for width in (1, 2, 4):
        assert torch.equal(near_borders(labels, width), brute(labels, width))
    assert near_borders(strips(0, 1), 2)[0, 0].nonzero()[:, 0].tolist() == [8, 9, 10, 11]
    assert near_borders(strips(0, 255), 3).sum() == 0
    assert near_borders(strips(0, 255, 0), 20).sum() == 0
    assert near_borders(strips(5), 3).sum() == 0


def test_iou_by_hand():
    confusion = torch.tensor([[3, 1, 0], [1, 5, 0], [0, 0, 0]])
    assert iou(confusion)[:2].tolist() == [3 / 5, 5 / 7]
    assert iou(confusion)[2].isnan()  # neither occurs nor is predicted
    assert mean_iou(confusion) == pytest.approx((3 / 5 + 5 / 7) / 2)
    assert mean_iou(torch.zeros(3, 3)) == 0.0
    predicted = torch.tensor([[3, 0, 1], [0, 5, 0], [0, 0, 0]])
    assert iou(predicted)[2] == 0.0  # predicted, never right


def test_a_perfect_map_and_a_shifted_one():
    labels = strips(0, 1, 2)
    perfect = SegmentationIoU(3)
    perfect.compare(labels, labels)
    assert set(perfect.compute().values()) == {1.0}
    shifted = SegmentationIoU(3, widths=(1, 3))
    shifted.compare(labels.roll(1, -1).index_fill(-1, torch.tensor([0]), 0), labels)
    found = shifted.compute()
    assert found["body_miou"] == 1.0
    # within 1 px each border has 2 columns, of which one is wrong
    assert found["trimap_miou_1px"] < found["trimap_miou_3px"] < found["miou"] < 1.0
    confusion = shifted.confusions()["1px"] / 8
    assert confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]


def test_ignored_pixels_do_not_count():
    labels = strips(0, 1)
    labels[:, 4:] = 255
    predicted = strips(0, 1)
    predicted[:, 4:] = 2
    metric = SegmentationIoU(3)
    metric.compare(predicted, labels)
    assert metric.compute()["miou"] == 1.0
    assert metric.confusions()["all"].sum() == 4 * 20


def test_batches_and_processes_add_up():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4, 9, 9), generator=rng)
    predicted = torch.randint(0, 3, (4, 9, 9), generator=rng)
    whole, first, second = (SegmentationIoU(3) for _ in range(3))
    whole.compare(predicted, labels)
    first.compare(predicted[:1], labels[:1])
    second.compare(predicted[1:], labels[1:])
    first.take(first.totals() + second.totals())
    assert first.compute() == whole.compute()


def test_logits_are_enlarged_before_the_class_is_taken():
    logits = torch.tensor([[[[4.0, 0.0]], [[0.0, 2.0]]]])  # (1, 2, 1, 2)
    assert label_maps(logits, (1, 8))[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    metric = SegmentationIoU(2)
    metric.update({"logits": logits}, {"target": torch.tensor([[[0, 0, 0, 0, 0, 1, 1, 1]]])})
    assert metric.compute()["miou"] == 1.0


def test_by_class_and_bad_input():
    metric = SegmentationIoU(2, ["road", "sky"])
    metric.compare(strips(0, 1), strips(0, 1))
    assert metric.by_class() == [("road", 1.0, 1.0), ("sky", 1.0, 1.0)]
    strange = SegmentationIoU(2)
    strange.compare(strips(0, 1), strips(0, 7))
    with pytest.raises(DataError, match="80 pixels carry a label that is no class"):
        strange.compute()
    with pytest.raises(DataError, match="at least 1"):
        SegmentationIoU(2, widths=(0,))
