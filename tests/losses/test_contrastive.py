"""Contrastive losses and MMD: released values, invariances, what does not fit."""

from __future__ import annotations

import math

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses.contrastive import anchor_cross_entropy, infonce, supcon
from stillhouse.losses.distributions import mmd_rbf


def case(golden, name: str) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(v) for k, v in golden("fedlgd").case(name).items()}


def test_supcon_of_client_and_server_rows(golden):
    found = case(golden, "supcon")
    client = found["client"].double().requires_grad_()
    server = found["server"].double().requires_grad_()
    labels = torch.cat([found["client_labels"], found["server_labels"]])
    each = supcon(torch.cat([client, server]), labels, reduction="none")
    torch.testing.assert_close(each, found["per_anchor"], rtol=1e-6, atol=1e-12)
    loss = supcon(torch.cat([client, server]), labels)
    torch.testing.assert_close(loss, found["loss"], rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(client.grad, found["grad_client"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(server.grad, found["grad_server"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supcon_at_another_temperature(golden, temperature):
    found = case(golden, f"supcon_T{temperature}")
    features = found["features"].requires_grad_()
    loss = supcon(features, found["labels"], temperature=temperature, normalised=True)
    torch.testing.assert_close(loss, found["loss"], rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(features.grad, found["grad"], rtol=1e-6, atol=1e-9)


def test_supcon_by_hand_and_what_it_does_not_see():
    z = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    near = supcon(z, torch.tensor([0, 0, 1, 1]))
    assert near.item() == pytest.approx(math.log(1 + 2 * math.exp(-1 / 0.07)), rel=1e-6)
    far = supcon(z, torch.tensor([0, 1, 0, 1]))
    assert far.item() == pytest.approx(14.285716, rel=1e-6)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    order = torch.randperm(7, generator=rng)
    scaled = x * torch.rand(7, 1, generator=rng, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(supcon(scaled[order], y[order]), supcon(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_supcon_without_positives_is_nothing(dtype):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = supcon(x, torch.arange(4))
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_mmd(golden):
    found = case(golden, "mmd")
    source = found["source"].double().requires_grad_()
    target = found["target"].double().requires_grad_()
    loss = mmd_rbf(source, target)
    torch.testing.assert_close(loss, found["loss"], rtol=0, atol=1e-9)
    loss.backward()
    torch.testing.assert_close(source.grad, found["grad_source"], rtol=0, atol=1e-9)
    torch.testing.assert_close(target.grad, found["grad_target"], rtol=0, atol=1e-9)


def test_mmd_is_nothing_between_a_sample_and_itself_and_symmetric():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=rng, dtype=torch.float64)
    y = torch.randn(4, 2, generator=rng, dtype=torch.float64) + 1
    assert mmd_rbf(x, x).item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(mmd_rbf(x, y), mmd_rbf(y, x))
    assert mmd_rbf(x, y) < mmd_rbf(x, y + 2)
    one = mmd_rbf(x, y, kernels=1, bandwidth=2.0)
    k = torch.exp(-torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square() / 2)
    torch.testing.assert_close(one, k[:6, :6].mean() + k[6:, 6:].mean() - 2 * k[:6, 6:].mean())


def test_what_does_not_fit_is_told():
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ModelError, match="labels"):
        supcon(x, y[:2])
    with pytest.raises(ModelError, match="N >= 2"):
        supcon(x[:1], y[:1])
    with pytest.raises(RecipeError, match="above 0"):
        supcon(x, y, temperature=0.0)
    with pytest.raises(RecipeError, match="reduction"):
        supcon(x, y, reduction="sum")
    with pytest.raises(ModelError, match="samples"):
        mmd_rbf(x, torch.zeros(2, 3))
    with pytest.raises(ModelError, match="samples"):
        mmd_rbf(x, torch.zeros(0, 2))
    with pytest.raises(RecipeError, match="one kernel"):
        mmd_rbf(x, x, kernels=0)


# ---- InfoNCE and anchors -----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize(
    ("term", "negatives", "symmetric"),
    [
        ("plain", None, False),
        ("symmetric", None, True),
        ("unpaired", "negatives", False),
        ("paired", "negatives_paired", False),
    ],
)
def test_infonce_as_released(golden, term, negatives, symmetric, dtype, near):
    stored = golden("comodo").case("infonce")
    found = {k: torch.as_tensor(v).to(dtype) for k, v in stored.items()}
    student = found["student"].requires_grad_()
    given = None if negatives is None else found[negatives]
    loss = infonce(student, found["teacher"], negatives=given, symmetric=symmetric, temperature=0.1)
    torch.testing.assert_close(loss.detach(), found[term], rtol=near, atol=0)
    loss.backward()
    torch.testing.assert_close(student.grad, found[f"grad_{term}"], rtol=near, atol=near * 0.1)


def test_infonce_of_orthonormal_pairs_and_of_equal_rows():
    pair = torch.eye(2).double()
    assert infonce(pair, pair, temperature=0.1).item() == pytest.approx(
        math.log1p(math.exp(-10)), rel=1e-6
    )
    assert infonce(pair, pair, temperature=0.1).item() == pytest.approx(4.53989e-5, rel=1e-4)
    matched = torch.eye(8)
    assert infonce(matched, matched, temperature=0.07) < 1e-4
    equal = torch.ones(6, 3)
    assert infonce(equal, equal, temperature=0.07).item() == pytest.approx(math.log(6))


def test_infonce_by_hand_for_tokens():
    student = torch.eye(2).double()
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double()
    assert infonce(student, teacher, temperature=0.5).item() == pytest.approx(0.277501, abs=1e-6)


def test_infonce_of_a_part_of_a_batch():
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=rng) for _ in range(2))
    whole = infonce(student, teacher, reduction="none")
    part = infonce(student[2:5], teacher, positives=torch.tensor([2, 3, 4]), reduction="none")
    torch.testing.assert_close(part, whole[2:5])
    torch.testing.assert_close(infonce(student, teacher, reduction="sum"), whole.sum())


def test_anchors_are_not_scaled_and_have_no_gradient():
    rng = torch.Generator().manual_seed(1)
    student, teacher, anchors = (
        torch.randn(n, 3, generator=rng).requires_grad_() for n in (4, 4, 7)
    )
    settings = {"student_temperature": 0.2, "teacher_temperature": 0.5}
    loss = anchor_cross_entropy(student, teacher, anchors, **settings)
    p = (teacher @ anchors.T / 0.5).softmax(1)
    q = (torch.nn.functional.normalize(student, dim=1) @ anchors.T / 0.2).log_softmax(1)
    torch.testing.assert_close(loss, -(p * q).sum(1).mean())
    loss.backward()
    assert teacher.grad is None
    assert anchors.grad is None
    assert student.grad.abs().sum() > 0
    given = torch.nn.functional.normalize(student.detach(), dim=1)
    again = anchor_cross_entropy(given, teacher, anchors, normalised=True, **settings)
    torch.testing.assert_close(again, loss.detach())


def test_half_precision_is_widened():
    rows = torch.randn(4, 3).half()
    settings = {"student_temperature": 0.05, "teacher_temperature": 0.1}
    assert anchor_cross_entropy(rows, rows, rows, **settings).dtype == torch.float32
    assert infonce(rows, rows).dtype == torch.float32


def test_contrast_that_does_not_fit_is_told():
    rows = torch.randn(4, 3)
    settings = {"student_temperature": 0.05, "teacher_temperature": 0.1}
    with pytest.raises(ModelError, match="equal width"):
        infonce(rows, torch.randn(4, 2))
    with pytest.raises(ModelError, match="equal width"):
        anchor_cross_entropy(rows, torch.randn(3, 3), rows, **settings)
    with pytest.raises(ModelError, match=r"anchors \(M, 3\)"):
        anchor_cross_entropy(rows, rows, torch.randn(5, 2), **settings)
    with pytest.raises(ModelError, match="own negatives"):
        infonce(rows, rows, negatives=torch.randn(3, 2, 3))
    with pytest.raises(ModelError, match="negatives"):
        infonce(rows, rows, negatives=torch.randn(3, 2))
    with pytest.raises(RecipeError, match="above 0"):
        infonce(rows, rows, temperature=0.0)
    with pytest.raises(RecipeError, match="symmetric"):
        infonce(rows, rows, negatives=rows, symmetric=True)
    with pytest.raises(RecipeError, match="reduction"):
        infonce(rows, rows, reduction="max")
