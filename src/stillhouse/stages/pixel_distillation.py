"""Distilling a data set by moving its pixels: what such methods share beside their distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch.optim import SGD

from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job
from stillhouse.errors import RecipeError
from stillhouse.method import MethodConfig
from stillhouse.net import Net
from stillhouse.parts.distilled_set import Decode, DistilledSet
from stillhouse.parts.net_pool import NetPool
from stillhouse.parts.pixel_matching import DrawReal, PixelMatching
from stillhouse.stages.fresh_nets import (
    has_batch_statistics,
    layers_of,
    network_factory,
    tapped_net,
)
from stillhouse.stages.initial_set import RealImages
from stillhouse.stages.set_distillation import SetConfig, SetDistillation

ITERATIONS = 8000


class PixelConfig(SetConfig):
    """Settings of methods that move pixels. Iterations are `budget.steps`, 8000 by default."""

    shared: ClassVar[frozenset[str]] = SetConfig.shared | {
        "init", "batch_real", "momentum_img", "lr_scan", "scan_steps", "scan_nets",
        "class_chunk", "align_corners", "evaluate_nets",
    }  # fmt: skip

    init: Literal["real", "noise", "smart"] = Field(
        "real",
        description="first images: random real ones, noise, or a k-centre selection",
        json_schema_extra={"source": "released codes: real"},
    )
    batch_real: int = Field(
        64,
        ge=1,
        description="real images per class and step; a smaller class gives all it has",
        json_schema_extra={"source": "released code of DataDAM, argparse; DM: 256"},
    )
    lr_img: float | None = Field(
        None,
        gt=0,
        description="pixel learning rate; none: the method's own",
        json_schema_extra={"source": "released codes"},
    )
    momentum_img: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="of the pixel SGD",
        json_schema_extra={"source": "released codes"},
    )
    lr_scan: list[float] = Field(
        default_factory=list,
        description="pixel learning rates tried on validation data in place of lr_img",
        json_schema_extra={"source": "losses sum over pixels: tune anew per network width"},
    )
    scan_steps: int | None = Field(
        None,
        ge=1,
        description="iterations per point of the scan; none: a quarter",
        json_schema_extra={"source": "house setting"},
    )
    scan_nets: int = Field(
        1,
        ge=1,
        description="fresh networks per point of the scan",
        json_schema_extra={"source": "house setting"},
    )
    class_chunk: int = Field(
        1,
        ge=0,
        description="classes in the network at a time (memory; the result is the same); 0: all",
        json_schema_extra={"source": "the loss is a sum over classes"},
    )
    align_corners: bool = Field(
        False,
        description="of the augmentation's resampling",
        json_schema_extra={"source": "released code of DSA, DM and DataDAM"},
    )
    factor: int = Field(
        1,
        ge=1,
        description="tiles per side of a stored image; 2: each holds four images of its class at "
        "half the side, brought to full size for matching and training",
        json_schema_extra={"source": "IDC, NCFM: 2; other released codes: 1"},
    )
    evaluate_nets: int = Field(
        1,
        ge=1,
        description="fresh networks per evaluation on validation data, every "
        "budget.validate_every iterations when that is given",
        json_schema_extra={"source": "released code: 10 networks every 2000 iterations"},
    )


class PixelDistillation(SetDistillation):
    """Base of methods that match real and synthetic images in fresh random networks.

    A subclass writes `objective` and, where released code has a rule for it, `default_rate`.
    """

    Config: ClassVar[type[MethodConfig]] = PixelConfig

    def objective(
        self,
        start: DistilledSet,
        pool: NetPool,
        draw_real: DrawReal,
        layers: Sequence[str],
        *,
        batch_statistics: bool = False,
    ) -> PixelMatching:
        """The loss on the pixels.

        Args:
            start: the set before distillation.
            pool: of Nets with the taps `layers` and "embed".
            draw_real: gives real images of a class.
            layers: aliases of the tapped layers, in order.
            batch_statistics: the networks normalise over the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define objective")

    def default_rate(self) -> float:
        """The pixel learning rate when none is scanned."""
        return float(self.config.lr_img or 1.0)

    def run(self, job: Job) -> Artifact:
        """First images; a scan of the pixel learning rate if asked for; matching."""
        if job.budget.ema is not None:
            raise RecipeError("pixels are not averaged here: remove budget.ema")
        real = self.real_images(job)
        start = self.initial_set(job, real, self.config.init, Decode(self.config.factor))
        steps = job.budget.steps or ITERATIONS
        few = self.config.scan_steps or max(1, steps // 4)
        rate, table = self.scanned_rate(
            job,
            self.config.lr_scan or [self.default_rate()],
            lambda child, lr: self.matched(child, start, real, lr, few),
            self.config.scan_nets,
        )
        distilled = self.matched(job, start, real, rate, steps)
        return self.artifact_of(job, distilled, lr_img=rate, iterations=steps, scan=table)

    def matched(
        self, job: Job, start: DistilledSet, real: RealImages, lr: float, steps: int
    ) -> DistilledSet:
        """The set after `steps` iterations, as the stage "match"."""
        objective = self.built(job, start, real.draw)
        momentum = self.config.momentum_img
        self.match(job, objective, steps, lambda pixels: SGD(pixels, lr=lr, momentum=momentum))
        return objective.distilled()

    def built(self, job: Job, start: DistilledSet, draw_real: DrawReal) -> PixelMatching:
        """The objective with a pool of the recipe's network, freshly drawn every step."""
        make = network_factory(job)
        taps = job.recipe.student.taps

        def tapped() -> Net:
            return tapped_net(make(), taps)

        pool = NetPool(tapped, device=job.device)
        sample = pool.fresh(job.rng("sample net"))
        assert isinstance(sample, Net)
        statistics = has_batch_statistics(sample)
        layers = layers_of(sample)
        return self.objective(start, pool, draw_real, layers, batch_statistics=statistics)
