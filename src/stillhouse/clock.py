"""Time and chance: every random draw is a function of (seed, path, stream, step or sample).

Nothing random is ever saved. A run that is killed and resumed, or split over
processes, repeats the same draws because it asks for them by name.
Two draws under one name in one step are equal by design: give them two stream names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from stillhouse.batch import Batch

Name = str | int
_MASK = (1 << 63) - 1


def seed_of(*path: Name | tuple[Name, ...]) -> int:
    """A 63-bit seed that depends on every part of `path`.

    Torch's CPU generator keeps only the low 32 bits of its seed, so the whole tuple is
    hashed; shifting or adding its parts would forget some of them.

    Args:
        path: strings, integers and tuples of them; their types matter (1 differs from "1").

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


def generator(*path: Name | tuple[Name, ...]) -> Generator:
    """A fresh CPU generator seeded by `seed_of(*path)`."""
    return Generator().manual_seed(seed_of(*path))


def uniform_of(seed: int, ids: Tensor, draws: Tensor | int, count: int) -> Tensor:
    """Uniform numbers that are a function of (seed, id, draw), vectorised over ids.

    A generator per sample costs microseconds each; this integer hash (SplitMix64) serves a
    whole batch at once and gives the same numbers for the same ids in any batch.

    Args:
        seed: from `seed_of`, the stream included.
        ids: (B,) int64 sample ids.
        draws: (B,) int64 or one integer, the augmentation number.
        count: how many numbers per row.

    Returns:
        (B, count) float32 in [0, 1), on the CPU.
    """
    with np.errstate(over="ignore"):
        rows = ids.detach().cpu().numpy().astype(np.uint64)
        number = torch.as_tensor(draws).detach().cpu().numpy().astype(np.uint64)
        key = _mix(rows + np.uint64(seed)) ^ _mix(number + np.uint64(0x9E3779B97F4A7C15))
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        bits = _mix(np.broadcast_to(key, rows.shape)[:, None] + columns[None, :])
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24))


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


@dataclass
class Clock:
    """Where a stage stands; handed to every hook of an objective.

    Attributes:
        seed: the run's seed.
        path: the stage's path within the run.
        step: number of the step, from 0.
        epoch: number of the epoch, from 0.
        total: steps of the whole stage.
        epoch_steps: steps of the present epoch.
        rank: this process among `world` processes.
        world: number of processes.
        turn: whose turn it is, when an objective has several players.
        begins_epoch: the step is the first of its epoch.
        ends_epoch: the step is the last of its epoch.
    """

    seed: int = 0
    path: tuple[str, ...] = ()
    step: int = 0
    epoch: int = 0
    total: int = 1
    epoch_steps: int = 1
    rank: int = 0
    world: int = 1
    turn: str = "main"
    begins_epoch: bool = True
    ends_epoch: bool = True
    _path_seed: int = field(default=-1, repr=False)

    @property
    def progress(self) -> float:
        """The share of the stage that is done, in [0, 1)."""
        return self.step / max(1, self.total)

    def seed_for(self, *stream: Name) -> int:
        """The seed of a stream at this step."""
        if self._path_seed < 0:
            self._path_seed = seed_of(self.seed, self.path)
        return seed_of(self._path_seed, self.step, stream)

    def rng(self, *stream: Name) -> Generator:
        """A generator for `stream` at this step, equal on all ranks."""
        return Generator().manual_seed(self.seed_for(*stream))

    def draw(self, stream: Name, batch: Batch, fn: Callable[[int, Generator], Tensor]) -> Tensor:
        """A draw per row, made for the global batch, of which the batch's own rows return.

        Args:
            stream: the draw's name.
            batch: its `rows` say which rows of the global batch it holds.
            fn: `fn(rows_of_global_batch, generator)`, rows first in what it returns.

        Returns:
            The rows of the draw that belong to `batch`, on the batch's device.
        """
        whole = fn(batch.of, self.rng(stream))
        rows = batch.get("rows", slice(0, batch.of))
        own = whole[rows] if isinstance(rows, slice) else whole[rows.to(whole.device)]
        return own.to(batch.device, non_blocking=True)

    def randn(self, stream: Name, batch: Batch, *shape: int) -> Tensor:
        """Standard normal numbers of shape (rows, *shape); see `draw`."""
        return self.draw(stream, batch, lambda n, rng: torch.randn(n, *shape, generator=rng))

    def rand(self, stream: Name, batch: Batch, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) of shape (rows, *shape); see `draw`."""
        return self.draw(stream, batch, lambda n, rng: torch.rand(n, *shape, generator=rng))

    def randint(self, stream: Name, batch: Batch, low: int, high: int) -> Tensor:
        """Whole numbers (rows,) in [low, high), each as likely; see `draw`."""
        return self.draw(
            stream, batch, lambda n, rng: torch.randint(low, high, (n,), generator=rng)
        )


@dataclass(frozen=True)
class Views:
    """The chance of one reading: which seed, and which draw of each sample.

    Attributes:
        seed: from the run's seed and the stage's path.
        epoch: the epoch that reads.
        draws: number of different augmentations of a sample (None: a new one every epoch).
    """

    seed: int
    epoch: int = 0
    draws: int | None = None

    @property
    def draw(self) -> int:
        """The augmentation number of this epoch."""
        return self.epoch if self.draws is None else self.epoch % self.draws

    def rng(self, sample: int) -> Generator:
        """The generator of one sample in this draw."""
        return generator(self.seed, int(sample), self.draw)

    def uniform(self, ids: Tensor, stream: str, count: int) -> Tensor:
        """(B, count) uniform numbers, a function of (seed, stream, id, draw)."""
        return uniform_of(seed_of(self.seed, stream), ids, self.draw, count)
