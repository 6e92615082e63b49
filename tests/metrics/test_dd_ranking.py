from __future__ import annotations

import numpy as np
import pytest

from stillhouse.errors import DataError
from stillhouse.metrics.dd_ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    normalised,
)


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_label_robust_score_reproduces_the_released_one(golden, weight):
    case = golden("dd_common").case(f"lrs_w{weight}")
    found = label_robust_score(
        full_hard=case["full_hard"],
        synthetic_hard=case["syn_hard"],
        synthetic_own=case["syn_own"],
        random_own=case["random_own"],
        weight=weight,
    )
    for name in ("hlr", "ior", "lrs"):
        np.testing.assert_allclose(getattr(found, name).runs, case[name], rtol=0, atol=1e-12)
        mean = getattr(found, name).mean
        assert mean == pytest.approx(float(case[f"official_{name}_mean"]), abs=1e-12)
    assert found.lrs.std == pytest.approx(float(case["official_lrs_std"]), abs=1e-12)


def test_augmentation_robust_score(golden):
    case = golden("dd_common").case("ars")
    found = augmentation_robust_score(
        synthetic_augmented=case["syn_aug"],
        random_augmented=case["rnd_aug"],
        synthetic_plain=case["syn_noaug"],
        random_plain=case["rnd_noaug"],
        weight=0.5,
    )
    np.testing.assert_allclose(found.runs, case["ars"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(normalised(case["b"]), case["ars"], rtol=0, atol=1e-12)


def test_fixed_points():
    assert float(normalised(0.0)) == pytest.approx(0.268941, abs=1e-6)
    assert float(normalised(1.0)) == pytest.approx(1.0, abs=1e-12)
    assert float(normalised(-1.0)) == pytest.approx(0.0, abs=1e-12)
    found = label_robust_score(full_hard=0.8, synthetic_hard=0.5, synthetic_own=0.6, random_own=0.4)
    assert found.lrs.mean == pytest.approx(0.248192, abs=1e-6)
    assert found.hlr.mean == pytest.approx(0.3)
    assert found.ior.mean == pytest.approx(0.2)


def test_one_full_data_accuracy_serves_all_runs_and_the_deviation_is_the_population_one():
    score = hard_label_recovery(0.9, [0.5, 0.7])
    assert score.runs.tolist() == pytest.approx([0.4, 0.2])
    assert score.std == pytest.approx(0.1)


def test_percent_and_other_mistakes_are_told():
    with pytest.raises(DataError, match="divide percent by 100"):
        improvement_over_random(56.5, 40.0)
    with pytest.raises(DataError, match="one number per run"):
        hard_label_recovery([], [])
    with pytest.raises(DataError, match="fractions"):
        hard_label_recovery(float("nan"), 0.5)
    with pytest.raises(DataError, match="weight"):
        label_robust_score(
            full_hard=1.0, synthetic_hard=0.5, synthetic_own=0.5, random_own=0.5, weight=2.0
        )
    with pytest.raises(DataError, match=r"3 runs .* 2"):
        improvement_over_random([0.1, 0.2, 0.3], [0.1, 0.2])
