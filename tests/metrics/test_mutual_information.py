"""The CMI meter: reference values, cutting into batches, temperature, frozen means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stillhouse.errors import DataError
from stillhouse.losses.mutual_information import cmi
from stillhouse.metrics.mutual_information import CMI


def outputs(rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=rng, dtype=torch.float64)
    return logits, torch.randint(4, (rows,), generator=rng)


def measured(logits: Tensor, target: Tensor, cut: int = 7, **settings: object) -> dict[str, float]:
    meter = CMI(logits.shape[1], **settings)
    for x, y in zip(logits.split(cut), target.split(cut), strict=True):
        meter.update({"logits": x}, {"target": y})
    return meter.compute()


def test_reference_values(golden):
    g = golden("mcmi").case("meter")
    logits, target = torch.as_tensor(g["logits"]), torch.as_tensor(g["target"])
    frozen = torch.as_tensor(g["frozen_q"])
    found = measured(logits, target, temperatures=(1.0, 2.0, 4.0, 16.0), frozen=frozen)
    names = {"cmi": "cmi_T1", "cmi_t2": "cmi_T2", "cmi_t4": "cmi_T4", "cmi_t16": "cmi_T16"}
    names |= {"log_likelihood": "mean_log_likelihood_T1"}
    names |= {"cmi_frozen": "surrogate_frozen", "mean_shift": "gap"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(float(g[theirs]), rel=1e-10, abs=1e-10), ours
    meter = CMI(4)
    meter.update({"logits": logits}, {"target": target})
    torch.testing.assert_close(meter.centroids(), torch.as_tensor(g["q_T1"]))
    few = torch.as_tensor(g["balanced_index"])
    balanced = measured(logits[few], target[few])["cmi"]
    assert balanced == pytest.approx(float(g["cmi_balanced"]), rel=1e-10)


def test_it_is_the_mean_divergence_from_the_class_means():
    logits, target = outputs()
    p = logits.softmax(-1)
    means = torch.stack([p[target == k].mean(0) for k in range(4)])
    expected = (p * (p / means[target]).log()).sum(-1).mean().item()
    for cut in (1, 7, 40):
        assert measured(logits, target, cut)["cmi"] == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(cmi(logits, means, target).item(), expected)


def test_sums_of_processes_add_up():
    logits, target = outputs()
    parts = []
    for rows in torch.split(torch.arange(40), 25):
        parts.append(CMI(4))
        parts[-1].update({"logits": logits[rows]}, {"target": target[rows]})
    parts[0].take(parts[0].totals() + parts[1].totals())
    assert parts[0].compute() == pytest.approx(measured(logits, target), rel=1e-12)


def test_temperature_first_raises_then_removes_what_a_confident_teacher_tells():
    """Property 7."""
    logits, target = outputs()
    right = torch.nn.functional.one_hot(target, 4).double()
    confident = 9 * right + logits
    grid = (1.0, 2.0, 3.0, 1e3)
    found = list(measured(confident, target, temperatures=grid).values())[:4]
    assert found[0] < found[1]
    assert found[3] < 1e-4
    assert all(0 <= value <= math.log(4) for value in found)


def test_an_absent_class_and_rows_without_a_label():
    logits, target = outputs()
    target[target == 2] = -100
    meter = CMI(4)
    meter.update({"logits": logits}, {"target": target})
    kept = target >= 0
    expected = measured(logits[kept], target[kept])
    assert meter.compute() == pytest.approx(expected)
    assert meter.centroids()[2].tolist() == [0.25] * 4


def test_a_class_ruled_out_adds_nothing():
    logits, target = outputs()
    target = target.clamp(max=2)
    logits[:, 3] = -math.inf
    three = measured(logits[:, :3], target)
    assert measured(logits, target)["cmi"] == pytest.approx(three["cmi"])


def test_nothing_seen_is_no_number():
    assert all(math.isnan(value) for value in CMI(3).compute().values())


def test_bad_input_is_told():
    logits, target = outputs()
    with pytest.raises(DataError, match="temperatures"):
        CMI(4, (0.0,))
    with pytest.raises(DataError, match="two classes"):
        CMI(1)
    with pytest.raises(DataError, match="frozen"):
        CMI(4, frozen=torch.zeros(3, 3))
    with pytest.raises(DataError, match="fit each other"):
        CMI(3).update({"logits": logits}, {"target": target})
    target[0] = 4
    with pytest.raises(DataError, match="no class"):
        measured(logits, target)
