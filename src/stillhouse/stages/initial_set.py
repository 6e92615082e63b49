"""Where data-set distillation begins: real images by class, and the first synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from stillhouse.batch import Source, read_rows
from stillhouse.data.splitting import labels_of
from stillhouse.engine.job import Job
from stillhouse.errors import DataError
from stillhouse.parts.distilled_set import Decode, DistilledSet, MeanStd, Preprocessing
from stillhouse.parts.matrices import ZCA, k_centre
from stillhouse.parts.mosaic import mosaic

Init = Literal["real", "noise", "smart"]
Space = Literal["mean_std", "zca", "none"]

_BLOCK = 2048  # rows read at a time


class RealImages:
    """The real images of a split by class, in network-input space.

    A set that fits is preprocessed once and kept on the device; a larger one is read as it is
    drawn.

    Args:
        source: with images "x" in [0, 1] and labels "target".
        classes: number of classes K.
        preprocessing: into network-input space; None leaves [0, 1].
        device: where images go.
        hold_bytes: the largest size, as float32, that is kept in memory.
        missing: classes may have no images, as a client of a federation may lack some.

    Attributes:
        rows: (rows of class 0, rows of class 1, ...), positions in the source.

    Raises:
        DataError: no labels, or a class without images.
    """

    def __init__(
        self,
        source: Source,
        classes: int,
        preprocessing: Preprocessing | None,
        *,
        device: torch.device | str = "cpu",
        hold_bytes: int = 1 << 30,
        missing: bool = False,
    ) -> None:
        self.source, self.preprocessing = source, preprocessing
        self.device = torch.device(device)
        labels = labels_of(source)
        if labels is None:
            blocks = torch.split(torch.arange(len(source)), _BLOCK)
            labels = torch.cat([read_rows(source, b, None)["target"] for b in blocks])
        self.rows = [(labels == c).nonzero().flatten() for c in range(classes)]
        for number, rows in enumerate(self.rows):
            if len(rows) == 0 and not missing:
                raise DataError(f"class {number} has no real images to distil from")
        self._held: Tensor | None = None
        first = self._read(torch.zeros(1, dtype=torch.int64))
        self.shape: tuple[int, ...] = tuple(first.shape[1:])
        if first.ndim != 4:
            raise DataError(f"images (C, H, W) are needed, the data has {self.shape}")
        if len(source) * first[0].numel() * 4 <= hold_bytes:
            whole = torch.split(torch.arange(len(source)), _BLOCK)
            self._held = torch.cat([self._read(b) for b in whole]).to(self.device)

    @property
    def held(self) -> Tensor | None:
        """All images (N, C, H, W) in network-input space, row by row; None when too large."""
        return self._held

    def take(self, rows: Tensor) -> Tensor:
        """The images at positions `rows`, (n, C, H, W) on the device."""
        if self._held is not None:
            return self._held[rows.to(self.device)]
        return self._read(rows).to(self.device, non_blocking=True)

    def draw(self, label: int, count: int, generator: Generator) -> Tensor:
        """`count` different random images of a class; all of them when it has fewer."""
        own = self.rows[label]
        return self.take(own[torch.randperm(len(own), generator=generator)[:count]])

    def _read(self, rows: Tensor) -> Tensor:
        images: Tensor = read_rows(self.source, rows, None).view("x")
        images = images.float()
        return images if self.preprocessing is None else self.preprocessing.transform(images)


def preprocessing_of(
    job: Job,
    space: Space,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing | None:
    """What brings images in [0, 1] to network-input space.

    Args:
        job: of the run.
        space: "mean_std", "zca" (fitted on the training split, as a stage) or "none".
        mean: per channel; that of the data when not given.
        std: per channel; that of the data when not given.

    Raises:
        DataError: the data does not say its mean and deviation, and none are given.
    """
    if space == "none":
        return None
    if space == "zca":
        return ZCA.from_tensors(job.once("whitening", lambda: _fit_zca(job.splits["train"])))
    about = job.task.about
    mean, std = mean or about.get("mean"), std or about.get("std")
    if mean is None or std is None:
        moments = job.once("moments", lambda: _moments(job.splits["train"]))
        mean, std = mean or moments["mean"], std or moments["std"]
    return MeanStd(tuple(float(m) for m in mean), tuple(float(s) for s in std))


def _fit_zca(source: Source) -> dict[str, Tensor]:
    return ZCA.fit(_all_images(source)).tensors()


def _moments(source: Source) -> dict[str, list[float]]:
    images = _all_images(source).double()
    return {
        "mean": images.mean((0, 2, 3)).tolist(),
        "std": images.std((0, 2, 3)).clamp_min(1e-8).tolist(),
    }


def _all_images(source: Source) -> Tensor:
    blocks = torch.split(torch.arange(len(source)), _BLOCK)
    return torch.cat([read_rows(source, b, None).view("x") for b in blocks])


def class_names(job: Job) -> tuple[str, ...]:
    """Names of the classes of a classification job.

    Raises:
        DataError: the data does not say them.
    """
    named = job.task.about.get("classes")
    if not named:
        raise DataError(f"the data '{job.splits.edition}' does not say its classes")
    return tuple(str(c) for c in named)


def initial_images(
    real: RealImages, ipc: int, init: Init, generator: Generator, *, factor: int = 1
) -> Tensor:
    """The first synthetic images, class by class.

    Args:
        real: images to choose from.
        ipc: images per class.
        init: "real", random ones; "noise", standard normal in network-input space; "smart",
            a greedy k-centre selection on pixels (after the coreset initialisation that the
            released DataDAM offers as files).
        generator: CPU generator; under one state "real" chooses the same images for every
            caller, so that comparisons begin equal.
        factor: each image is a mosaic of factor^2 different real images; the first tiles are
            of the images that factor 1 would choose. Noise has no tiles.

    Returns:
        (K * ipc, C, H, W).

    Raises:
        DataError: a class has fewer than `ipc` images.
    """
    if init == "noise":
        shape = (len(real.rows) * ipc, *real.shape)
        return torch.randn(shape, generator=generator).to(real.device)
    chosen = []
    needed = ipc * factor**2
    for number, rows in enumerate(real.rows):
        if len(rows) < needed:
            raise DataError(
                f"class {number} has {len(rows)} real images; {needed} per class were asked for"
            )
        if init == "real":
            chosen.append(rows[torch.randperm(len(rows), generator=generator)[:needed]])
        else:
            picked = k_centre(real.take(rows), needed, generator=generator)
            chosen.append(rows[picked.cpu()])
    if factor == 1:
        return real.take(torch.cat(chosen))
    return torch.cat([mosaic(real.take(rows), factor) for rows in chosen])


def set_of(
    images: Tensor,
    ipc: int,
    classes: Sequence[str],
    preprocessing: Preprocessing | None,
    decode: Decode | None = None,
) -> DistilledSet:
    """A distilled set of `ipc` images per class with hard labels, not yet distilled.

    Args:
        images: (K * ipc, C, H, W) in network-input space.
        ipc: images per class.
        classes: names.
        preprocessing: into network-input space.
        decode: of raw images; it is made to fit the space.
    """
    labels = torch.arange(len(classes)).repeat_interleave(ipc)
    return DistilledSet(
        images.detach().float().cpu(),
        labels,
        tuple(classes),
        preprocessing=preprocessing,
        decode=(decode or Decode()).normalised(preprocessing),
    )
