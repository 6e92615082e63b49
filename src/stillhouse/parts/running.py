"""Running means by key: class centroids, prototypes, thresholds, the centre of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.errors import ModelError, RecipeError
from stillhouse.objective import Part


class RunningMean(Part):
    """One mean per key that moves with the batches; keys that are absent keep theirs.

    With a momentum m, a key that a step contains moves to `m * value + (1 - m) * mean` of the
    step's rows; without one the value is the exact mean of all rows so far. `propose` says what
    the value will be and changes nothing; the end of the step commits it. Proposals of several
    micro-batches are added up first, so that they count as the one batch they are; with several
    processes `sum` and `count` must be those of the global batch.

    Users: class centroids (exact pass, or momentum .9999), prototypes (.99; the first batch is
    copied), self-adaptive thresholds (`initial` 1 / C, or `fill`), a teacher's centre (keys 1,
    momentum .9, `initial` 0).

    Args:
        keys: number of keys K, >= 1.
        shape: of one value.
        momentum: in [0, 1]; None for the exact mean.
        initial: every key's first value; None: a key is absent until it is seen, and its first
            value is the mean of that step's rows.
        dtype: of the state; torch's default when None.

    Attributes:
        value: (K, *shape); 0 where a key is absent and nothing was filled in.
        weight: (K,) rows behind each value; 0: absent, or the initial value.

    Raises:
        RecipeError: a momentum out of range, or no key.
    """

    value: Tensor
    weight: Tensor
    given: Tensor

    def __init__(
        self,
        keys: int,
        shape: tuple[int, ...] = (),
        momentum: float | None = 0.99,
        *,
        initial: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if keys < 1:
            raise RecipeError(f"a running mean needs at least one key, not {keys}")
        if momentum is not None and not 0.0 <= momentum <= 1.0:
            raise RecipeError(f"momentum must lie in [0, 1], not {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.full((keys, *shape), initial or 0.0, dtype=dtype))
        self.register_buffer("weight", torch.zeros(keys, dtype=dtype))
        self.register_buffer("given", torch.full((keys,), initial is not None))

    @property
    def present(self) -> Tensor:
        """(K,) bool: keys that have a value."""
        return self.given | (self.weight > 0)

    def fill(self, value: Tensor | float) -> None:
        """Give every key a first value that later steps move."""
        with torch.no_grad():
            self.value.copy_(torch.as_tensor(value).to(self.value).expand_as(self.value))
            self.given.fill_(True)

    def propose(  # type: ignore[override]
        self, sum: Tensor, count: Tensor, *, straight: bool = False
    ) -> Tensor:
        """Propose the rows of a batch; returns the value as it will be after this batch.

        Args:
            sum: (K, *shape) weighted sum over the batch's rows of each key.
            count: (K,) their number or total weight, 0 where a key is absent.
            straight: the gradient of the returned value is that of the batch's mean, not
                1 - m times it.

        Returns:
            (K, *shape), differentiable in `sum`; keys absent from the batch unchanged.

        Raises:
            ModelError: shapes that do not fit.
        """
        self._check(sum, count)
        super().propose(sum=sum, count=count)
        return self._moved(sum, count, straight)

    def commit(self, made: dict[str, list[Tensor]]) -> None:
        """Take the sums of the accepted micro-batches over, as one batch."""
        total, count = torch.stack(made["sum"]).sum(0), torch.stack(made["count"]).sum(0)
        self.value.copy_(self._moved(total, count, False))
        self.weight.add_(count.to(self.weight))

    def take(self, sum: Tensor, count: Tensor) -> None:
        """Move at once, outside of a training step: `propose` and the step's end in one."""
        self.propose(sum, count)
        self.settle(True)

    def _moved(self, total: Tensor, count: Tensor, straight: bool) -> Tensor:
        total, count = total.to(self.value), count.to(self.weight)
        inside = _beside(count > 0, self.value)
        mean = total / _beside(torch.where(count > 0, count, torch.ones_like(count)), self.value)
        if self.momentum is None:
            # An initial value has no weight in an exact mean.
            share = count / (self.weight + count).clamp(min=torch.finfo(count.dtype).tiny)
        else:
            share = torch.where(self.present, 1.0 - self.momentum, 1.0).to(count)
        share = _beside(share, self.value)
        moved = self.value + share * (mean - self.value)
        if straight:
            moved = moved.detach() + (mean - mean.detach())
        return torch.where(inside, moved, self.value)

    def _check(self, total: Tensor, count: Tensor) -> None:
        if total.shape != self.value.shape or count.shape != self.weight.shape:
            raise ModelError(
                f"a running mean of {len(self.value)} keys takes a sum of shape "
                f"{tuple(self.value.shape)} and a count of shape {tuple(self.weight.shape)}, not "
                f"{tuple(total.shape)} and {tuple(count.shape)}"
            )


def sums_by_key(values: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `RunningMean.propose` takes: sums of rows by key, and how many there are.

    Args:
        values: (N, ...).
        keys: (N,) int64 in [0, count); rows with another key are left out.
        count: number of keys K.

    Returns:
        `(sums, counts)` of shapes (K, ...) and (K,), in the dtype of `values`, differentiable
        in `values`.
    """
    inside = (keys >= 0) & (keys < count)
    # A row left out goes to a key of its own, so that nothing waits for the device.
    place = torch.where(inside, keys, count)
    sums = values.new_zeros(count + 1, *values.shape[1:]).index_add(0, place, values)
    counts = values.new_zeros(count + 1).index_add(0, place, torch.ones_like(place).to(values))
    return sums[:count], counts[:count]


def _beside(x: Tensor, value: Tensor) -> Tensor:
    """(K,) with as many further dimensions of size 1 as `value` has."""
    return x.reshape(-1, *[1] * (value.ndim - 1))
