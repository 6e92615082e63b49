"""Generated tensors: for examples and contract tests, never for a measurement."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions


class GeneratedOptions(DataOptions):
    """Options of the generated data."""

    kind: Literal["vectors", "images", "tokens", "series"] = Field(
        "vectors",
        description="vectors (D,), images (C, H, W) in [0, 1], token ids (L,), or series (C, T) "
        "with a second view 'other' of the same moments",
    )
    shape: list[int] = Field(
        default_factory=list, description="of one sample; none: [6], [3, 16, 16], [12] or [3, 16]"
    )
    classes: int = Field(4, ge=2, description="number of classes")
    rows: int = Field(64, ge=8, description="rows of train; val and test have half of it")
    labels_per_class: int | None = Field(
        None,
        ge=1,
        description="rows of every class of train that keep their labels; the rest becomes the "
        "split 'unlabelled'",
    )
    pairs: bool = Field(
        False,
        description="rows are the sides of pairs, scored by the nearness of their classes",
    )


class Generated(DataSet[GeneratedOptions]):
    """Class centres with noise around them, simulated; learnable by a tiny model."""

    name = "generated"
    title = "simulated classes around random centres, for examples and tests"
    tasks = ("classification", "embedding", "representation")
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"
    Options = GeneratedOptions

    _shapes: ClassVar[dict[str, list[int]]] = {
        "vectors": [6],
        "images": [3, 16, 16],
        "tokens": [12],
        "series": [3, 16],
    }

    def open(self, options: GeneratedOptions, seed: int) -> Splits:
        """Draw the centres, then the rows of each split."""
        shape = options.shape or self._shapes[options.kind]
        centres = torch.randn(options.classes, *shape, generator=generator("generated", "centres"))
        sizes = {"train": options.rows, "val": options.rows // 2, "test": options.rows // 2}
        sources = {}
        for split, rows in sizes.items():
            rng = generator("generated", split)
            target = torch.arange(rows) % options.classes
            x = centres[target] + 0.5 * torch.randn(rows, *shape, generator=rng)
            views = {"x": self._view(options.kind, x), "target": target}
            if options.kind == "series":
                # Another sensor: its channels are others, and so is its noise.
                views["other"] = centres[target].flip(1) + 0.5 * torch.randn(
                    rows, *shape, generator=rng
                )
            if options.pairs:
                views |= _pairs(centres[target].flatten(1))
            sources[split] = TensorSource(views, name=f"generated {split}")
        about: dict[str, Any] = {"input": shape}
        if not options.pairs:
            about["classes"] = [f"class {c}" for c in range(options.classes)]
        if options.kind == "tokens":
            about["vocabulary"] = 64
        return Splits(sources, "generated (simulated)", about)

    @staticmethod
    def _view(kind: str, x: Tensor) -> Tensor:
        if kind == "images":
            return torch.sigmoid(x)
        if kind == "tokens":
            return (x * 8).round().long().remainder(63) + 1
        return x


def _pairs(centres: Tensor) -> dict[str, Tensor]:
    """Rows 2 p and 2 p + 1 as the sides of pair p, scored by the cosine of their centres."""
    rows = torch.arange(len(centres))
    places = torch.stack([rows // 2, rows % 2, torch.full_like(rows, len(rows) // 2)], dim=1)
    score = torch.cosine_similarity(centres[0::2], centres[1::2], dim=-1)
    return {"pair": places, "target": score.repeat_interleave(2)}
