"""The label losses of data-set distillation, composed from `losses.logits`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.losses.logits import kl, mse_logits, soft_cross_entropy

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_soft_cross_entropy_on_label_logits(golden):
    case = {k: torch.from_numpy(v).double() for k, v in golden("dd_common").case("soft_ce").items()}
    z, labels = case["z"].requires_grad_(), case["label_logits"].requires_grad_()
    loss = soft_cross_entropy(z, labels, from_logits=True)
    loss.backward()
    torch.testing.assert_close(loss.detach(), case["loss"], **CLOSE)
    torch.testing.assert_close(z.grad, case["grad_z"], **CLOSE)
    torch.testing.assert_close(labels.grad, case["grad_label_logits"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "temperature", "scale"),
    [("ddranking_loss_T1.2_scale0", 1.2, False), ("ddranking_loss_T4_scale1", 4.0, True)],
)
def test_label_losses_with_temperature(golden, name, temperature, scale):
    case = {k: torch.from_numpy(v).double() for k, v in golden("dd_common").case(name).items()}
    for term in ("kl", "sce"):
        student = case["student"].clone().requires_grad_()
        if term == "kl":
            loss = kl(student, case["teacher"], temperature=temperature, scale=scale)
        else:
            loss = soft_cross_entropy(
                student, case["teacher"], from_logits=True, temperature=temperature, scale=scale
            )
        loss.backward()
        torch.testing.assert_close(loss.detach(), case[term], **CLOSE)
        torch.testing.assert_close(student.grad, case[f"{term}_grad"], **CLOSE)


def test_squared_logits_with_hard_labels(golden):
    case = golden("dd_common").case("ddranking_mse_gt")
    student = torch.from_numpy(case["student"]).double()
    teacher = torch.from_numpy(case["teacher"]).double()
    hard = F.cross_entropy(student, torch.from_numpy(case["labels"]))
    loss = mse_logits(student, teacher) + 0.025 * hard
    torch.testing.assert_close(loss, torch.from_numpy(case["loss"]).double(), **CLOSE)
