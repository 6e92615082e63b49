"""A small run, judge included, that a test makes in one process and in two, and compares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse import catalogue
from stillhouse.launch import run
from stillhouse.recipe import load_recipe
from stillhouse.stages.set_distillation import distilled_of


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Each number of processes trains its own experts.
    os.environ["STILLHOUSE_CACHE"] = str(folder / "cache")
    example = catalogue.load("datm").example(0)
    # Three experts, two a step: every other step leaves one process without any.
    example["settings"].update(experts=3, experts_per_step=2, lr_img=1.0, lr_y=0.5)
    recipe = load_recipe(
        {
            **example,
            "budget": {"steps": 12},
            "hardware": {"accelerator": "cpu"},
            "compare": [],
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "classes": 3, "rows": 33},
            },
        }
    )
    result = run(recipe, folder=folder / "run", progress=False)
    if int(os.environ.get("RANK", "0")) == 0:
        found = distilled_of(result.artifact)
        figures = result.sides["distilled"]["0"]
        assert found.label_logits is not None
        save_file(
            {
                "images": found.images,
                "label_logits": found.label_logits,
                "lr": torch.tensor(found.lr),
                "accuracy": torch.tensor(figures["accuracy"]),
                "skipped": torch.tensor(figures["skipped"]),
            },
            folder / "end.safetensors",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
