"""Experts: networks trained on the real data, with a snapshot after every epoch.

Their trajectories are what trajectory matching (MTT, FTD, DATM, AST) learns from. Each expert is
a child job with a training of its own, resumable, and shared in the cache by everything it
depends on: eight experts that were made for one method serve the next, and a ninth is added to
them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.batch import Shuffled, Source, TensorSource
from stillhouse.engine.checkpoint import read_state, write_state
from stillhouse.engine.job import Each, Job
from stillhouse.engine.step import Clip, Factory, Gradient, Schedule
from stillhouse.errors import CheckpointError, DataError
from stillhouse.net import Net
from stillhouse.parts.distilled_set import Preprocessing
from stillhouse.parts.schedule import constant
from stillhouse.parts.trajectories import Trajectories
from stillhouse.parts.unroll import FlatNet, refuse_moving_state
from stillhouse.stages.initial_set import RealImages
from stillhouse.stages.judge_distilled_set import Protocol, Ready, SetTraining

SNAPSHOTS = "epoch-*.state"
RELEASED = "replay_buffer_*.pt"
Store = Literal["float32", "float16"]


class ExpertTraining(SetTraining):
    """Cross-entropy on augmented rows; what is exported, and so kept, is in `store` precision.

    Args:
        net: see `SetTraining`.
        protocol: see `SetTraining`.
        preprocessing: see `SetTraining`.
        store: precision of the snapshots; float16 halves the disk, at about three digits.
    """

    def __init__(
        self,
        net: Net,
        protocol: Protocol,
        preprocessing: Preprocessing | None = None,
        store: Store = "float32",
    ) -> None:
        super().__init__(net, protocol, preprocessing)
        self.store = store

    def export(self) -> nn.Module:
        """The network as it is kept."""
        if self.store == "float32":
            return super().export()
        return copy.deepcopy(self.student).half()


@dataclass(frozen=True)
class Training:
    """How experts are trained.

    Attributes:
        count: experts.
        phases: (epochs, factory of the optimiser) of each part of the training; a new part
            begins with a fresh optimiser. Released: 50 or 100 epochs of SGD at .01.
        batch: rows of a batch.
        gradient: of the step; `Sharpness` makes flat experts.
        schedule: of the learning rate, as a factor.
    """

    count: int
    phases: Sequence[tuple[int, Factory]]
    batch: int = 256
    gradient: Gradient | None = None
    schedule: Schedule = field(default_factory=constant)

    @property
    def epochs(self) -> int:
        """Of one expert."""
        return sum(epochs for epochs, _ in self.phases)


def train_experts(
    job: Job,
    fresh: Callable[[int], Net],
    source: Source,
    objective: Callable[[Net, int], ExpertTraining],
    training: Training,
    share: Mapping[str, Any] | None,
) -> list[list[Path]]:
    """Train the experts, each as a stage that may lie in the cache.

    Args:
        job: of the run; its stages are `experts/expert-0` ...
        fresh: makes network number i, freshly initialised.
        source: rows "x" and "target" (see `training_rows`), read without the data's own
            augmentation: the objective augments.
        objective: `objective(net, first)` is what trains a net, from epoch `first` on.
        training: how many, how long, by what.
        share: everything the result depends on beside the expert's number; None keeps the
            experts in the run's own folder.

    Returns:
        For each expert the files of its E + 1 snapshots.

    Raises:
        ModelError: the network keeps state that a trajectory of parameters misses.
    """
    refuse_moving_state(fresh(0))
    child = job.child("experts")
    return [
        _train_expert(child, number, fresh(number), source, objective, training, share)
        for number in range(training.count)
    ]


def _train_expert(
    job: Job,
    number: int,
    net: Net,
    source: Source,
    objective: Callable[[Net, int], ExpertTraining],
    training: Training,
    share: Mapping[str, Any] | None,
) -> list[Path]:
    snapshots: list[Path] = []
    done = 0
    for phase, (epochs, optim) in enumerate(training.phases):
        fit = job.fit(
            f"expert-{number}" + (f"-phase-{phase}" if phase else ""),
            objective(net, done),
            Shuffled(source, training.batch, augment=False, collate=job.task.collate),
            epochs=epochs,
            optim=optim,
            schedule=training.schedule,
            gradient=training.gradient,
            accumulate=1,
            clip=Clip(),
            validate=dict,
            keep=Each(1),
            share=None if share is None else {**share, "expert": number, "phase": phase},
        )
        # A later phase begins where the one before it ended.
        snapshots += fit.snapshots[1:] if phase else fit.snapshots
        done += epochs
    gone = [path for path in snapshots if not path.is_file()]
    if gone:
        raise CheckpointError(
            f"{gone[0]} was removed from a finished expert; remove {gone[0].parent.parent} to "
            "train it again"
        )
    return snapshots


def training_rows(job: Job, real: RealImages) -> tuple[Source, Preprocessing | None]:
    """The training split as experts read it, and what is still to be done to its images.

    Images that were brought to network-input space once, and are held in memory, are not
    whitened again in every step, which would cost more than a small network does.
    """
    if real.held is None:
        return job.splits["train"], real.preprocessing
    labels = torch.empty(len(real.held), dtype=torch.int64)
    for number, rows in enumerate(real.rows):
        labels[rows] = number
    views = {"x": real.held, "target": labels.to(real.held.device)}
    return TensorSource(views, name="real images"), None


def open_trajectories(
    experts: Path | str | Sequence[Sequence[Path]],
    net: FlatNet,
    *,
    device: torch.device | str = "cpu",
    hold_bytes: int = 1 << 30,
) -> Trajectories:
    """The trajectories below a folder, or of given snapshot files.

    Args:
        experts: a folder (see `snapshot_files`), or what `train_experts` returned.
        net: whose weights they are.
        device: where vectors go.
        hold_bytes: see `Trajectories`.
    """
    files = snapshot_files(Path(experts)) if isinstance(experts, (str, Path)) else experts
    return Trajectories(files, net, read_state, device=device, hold_bytes=hold_bytes)


def snapshot_files(folder: Path) -> list[list[Path]]:
    """The snapshots below a folder, expert by expert.

    Every folder at any depth that holds files `epoch-*.state` is an expert (stages of this
    library leave them so, in `snapshots`), in the order of their paths.

    Raises:
        DataError: there are none.
    """
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob(SNAPSHOTS)):
        found.setdefault(path.parent, []).append(path)
    if not found:
        hint = "; stillhouse.stages.experts.convert_released turns replay buffers into them"
        raise DataError(
            f"{folder} holds no experts: folders with files {SNAPSHOTS} are looked for"
            + (hint if list(folder.glob(RELEASED)) else "")
        )
    return list(found.values())


def convert_released(source: Path | str, folder: Path | str) -> int:
    """Turn the buffers that the released codes write into snapshots of this library.

    `replay_buffer_*.pt` of MTT, FTD, DATM and AST: a list of experts, each a list of E + 1 lists
    of tensors in the order of the network's parameters. They are read without running code
    (`weights_only`).

    Args:
        source: a file, or a folder of them.
        folder: where `expert-0000/epoch-000000.state` ... are written.

    Returns:
        The number of experts.

    Raises:
        CheckpointError: a file of another form.
    """
    place = Path(source)
    files = [place] if place.is_file() else sorted(place.glob(RELEASED), key=_number_in)
    if not files:
        raise CheckpointError(f"{place} holds no {RELEASED}")
    count = 0
    for path in files:
        try:
            experts: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as a replay buffer: {error}") from None
        for expert in _checked(experts, path):
            for epoch, weights in enumerate(expert):
                name = f"epoch-{epoch:06d}.state"
                tensors = [w.detach().clone() for w in weights]
                write_state(Path(folder) / f"expert-{count:04d}" / name, tensors)
            count += 1
    return count


def _checked(experts: Any, path: Path) -> list[list[list[Tensor]]]:
    def is_weights(found: Any) -> bool:
        return isinstance(found, (list, tuple)) and all(isinstance(w, Tensor) for w in found)

    fits = isinstance(experts, list) and all(
        isinstance(expert, list) and all(is_weights(weights) for weights in expert)
        for expert in experts
    )
    if not fits:
        raise CheckpointError(
            f"{path} is no replay buffer: experts of epochs of lists of tensors are expected"
        )
    found: list[list[list[Tensor]]] = experts
    return found


def _number_in(path: Path) -> int:
    digits = "".join(c for c in path.stem if c.isdigit())
    return int(digits) if digits else -1


def expert_accuracies(
    job: Job,
    net: Net,
    trajectories: Trajectories,
    preprocessing: Preprocessing | None,
    split: str,
    epochs: Sequence[int],
) -> list[list[float]]:
    """Accuracy of every expert after some epochs, on a split.

    Args:
        job: whose task says what accuracy is; "test" is open to judges only.
        net: of the experts' architecture; its weights are overwritten.
        trajectories: of the experts.
        preprocessing: of images in [0, 1], or None.
        split: name of the split.
        epochs: numbers of epochs.

    Returns:
        One list per expert, one fraction per epoch.
    """
    own = dict(net.named_parameters())
    ready = Ready(net, preprocessing)
    found = []
    for expert in range(len(trajectories)):
        row = []
        for epoch in epochs:
            with torch.no_grad():
                named = trajectories.net.named(trajectories.at(expert, epoch))
                for name, value in named.items():
                    own[name].copy_(value)
            row.append(job.evaluate(ready, split)[job.task.main_metric])
        found.append(row)
    return found
