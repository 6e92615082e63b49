"""Generated pairs of low- and high-resolution images: for examples and contract tests."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions
from stillhouse.parts.degrade import downscale


class PairShape(DataOptions):
    """Options of the generated pairs."""

    scale: int = Field(2, ge=1, le=4, description="HR size / LR size")
    side: int = Field(32, ge=16, le=128, description="of the high-resolution image, px")
    rows: int = Field(16, ge=4, description="images of train; val and test have a quarter of it")


class GeneratedPairs(DataSet[PairShape]):
    """Smooth random textures, reduced by Matlab's bicubic rule; never for a measurement."""

    name = "generated-pairs"
    title = "simulated textures with their low-resolution versions, for examples and tests"
    tasks = ("super-resolution",)
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"

    Options = PairShape

    def open(self, options: PairShape, seed: int) -> Splits:
        """Draw the images of each split."""
        side = options.side - options.side % options.scale
        sizes = {"train": options.rows, "val": options.rows // 4, "test": options.rows // 4}
        sources = {}
        for split, rows in sizes.items():
            large = (_textures(rows, side, split) * 255).round().to(torch.uint8)
            small = large if options.scale == 1 else downscale(large, options.scale)
            sources[split] = TensorSource(
                {"x": small, "target": large}, name=f"generated pairs {split}"
            )
        about = {
            "scale": options.scale,
            "factor": float(options.scale),
            "enlarge": False,
            "channels": 3,
            "input": (3, side // options.scale, side // options.scale),
        }
        return Splits(sources, "generated pairs (simulated)", about)


def _textures(rows: int, side: int, split: str) -> Tensor:
    """Random grids of two scales, enlarged and added: (rows, 3, side, side) in [0, 1]."""
    rng = generator("generated-pairs", split)
    total = torch.zeros(rows, 3, side, side)
    for cells in (4, 8):
        grid = torch.rand(rows, 3, cells, cells, generator=rng)
        total += F.interpolate(grid, size=(side, side), mode="bilinear") / 2
    return total.clamp_(0.0, 1.0)
