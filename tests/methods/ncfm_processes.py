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
    example = catalogue.load("ncfm").example(0)
    example["settings"].update(ipc=2, batch_real=6, step="summed", costs=[], judge_epochs=10)
    recipe = load_recipe(
        {
            **example,
            "budget": {"steps": 10},
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
        images = distilled_of(result.artifact).images
        accuracy = torch.tensor(result.sides["distilled"]["0"]["accuracy"])
        save_file({"images": images, "accuracy": accuracy}, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
