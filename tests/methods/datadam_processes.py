"""A small synthesis that a test runs in one process and in two, and compares."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse import catalogue
from stillhouse.launch import open_job, open_method
from stillhouse.recipe import load_recipe
from stillhouse.stages.set_distillation import distilled_of


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    example = catalogue.load("datadam").example(0)
    example["settings"].update(ipc=2, batch_real=6, lr_img=0.01)
    recipe = load_recipe(
        {
            **example,
            "budget": {"steps": 20},
            "hardware": {"accelerator": "cpu"},
            "compare": [],
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "classes": 3, "rows": 33},
            },
        }
    )
    job = open_job(recipe, folder)
    images = distilled_of(open_method(recipe).run(job)).images
    if job.hardware.is_main:
        save_file({"images": images}, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
