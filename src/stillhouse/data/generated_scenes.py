"""Generated scenes with a class for every pixel: for examples and tests, never to measure on."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Source, Splits
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.label_maps import SceneOptions, SceneSource, about_scenes
from stillhouse.losses.spatial import IGNORE


class SceneShape(SceneOptions):
    """Options of the generated scenes."""

    side: int = Field(24, ge=8, le=256, description="height and width of a scene, px")
    classes: int = Field(3, ge=2, le=32, description="number of classes, the ground among them")
    rows: int = Field(16, ge=4, description="scenes of train; val and test have half of it")
    void: bool = Field(True, description="a strip at the right border is ignored")


class GeneratedScenes(DataSet[SceneShape]):
    """Rectangles of a colour per class on a ground, with noise, simulated."""

    name = "generated-scenes"
    title = "simulated scenes of coloured rectangles with label maps, for examples and tests"
    tasks = ("segmentation",)
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"

    Options = SceneShape

    def open(self, options: SceneShape, seed: int) -> Splits:
        """Draw the scenes of each split."""
        colours = torch.rand(options.classes, 3, generator=generator("generated-scenes", "colours"))
        sizes = {"train": options.rows, "val": options.rows // 2, "test": options.rows // 2}
        sources: dict[str, Source] = {}
        for role, rows in sizes.items():
            labels = _scenes(rows, options, role)
            noise = torch.randn(
                rows, 3, options.side, options.side, generator=generator("generated-scenes", role)
            )
            shown = colours[labels].permute(0, 3, 1, 2) + 0.1 * noise
            if options.void:
                labels[..., -2:] = IGNORE
            sources[role] = SceneSource(
                {
                    "x": (shown.clamp(0, 1) * 255).round().to(torch.uint8),
                    "target": labels.to(torch.int16),
                },
                augment=options.augmentation() if role == "train" else None,
                name=f"generated scenes {role}",
            )
        names = [f"class {c}" for c in range(options.classes)]
        size = (options.side, options.side)
        about = about_scenes(names, size, [0.5] * 3, [0.25] * 3, options.class_weights)
        return Splits(sources, "generated scenes (simulated)", about)


def _scenes(rows: int, options: SceneShape, role: str) -> Tensor:
    """Label maps (rows, side, side): the ground is class 0, one rectangle of each other class."""
    rng = generator("generated-scenes", role, "places")
    labels = torch.zeros(rows, options.side, options.side, dtype=torch.int64)
    for row in range(rows):
        for label in range(1, options.classes):
            top, left, tall, wide = (
                (torch.rand(4, generator=rng) * options.side / 2).long().tolist()
            )
            labels[row, top : top + tall + 3, left : left + wide + 3] = label
    return labels
