"""Losses of detectors: hand values, torchvision's own, and the edges of probability."""

from __future__ import annotations

import pytest
import torch

from stillhouse.losses.detection import asymmetric, fast_rcnn, feature_distance, foreground_kl


def test_the_hand_value_of_the_sheet():
    found = foreground_kl(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([0.3053138]), rtol=0, atol=2e-7)


def test_a_student_that_agrees_and_knows_no_background_costs_nothing():
    teacher = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    student = torch.cat([teacher, torch.tensor([[-40.0]], dtype=torch.float64)], 1)
    assert abs(float(foreground_kl(student, teacher))) < 5e-8


def test_probabilities_of_nothing_give_no_nan():
    student = torch.tensor([[300.0, -300.0, 0.0, 5.0]], requires_grad=True)
    teacher = torch.tensor([[-300.0, 300.0, float("-inf")]])
    loss = foreground_kl(student, teacher).sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(600.0))
    assert torch.isfinite(student.grad).all()


def test_no_gradient_reaches_the_teacher():
    teacher = torch.randn(3, 2, requires_grad=True)
    student = torch.randn(3, 3, requires_grad=True)
    foreground_kl(student, teacher).sum().backward()
    assert teacher.grad is None
    p = student.detach().softmax(1)
    q = torch.cat([teacher.detach().softmax(1), torch.full((3, 1), 1e-9)], 1)
    torch.testing.assert_close(student.grad, p * q.sum(1, keepdim=True) - q)


def test_classes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="one class"):
        foreground_kl(torch.zeros(2, 3), torch.zeros(2, 3))


def test_distance_of_features():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    b = torch.tensor([[0.0, 2.0], [2.0, 2.0], [0.0, -1.0]])
    torch.testing.assert_close(feature_distance(a, b), torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("seed", [0, 1])
def test_region_losses_are_torchvisions(seed):
    heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    torch.manual_seed(seed)
    classes = 4
    logits, deltas = torch.randn(12, classes + 1), torch.randn(12, 4 * classes)
    labels, targets = torch.randint(0, classes + 1, (12,)), torch.randn(12, 4)
    found = fast_rcnn(logits, deltas, labels, targets)
    first = torch.cat([logits[:, -1:], logits[:, :-1]], 1)
    theirs = torch.where(labels == classes, 0, labels + 1)
    slots = torch.cat([torch.zeros(12, 4), deltas], 1)
    reference = heads.fastrcnn_loss(first, slots, [theirs], [targets])
    torch.testing.assert_close(torch.stack(found), torch.stack(reference))


def test_regions_without_an_object_and_deltas_of_all_classes():
    logits, deltas = torch.randn(5, 3), torch.randn(5, 4, requires_grad=True)
    _, box = fast_rcnn(logits, deltas, torch.full((5,), 2), torch.full((5, 4), float("nan")))
    assert box == 0
    labels = torch.tensor([0, 1, 2, 2, 0])
    _, box = fast_rcnn(logits, deltas, labels, deltas.detach() + 1.0)
    torch.testing.assert_close(box.detach(), torch.tensor(3 * 4 * (1 - 1 / 18) / 5))


@pytest.mark.parametrize(
    ("p", "y", "wanted"),
    [(0.5, 0, 0.0245151), (0.5, 1, 0.6931472), (0.04, 0, 0.0), (0.9, 0, 0.9903085)],
)
def test_asymmetric_values_of_the_sheet(p, y, wanted):
    logit = torch.logit(torch.tensor([p], dtype=torch.float64)).float()
    found = asymmetric(logit, torch.tensor([float(y)]))
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-6, atol=2e-7)


def test_a_class_that_is_ruled_out_costs_nothing():
    logits = torch.tensor([float("-inf"), 0.0], requires_grad=True)
    loss = asymmetric(logits, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(loss.detach(), torch.tensor(0.6931472 / 2))
