"""Expert trajectories: the weights of networks after every epoch of their training.

They are data: the student's start and target are read from them. Nothing here is trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample
from stillhouse.clock import Views
from stillhouse.errors import CheckpointError, DataError
from stillhouse.parts.unroll import FlatNet


class Trajectories:
    """The snapshots of some experts, each as flat vectors in the order of a network's weights.

    As a source its samples are experts: what is read of one is its number; the weights
    themselves come by `segment`, since which epochs are wanted is the method's business.

    Args:
        experts: for every expert the files of its snapshots in order of epochs, the initial one
            first (`stages.experts.open_trajectories` finds them below a folder).
        net: whose weights they are.
        read: the content of a snapshot: weights by name, or a list of them.
        device: where vectors go.
        hold_bytes: all are read once and kept in memory up to this size; else read as asked for.

    Attributes:
        epochs: E; a trajectory has E + 1 snapshots.
        bytes: of the files on disk.

    Raises:
        CheckpointError: a file is missing or damaged.
        DataError: no experts, fewer than two snapshots, or experts of different length.
        ModelError: weights of another network.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Path]],
        net: FlatNet,
        read: Callable[[Path], Any],
        *,
        device: torch.device | str = "cpu",
        hold_bytes: int = 1 << 30,
    ) -> None:
        self.files = [list(files) for files in experts]
        self.net, self._reader, self.device = net, read, torch.device(device)
        lengths = {len(files) for files in self.files}
        if len(lengths) != 1:
            found = "no experts" if not lengths else f"experts of {sorted(lengths)} snapshots"
            raise DataError(f"trajectories need experts of one length, here are {found}")
        self.epochs = lengths.pop() - 1
        if self.epochs < 1:
            raise DataError("a trajectory needs two snapshots at least; this one has no epoch")
        self.bytes = sum(p.stat().st_size for p in {f for files in self.files for f in files})
        self._held: dict[tuple[int, int], Tensor] = {}
        self._holds = len(self) * (self.epochs + 1) * net.size * 4 <= hold_bytes
        self.at(0, 0)  # the network is told now when it does not fit

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Of the names and the last snapshots of all experts."""
        digest = hashlib.sha256()
        for number, files in enumerate(self.files):
            digest.update(repr([f.name for f in files]).encode())
            digest.update(self.at(number, self.epochs).cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """An expert: its number and length."""
        return {"expert": int(item[0]), "epochs": self.epochs}

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The experts at positions `rows`; their numbers are the ids."""
        return Batch(id=rows.long(), draw=0 if views is None else views.draw)

    def at(self, expert: int, epoch: int) -> Tensor:
        """The weights (P,) float32 of an expert after `epoch` epochs; a copy of one's own.

        Raises:
            DataError: no such expert or epoch.
        """
        if not (0 <= expert < len(self) and 0 <= epoch <= self.epochs):
            raise DataError(
                f"there is no epoch {epoch} of expert {expert}: {len(self)} experts of epochs "
                f"0..{self.epochs}"
            )
        held = self._held.get((expert, epoch))
        if held is None:
            held = self._read(expert, epoch)
            if self._holds:
                self._held[expert, epoch] = held
        # Whatever happens to what is handed out, the expert stays as it was.
        return held.clone()

    def segment(self, expert: int, start: int, span: int) -> tuple[Tensor, Tensor]:
        """Where a student begins, and where it should arrive.

        Args:
            expert: number of the expert.
            start: epochs trained at the beginning, from 0.
            span: epochs M to the end; `start + span` is at most `epochs`.

        Returns:
            Two vectors (P,) float32, copies.
        """
        return self.at(expert, start), self.at(expert, start + span)

    def steps(self, span: int = 1) -> Tensor:
        """How far experts move: `||theta_{t + span} - theta_t||`, (experts, epochs - span + 1).

        Matching is sensible only while they still move.
        """
        rows = []
        for expert in range(len(self)):
            ends = [self.at(expert, epoch) for epoch in range(self.epochs + 1)]
            rows.append(
                torch.stack(
                    [
                        torch.linalg.vector_norm(b - a)
                        for a, b in zip(ends, ends[span:], strict=False)
                    ]
                )
            )
        return torch.stack(rows).cpu()

    def _read(self, expert: int, epoch: int) -> Tensor:
        path = self.files[expert][epoch]
        state = self._reader(path)
        if not isinstance(state, (Mapping, list)):
            raise CheckpointError(f"{path} holds no weights but {type(state).__name__}")
        return self.net.flatten(state).float().to(self.device)
