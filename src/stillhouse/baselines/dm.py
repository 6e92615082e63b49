"""Distribution matching (Zhao & Bilen, WACV 2023): class means in random embeddings.

A fresh random network per step; per class, real and synthetic images under one siamese
augmentation; the loss is the sum over classes of the squared distance between mean embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from stillhouse.method import Card, Claim, Variant
from stillhouse.parts.augment import DSA
from stillhouse.parts.distilled_set import DistilledSet
from stillhouse.parts.net_pool import NetPool
from stillhouse.parts.pixel_matching import DrawReal, MeanMatching
from stillhouse.stages.pixel_distillation import PixelConfig, PixelDistillation


class DM(PixelDistillation):
    """Mean embeddings of real and synthetic images are matched in random networks."""

    card = Card(
        id="dm",
        kind="baseline",
        title="Dataset Condensation with Distribution Matching",
        summary="A tiny data set whose class means in random embeddings are those of the real "
        "data.",
        paper="WACV 2023; arXiv 2110.04181",
        year=2023,
        authors=("Bo Zhao", "Hakan Bilen"),
        links=(
            "https://arxiv.org/abs/2110.04181",
            "https://github.com/VICO-UoE/DatasetCondensation",
        ),
        room="baselines",
        yields="dataset",
        stages=(
            ("whitening?", "closed"),
            ("moments?", "closed"),
            ("initial images", "closed"),
            ("scan?", "synthesis"),
            ("match", "synthesis"),
            ("judge", "judge"),
        ),
    )
    compares: ClassVar[bool] = False

    class Config(PixelConfig):
        """Settings of `dm`. Iterations are `budget.steps`; the paper takes 20,000."""

        batch_real: int = Field(
            256,
            ge=1,
            description="real images per class and step; a smaller class gives all it has",
            json_schema_extra={"source": "released code"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "mosaic": Variant(set={"factor": 2}, about="stored images are mosaics of four"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats random real images", "accuracy", "dm", "random-real"),
        Claim("beats real images near k-means centres", "accuracy", "dm", "k-means"),
    ]

    def objective(
        self,
        start: DistilledSet,
        pool: NetPool,
        draw_real: DrawReal,
        layers: Sequence[str],
        *,
        batch_statistics: bool = False,
    ) -> MeanMatching:
        """Mean embeddings."""
        config = self.config
        return MeanMatching(
            start,
            pool,
            draw_real,
            batch_real=config.batch_real,
            augment=DSA(config.augment, siamese=True, align_corners=config.align_corners),
            class_chunk=config.class_chunk,
            batch_statistics=batch_statistics,
        )

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated images of 8x8, a ConvNet of depth 2 and width 4, one image per class."""
        return {
            "method": "dm",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
            "settings": {"ipc": 1, "batch_real": 4, "judge_epochs": 4, "judge_nets": 1},
            "budget": {"steps": 4},
            "seed": seed,
        }
