"""Scores of distilled data that take out what soft labels and augmentation alone would give.

Source: DD-Ranking (Li et al., 2025). All accuracies are FRACTIONS in [0, 1]: the formulas go
through an exponential and only make sense so, while the released validation returns percent
(and its cached full-data accuracies are percent too) and is not divided. Values per run are
(runs,) arrays; means and deviations over runs are population ones (ddof 0), as released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.errors import DataError

Runs = float | Sequence[float] | npt.NDArray[Any]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """One score over the runs.

    Attributes:
        runs: (runs,) the value of each run.
    """

    runs: Values

    @property
    def mean(self) -> float:
        """Mean over runs."""
        return float(self.runs.mean())

    @property
    def std(self) -> float:
        """Population deviation over runs (ddof 0)."""
        return float(self.runs.std(ddof=0))


@dataclass(frozen=True)
class LabelRobust:
    """The label-robust score with its two ingredients.

    Attributes:
        hlr: hard-label recovery, what hard labels on the distilled set lose to the full data.
        ior: improvement over random, under the method's own protocol.
        lrs: the score in [0, 1].
    """

    hlr: Score
    ior: Score
    lrs: Score


def hard_label_recovery(full_hard: Runs, synthetic_hard: Runs) -> Score:
    """HLR = acc(full data, hard labels) - acc(distilled, hard labels); smaller is better."""
    return _difference(full_hard, "full_hard", synthetic_hard, "synthetic_hard")


def improvement_over_random(synthetic_own: Runs, random_own: Runs) -> Score:
    """IOR = acc(distilled) - acc(random real images of the same number).

    Both under the method's own protocol: the same augmentation, and labels of the same kind
    for the random images too, the teacher's included.
    """
    return _difference(synthetic_own, "synthetic_own", random_own, "random_own")


def normalised(value: Runs) -> Values:
    """Maps [-1, 1] to [0, 1]: `(e^v - e^-1) / (e - e^-1)`; 0 goes to 0.2689."""
    low = math.exp(-1.0)
    mapped: Values = (np.exp(np.asarray(value, dtype=np.float64)) - low) / (math.e - low)
    return mapped


def label_robust_score(
    *,
    full_hard: Runs,
    synthetic_hard: Runs,
    synthetic_own: Runs,
    random_own: Runs,
    weight: float = 0.5,
) -> LabelRobust:
    """LRS of `weight * IOR - (1 - weight) * HLR`, per run, then averaged.

    Args:
        full_hard: accuracy on the full data with hard labels, (runs,) or one number.
        synthetic_hard: on the distilled set with hard labels.
        synthetic_own: on the distilled set under the method's own protocol.
        random_own: on random real images of the same number under that protocol.
        weight: in [0, 1].

    Raises:
        DataError: an accuracy outside [0, 1] (percent?), a weight outside, or different
            numbers of runs.
    """
    _check_weight(weight)
    hlr = hard_label_recovery(full_hard, synthetic_hard)
    ior = improvement_over_random(synthetic_own, random_own)
    return LabelRobust(hlr, ior, Score(normalised(weight * ior.runs - (1.0 - weight) * hlr.runs)))


def augmentation_robust_score(
    *,
    synthetic_augmented: Runs,
    random_augmented: Runs,
    synthetic_plain: Runs,
    random_plain: Runs,
    weight: float = 0.5,
) -> Score:
    """ARS of the gain over random images with and without augmentation.

    `weight * (synthetic - random, augmented) + (1 - weight) * (synthetic - random, plain)`,
    mapped to [0, 1].

    Raises:
        DataError: as in `label_robust_score`.
    """
    _check_weight(weight)
    augmented = improvement_over_random(synthetic_augmented, random_augmented).runs
    plain = improvement_over_random(synthetic_plain, random_plain).runs
    return Score(normalised(weight * augmented + (1.0 - weight) * plain))


def _difference(first: Runs, first_name: str, second: Runs, second_name: str) -> Score:
    a, b = _fractions(first, first_name), _fractions(second, second_name)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise DataError(f"{first_name} has {len(a)} runs and {second_name} has {len(b)}")
    return Score(a - b)


def _fractions(values: Runs, name: str) -> Values:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name}: accuracies must be one number per run, got shape {array.shape}")
    if not np.isfinite(array).all() or array.min() < 0.0 or array.max() > 1.0:
        raise DataError(
            f"{name}: accuracies must be fractions in [0, 1], got "
            f"{array.min():g}..{array.max():g}; divide percent by 100"
        )
    return array


def _check_weight(weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise DataError(f"the weight of a score must lie in [0, 1], got {weight}")
