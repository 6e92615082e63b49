"""A whole run of two players, for a test that compares one process with two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillhouse.launch import open_job
from stillhouse.methods.generative.sfd import Sfd
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Each number of processes trains its own teacher.
    os.environ["STILLHOUSE_CACHE"] = str(folder / "cache")
    given = Sfd.example(0)
    given["teacher"]["options"]["dropout"] = 0.0
    given["settings"] |= {"override": "random", "score_label_dropout": 0.3}
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    given["hardware"] = {"devices": devices, "accelerator": "cpu", "precision": "64-true"}
    recipe = load_recipe(given)
    job, method = open_job(recipe, folder / "run"), open_method(recipe)
    artifact = method.run(job)
    figures = method.judge(job.judging(), artifact)
    if int(os.environ.get("RANK", "0")) == 0:
        state = {k: v.clone() for k, v in artifact.module.state_dict().items()}
        state["figures"] = torch.tensor([figures[k] for k in ("ua", "accuracy", "teacher_ua")])
        save_file(state, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
