"""How much a classifier's answer tells of a sample beyond its class: the CMI meter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import DataError
from stillhouse.losses.mutual_information import usable
from stillhouse.metrics.classification import IGNORE, Summed, refuse_strange


class CMI(Summed):
    """Conditional mutual information I(X; Yhat | Y) of a model over a split, in nats.

    The mean over samples of KL(P_x || Q^y), Q^y the mean output of the sample's class over the
    same split, P the softmax at a temperature (Ye et al., ICLR 2024; released as MTCMI.py).
    One pass suffices, for it equals sum_y p(y) H(Q^y) - mean_x H(P_x). 0 when all outputs of
    every class are equal, at most log(classes). Sums are kept in float64.

    Args:
        classes: number of classes C.
        temperatures: at which the outputs are taken; there is no factor for them.
        frozen: (C, C) class means of another state of the model, at temperature 1: then what
            a loss with frozen means has seen is told too.

    Raises:
        DataError: fewer than two classes, a temperature that is not above 0, or means of
            another shape.
    """

    def __init__(
        self,
        classes: int,
        temperatures: Sequence[float] = (1.0, 4.0),
        *,
        frozen: Tensor | None = None,
    ) -> None:
        if classes < 2:
            raise DataError(f"the CMI needs two classes or more, not {classes}")
        if not temperatures or min(temperatures) <= 0:
            raise DataError(f"temperatures must be above 0, not {list(temperatures)}")
        if frozen is not None and frozen.shape != (classes, classes):
            raise DataError(f"frozen means of shape {tuple(frozen.shape)} for {classes} classes")
        self.classes = classes
        self.temperatures = tuple(float(t) for t in temperatures)
        self.frozen = frozen
        # By temperature: sums of outputs by class, and of their negative entropies.
        self._block = classes * classes + 1
        super().__init__(self._block * len(self.temperatures) + classes + 2)

    def update(self, out: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
        """Take one batch in: `out["logits"]` (..., C), `target` (...) int64, -100 for none.

        Raises:
            DataError: shapes that do not fit.
        """
        logits, target = self._labelled(out["logits"], batch)
        inside = (target >= 0) & (target < self.classes)
        place = torch.where(inside, target, 0)
        own = inside.to(logits)
        blocks = []
        for temperature in self.temperatures:
            logp = (logits / temperature).log_softmax(-1)
            p = logp.exp() * own[:, None]
            sums = logits.new_zeros(self.classes, self.classes).index_add_(0, place, p)
            # A class that is ruled out adds nothing, where 0 * -inf would.
            negative = (p * logp.masked_fill(p == 0, 0.0)).sum()
            blocks += [sums.reshape(-1), negative.reshape(1)]
        counts = logits.new_zeros(self.classes).index_add_(0, place, own)
        chosen = logits.log_softmax(-1).gather(1, place[:, None])[:, 0]
        told = torch.where(inside, chosen, torch.zeros_like(chosen)).sum()
        rest = torch.stack([told, (~inside).sum().to(told)])
        self.add(torch.cat([*blocks, counts, rest]))

    def _labelled(self, logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        target: Tensor = batch["target"]
        if target.shape != logits.shape[:-1] or logits.shape[-1] != self.classes:
            raise DataError(
                f"logits of shape {tuple(logits.shape)} and targets of shape "
                f"{tuple(target.shape)} do not fit each other and {self.classes} classes"
            )
        logits = logits.detach().reshape(-1, self.classes)
        # float64, except on devices that lack it: differences of entropies are small.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        target = target.reshape(-1).to(logits.device)
        kept = target != IGNORE
        return logits[kept].to(wide), target[kept]

    def centroids(self, temperature: float = 1.0) -> Tensor:
        """(C, C) class means so far; 1 / C in the row of a class without samples."""
        return self._means(self._index(temperature))[0]

    def compute(self) -> dict[str, float]:
        """The figures.

        Returns:
            `cmi` (`cmi_t4` at temperature 4 ...), `log_likelihood` (the mean of log p(true
            class) at temperature 1); with frozen means also `cmi_frozen`, the mean of
            KL(P_x || frozen^y), and `mean_shift`, the part of it that is not CMI: the mean of
            KL(Q^y || frozen^y). NaN when nothing was labelled.

        Raises:
            DataError: labels out of range were met.
        """
        told, strange = self._sums[-2:].tolist()
        refuse_strange(strange)
        rows = float(self._counts().sum())
        found: dict[str, float] = {}
        for index, temperature in enumerate(self.temperatures):
            found[_named(temperature)] = self._cmi(index) if rows else math.nan
        found["log_likelihood"] = told / rows if rows else math.nan
        if self.frozen is not None and 1.0 in self.temperatures:
            shift = self._shift() if rows else math.nan
            found["cmi_frozen"] = found["cmi"] + shift
            found["mean_shift"] = shift
        return found

    def _index(self, temperature: float) -> int:
        if temperature not in self.temperatures:
            raise DataError(f"nothing was kept at temperature {temperature:g}")
        return self.temperatures.index(temperature)

    def _counts(self) -> Tensor:
        return self._sums[-2 - self.classes : -2]

    def _means(self, index: int) -> tuple[Tensor, Tensor]:
        """Class means (C, C) and the mean of the negative entropies."""
        block = self._sums[index * self._block : (index + 1) * self._block]
        counts = self._counts()
        sums = block[:-1].reshape(self.classes, self.classes)
        means = sums / counts.clamp(min=1.0)[:, None]
        means = torch.where(counts[:, None] > 0, means, 1.0 / self.classes)
        return means, block[-1] / counts.sum().clamp(min=1.0)

    def _share(self) -> Tensor:
        counts = self._counts()
        return counts / counts.sum().clamp(min=1.0)

    def _cmi(self, index: int) -> float:
        means, negative = self._means(index)
        entropies = -torch.xlogy(means, means).sum(-1)
        return max(0.0, float((self._share() * entropies).sum() + negative))

    def _shift(self) -> float:
        assert self.frozen is not None
        means, _ = self._means(self._index(1.0))
        frozen = usable(self.frozen.to(means))
        apart = (torch.xlogy(means, means) - means * frozen.log()).sum(-1)
        return float((self._share() * apart).sum())


def _named(temperature: float) -> str:
    return "cmi" if temperature == 1.0 else f"cmi_t{temperature:g}"
