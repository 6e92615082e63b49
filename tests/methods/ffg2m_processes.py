"""A small run for a test that compares one process with two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse import catalogue
from stillhouse.artifact import plain_state
from stillhouse.launch import run
from stillhouse.recipe import load_recipe


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    example = catalogue.load("ffg2m").example(0)
    recipe = load_recipe(
        {
            **example,
            "settings": {"edges": 90},
            "student": {**example["student"], "options": {"width": 8, "dropout": 0.0}},
            "budget": {"steps": 20, "batch": 64, "lr": 0.01, "optimizer": "sgd"},
            "teacher": {
                "model": "stillhouse:gcn",
                "options": {"width": 8, "dropout": 0.0},
                "train": {"steps": 8, "batch": 25, "lr": 0.01, "optimizer": "sgd"},
            },
            "hardware": {"accelerator": "cpu"},
            "compare": [],
        }
    )
    result = run(recipe, folder=folder / "run", progress=False)
    if int(os.environ.get("RANK", "0")) == 0:
        figures = result.sides["distilled"]["0"]
        state = plain_state(result.artifact.module)
        for name in ("accuracy", "low_error", "high_error"):
            state[f"figure.{name}"] = torch.tensor(figures[name])
        save_file(state, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
