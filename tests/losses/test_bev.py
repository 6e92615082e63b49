from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.losses.bev import (
    box_response,
    centre_focal,
    class_response,
    heat_distance,
    masked_features,
    masked_mean,
)
from stillhouse.losses.features import absolute_by_item
from stillhouse.losses.relations import gram


def maps(seed=0, channels=3):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, 5, 6, generator=rng).double() for _ in range(2)]


def mask(seed=1):
    found = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(seed)).double()
    return found * (found > 0.5)


def test_only_masked_cells_count():
    student, teacher = maps()
    weight = mask()
    changed = torch.where(weight[:, None] == 0, student + 5, student)
    losses = (masked_features, box_response, heat_distance, class_response)
    for loss in losses:
        assert loss(student, teacher, weight) == loss(changed, teacher, weight)
        elsewhere = torch.where(weight[:, None] > 0, student + 5, student)
        assert loss(student, teacher, weight) != loss(elsewhere, teacher, weight)


def test_no_mask_is_the_plain_mean():
    student, teacher = maps()
    torch.testing.assert_close(
        masked_features(student, teacher, None), (student - teacher).square().mean()
    )
    ones = torch.ones(2, 5, 6).double()
    torch.testing.assert_close(
        masked_features(student, teacher, ones, eps=0.0), (student - teacher).square().mean()
    )


def test_an_empty_mask_gives_nothing_and_a_finite_gradient():
    student, teacher = maps()
    student.requires_grad_()
    nothing = torch.zeros(2, 5, 6).double()
    loss = box_response(student, teacher, nothing) + class_response(student, teacher, nothing)
    loss.backward()
    assert loss.detach() == 0
    assert (student.grad == 0).all()


def test_equals_differ_by_the_temperature_only():
    student, _ = maps()
    weight = mask()
    assert class_response(student, student, weight, teacher_temperature=1.0) == 0
    assert class_response(student, student, weight, teacher_temperature=2.0) > 0
    assert box_response(student, student, weight) == 0


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps()
    student.requires_grad_()
    teacher.requires_grad_()
    weight = mask()
    for loss in (masked_features, box_response, heat_distance, class_response):
        loss(student, teacher, weight).backward()
    absolute_by_item(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_the_class_response_takes_the_largest_class():
    student, teacher = maps()
    wanted = (student.sigmoid().amax(1) - (teacher / 2).sigmoid().amax(1)).abs()
    torch.testing.assert_close(
        class_response(student, teacher, mask()), masked_mean(wanted, mask())
    )
    # Other numbers of classes are no obstacle, other grids are.
    assert class_response(student, teacher[:, :2], mask()) > 0
    with pytest.raises(ModelError, match="grids"):
        class_response(student, teacher[..., :4], mask())


def test_an_item_weighs_the_same_whatever_its_size():
    student = torch.zeros(2, 9, 4).double()
    teacher = torch.ones(2, 9, 4).double()
    torch.testing.assert_close(
        absolute_by_item(student, teacher, eps=0.0), torch.tensor(1.0).double()
    )
    twice = absolute_by_item(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), eps=0.0)
    torch.testing.assert_close(twice, torch.tensor(1.0).double())
    assert absolute_by_item(student[:0], teacher[:0]) == 0
    with pytest.raises(ModelError, match="projection"):
        absolute_by_item(student, teacher[..., :3])


def test_gram_is_symmetric_with_ones_on_the_diagonal():
    vectors = maps()[0].flatten(2)
    found = gram(vectors, eps=0.0)
    torch.testing.assert_close(found, found.transpose(-1, -2))
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), torch.ones(2, 3).double())
    assert found.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(gram(7.5 * vectors), gram(vectors), rtol=0, atol=1e-4)
    zero = torch.zeros(1, 3, 4, requires_grad=True)
    gram(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_focal_loss_by_its_formula():
    logits = torch.tensor([[[[0.3, -1.0]]]]).double()
    heat = torch.tensor([[[[1.0, 0.6]]]]).double()
    p = logits.sigmoid().flatten()
    wanted = -((1 - p[0]) ** 2) * p[0].log() - 0.4**4 * p[1] ** 2 * (1 - p[1]).log()
    torch.testing.assert_close(centre_focal(logits, heat).double(), wanted[None], rtol=1e-6, atol=0)
