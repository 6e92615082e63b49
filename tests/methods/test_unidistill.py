from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError, RecipeError
from stillhouse.launch import open_job, run
from stillhouse.losses.bev import box_response, class_response
from stillhouse.losses.features import absolute_by_item
from stillhouse.losses.relations import gram
from stillhouse.methods.driving.unidistill import (
    PATHS,
    Adapter,
    UniDistillObjective,
    at_nine_points,
)
from stillhouse.opening import open_artifact
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.boxes import ground_corners, nine_points
from stillhouse.parts.centre_maps import gaussian_mask, gaussian_radius
from stillhouse.recipe import load_recipe
from stillhouse.tasks.driving import GridNet
from stillhouse.teacher import Knowledge

UniDistill: Any = catalogue.load("unidistill")
# The vectors' ground: 20 m a side in cells of a metre.
GRID = Grid((-10.0, -10.0, -5.0, 10.0, 10.0, 3.0), (1.0, 1.0))
EPS = 1e-4


def tensors(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    found = {k: torch.from_numpy(np.asarray(v)) for k, v in case.items()}
    return {k: v if v.dtype == torch.bool else v.double() for k, v in found.items()}


def shared(boxes: Tensor, valid: Tensor) -> Tensor:
    return valid & GRID.inside(boxes)


def feature_loss(student, teacher, boxes, valid, **settings):
    ours, theirs = (
        at_nine_points(m, boxes, shared(boxes, valid), GRID, **settings) for m in (student, teacher)
    )
    return absolute_by_item(ours, theirs, eps=EPS)


def relation_loss(student, teacher, boxes, valid, **settings):
    ours, theirs = (
        gram(at_nine_points(m, boxes, shared(boxes, valid), GRID, **settings), eps=EPS)
        for m in (student, teacher)
    )
    return absolute_by_item(ours, theirs, eps=EPS)


def heads(case: dict[str, Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Logits and regression channels of all tasks of a side of the case `response`."""
    tasks = sorted(k for k in case if k.startswith(side) and k.endswith("_hm"))
    return (
        torch.cat([case[k] for k in tasks], 1),
        torch.cat([case[k.replace("_hm", "_reg")] for k in tasks], 1),
    )


def padding(boxes: Tensor) -> Tensor:
    return boxes.abs().sum(-1) > 0


# ----------------------------------------------------------------------------- reference
def test_geometry_is_the_released_one(golden):
    vectors = golden("unidistill")
    case = tensors(vectors.case("geometry"))
    valid = case["valid"]
    found = ground_corners(case["boxes"])
    for ours, theirs in zip(found[valid], case["corners"][valid], strict=True):
        assert torch.cdist(ours[None], theirs[None]).min(-1).values.max() < 1e-10
    torch.testing.assert_close(
        nine_points(case["boxes"])[valid], case["nine"][valid], rtol=0, atol=1e-10
    )
    cells = GRID.cells(case["nine"])
    torch.testing.assert_close(cells[valid], case["nine_cells"][valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "loss"), [("feature", feature_loss), ("relation", relation_loss)])
def test_points_give_the_reference_losses_and_gradients(golden, name, loss):
    vectors = golden("unidistill")
    place, case = tensors(vectors.case("geometry")), tensors(vectors.case(name))
    for form, swap in (("corrected", False), ("official", True)):
        student = case["student"].clone().requires_grad_()
        found = loss(
            student, case["teacher"], place["boxes"], place["valid"], transpose_points=swap
        )
        assert abs(float(found.detach() - case[f"loss_{form}"])) < 1e-7
        found.backward()
        wanted = case[f"grad_student_{form}"]
        torch.testing.assert_close(student.grad, wanted, rtol=1e-5, atol=1e-8)


def test_the_release_samples_at_the_mirror_position(golden):
    case = tensors(golden("unidistill").case("asymmetry"))
    teacher = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    teacher[0, 0, 5, 18] = 1
    valid = torch.ones(1, 1, dtype=torch.bool)
    for form, swap in (("corrected", False), ("official", True)):
        found = feature_loss(
            torch.zeros_like(teacher), teacher, case["box"], valid, transpose_points=swap
        )
        assert abs(float(found - case[f"loss_{form}"])) < 1e-7
    assert case["loss_corrected"] > 0 == case["loss_official"]


def test_the_radius_is_the_released_one(golden):
    case = tensors(golden("unidistill").case("gaussian_radius"))
    length, width = case["sizes"].unbind(-1)
    for overlap in (0.7, 0.5):
        found = gaussian_radius(length, width, overlap)
        wanted = case[f"radius0{round(overlap * 10)}"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_responses_are_the_released_ones(golden):
    case = tensors(golden("unidistill").case("response"))
    boxes = case["boxes"]
    mask = gaussian_mask(boxes, padding(boxes), GRID).double()
    torch.testing.assert_close(mask, case["mask"], rtol=0, atol=1e-6)
    case["s0_hm"].requires_grad_()
    case["s0_reg"].requires_grad_()
    (heat, reg), (heat_t, reg_t) = heads(case, "s"), heads(case, "t")
    settings = {"clamp": 1e-4, "eps": EPS}
    cls = class_response(heat, heat_t, mask, teacher_temperature=2.0, **settings)
    box = box_response(reg, reg_t, mask, eps=EPS)
    assert abs(float(cls - case["loss_cls"])) < 1e-6
    assert abs(float(box - case["loss_reg"])) < 1e-6
    (grad_hm,) = torch.autograd.grad(cls, case["s0_hm"], retain_graph=True)
    (grad_reg,) = torch.autograd.grad(box, case["s0_reg"])
    torch.testing.assert_close(grad_hm, case["grad_cls_s0_hm"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_reg[:1], case["grad_reg_s0"], rtol=1e-5, atol=1e-7)
    even = class_response(heat, heat_t, mask, teacher_temperature=1.0, **settings)
    assert abs(float(even - case["loss_cls_symmetric"])) < 1e-6
    wide = class_response(heat, heat_t, mask, clamp=1e-3, eps=EPS)
    assert abs(float(wide - case["loss_cls_clamp1e3"])) < 1e-6
    own = class_response(heat, heat, mask, **settings)
    assert abs(float(own - case["loss_cls_self"])) < 1e-6
    assert class_response(heat, heat, mask, teacher_temperature=1.0, **settings) == 0


def test_the_four_paths_weigh_the_terms_as_released(golden):
    vectors = golden("unidistill")
    totals = tensors(vectors.case("totals"))["totals"]
    feature = tensors(vectors.case("feature"))["loss_corrected"]
    relation = tensors(vectors.case("relation"))["loss_corrected"]
    case = tensors(vectors.case("response"))
    response = case["loss_cls"] + case["loss_reg"]
    for path, total in zip(PATHS.values(), totals, strict=True):
        found = path.feature * feature + path.relation * relation + path.response * response
        assert abs(float(found - total)) < 1e-7
    vectors.count("shared_boxes")


def test_boxes_outside_and_empty_batches_do_not_count(golden):
    vectors = golden("unidistill")
    case = tensors(vectors.case("empty_and_outside"))
    maps = {name: tensors(vectors.case(name)) for name in ("feature", "relation")}
    losses = {"feature": feature_loss, "relation": relation_loss}
    for name, loss in losses.items():
        student, teacher = (maps[name][side] for side in ("student", "teacher"))
        student.requires_grad_()
        found = loss(student, teacher, case["boxes"], case["valid"])
        assert abs(float(found.detach() - case[f"{name}_drop"])) < 1e-7
        nothing = loss(student, teacher, case["boxes"], torch.zeros_like(case["valid"]))
        assert float(nothing.detach()) == float(case["loss_empty"]) == 0
        nothing.backward()
        assert torch.isfinite(student.grad).all()
