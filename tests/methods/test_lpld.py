"""LPLD: which boxes are distilled, how, and what the adaptation leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.detection import feature_distance
from stillhouse.models.detector_net import background_first, background_last
from stillhouse.parts.ema import EMA

Lpld: Any = catalogue.load("lpld")
lpld = __import__(Lpld.__module__, fromlist=["low_confidence"])


def tensors(case) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in case.items()}


def chosen(case, **settings):
    return lpld.low_confidence(
        case["proposals"], case["z_teacher"], case["t_deltas"], case["hpl_boxes"], **settings
    )


# ----------------------------------------------------------------------------- reference
@pytest.mark.parametrize("name", ["step0", "step1", "step2"])
def test_the_step_is_the_released_one(golden, name):
    case = tensors(golden("lpld").case(name))
    found = chosen(case)
    assert torch.equal(found.keep, case["keep"])
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.boxes.double(), case["decoded_ref"], **near)
    torch.testing.assert_close(found.overlap.double(), case["max_iou_ref"].double(), **near)
    torch.testing.assert_close(found.peak, case["q_max_ref"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.background, case["bg_prob_ref"], rtol=1e-9, atol=1e-9)
    weight = feature_distance(case["s_feat"].double(), case["t_feat"].double())
    torch.testing.assert_close(weight, case["weight_ref"], rtol=1e-6, atol=1e-6)
    assert bool(case["official_has_term"]) == (len(found.keep) > 0)
    if not len(found.keep):
        return
    keep, classes = found.keep, int(case["num_classes"])
    feature = case["s_feat"].double().requires_grad_(True)
    w = case["s_W"].double().requires_grad_(True)
    z = feature @ w.T + case["s_b"].double()
    torch.testing.assert_close(z.detach(), case["z_student"], rtol=1e-5, atol=1e-5)
    distance = feature_distance(feature, case["t_feat"].double())
    loss = lpld.low_loss(z[keep], case["z_teacher"][keep, :classes], distance[keep])
    loss.backward()
    value = loss.detach()
    torch.testing.assert_close(value, case["loss_ref"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(value.float(), case["loss_official"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        feature.grad.float(), case["g_student_feat_mean"], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(w.grad.float(), case["g_s_W"], rtol=1e-4, atol=1e-6)
    logits = case["z_student"].clone().requires_grad_(True)
    lpld.low_loss(
        logits[keep], case["z_teacher"][keep, :classes], case["weight_ref"][keep]
    ).backward()
    torch.testing.assert_close(logits.grad, case["g_z_student"], rtol=1e-6, atol=1e-6)


def test_the_divergence_is_the_released_one(golden):
    case = tensors(golden("lpld").case("kl"))
    student = case["student_logits"].requires_grad_(True)
    loss = lpld.low_loss(student, case["teacher_fg_logits"], case["weight"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(student.grad, case["g_student"], rtol=1e-9, atol=1e-9)
    plain = lpld.low_loss(student.detach(), case["teacher_fg_logits"])
    torch.testing.assert_close(plain, case["loss_no_weight"], rtol=1e-9, atol=1e-9)


def test_probabilities_that_underflow_give_the_corrected_value(golden):
    case = tensors(golden("lpld").case("kl_extreme"))
    assert not torch.isfinite(case["loss_official_float32"])
    student = case["student_logits"].requires_grad_(True)
    loss = lpld.low_loss(student, case["teacher_fg_logits"])
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), case["loss_corrected"], rtol=1e-4, atol=0)
    assert torch.isfinite(student.grad).all()


def test_a_background_that_comes_first_gives_the_same_step(golden):
    vectors = golden("lpld")
    first, case = tensors(vectors.case("bg_first")), tensors(vectors.case("step0"))
    turned = {**case, "z_teacher": background_last(first["z_teacher"])}
    assert torch.equal(turned["z_teacher"], case["z_teacher"])
    assert torch.equal(background_first(case["z_student"]), first["z_student"])
    keep = chosen(turned).keep
    assert torch.equal(keep, case["keep"])
    z = background_last(first["z_student"])
    classes = int(case["num_classes"])
    loss = lpld.low_loss(z[keep], turned["z_teacher"][keep, :classes], case["weight_ref"][keep])
    torch.testing.assert_close(loss, case["loss_ref"].double(), rtol=1e-6, atol=1e-9)


class LinearAndNorm(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.l = nn.Linear(columns, rows)
        self.bn = nn.BatchNorm1d(rows)


@pytest.mark.parametrize("truncate", [True, False])
def test_the_average_moves_as_released(golden, truncate):
    case = tensors(golden("lpld").case("ema"))
    state = {
        role: {k.partition(".")[2]: v for k, v in case.items() if k.startswith(role + ".")}
        for role in ("student", "teacher0", "teacher1", "teacher2")
    }
    module = LinearAndNorm(*state["student"]["l.weight"].shape)
    module.load_state_dict(state["teacher0"])
    average = EMA(module, 0.75, when="epoch", truncate=truncate)
    module.load_state_dict(state["student"])
    for epoch in (1, 2):
        average.after_step(Clock(ends_epoch=False))  # within an epoch nothing moves
        average.after_step(Clock(ends_epoch=True))
        for name, value in average.module.state_dict().items():
            wanted = state[f"teacher{epoch}"][name]
            if name == "bn.num_batches_tracked" and not truncate:
                wanted = state["student"][name]
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_pseudo_labels_score_strictly_more_than_the_threshold(golden):
    case = tensors(golden("lpld").case("hpl"))
    config = Lpld.Config()
    boxes = torch.arange(4 * len(case["scores"])).reshape(-1, 4).float()
    found = [{"boxes": boxes, "scores": case["scores"], "labels": case["classes"]}]
    objective = lpld.LpldObjective.__new__(lpld.LpldObjective)
    nn.Module.__init__(objective)
    objective.config = config
    kept, labels = objective._confident(Batch(), None, found)
    assert torch.equal(kept[0], boxes[case["keep"]])
    assert torch.equal(labels[0], case["classes"][case["keep"]])
