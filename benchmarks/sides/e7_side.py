"""One side of E7: some iterations of a method; seconds and added memory of one of them."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from stillhouse.engine.loop import Stage
from stillhouse.launch import open_job
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method

ITERATIONS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "ncfm": {"pool_nets": 1, "pool_epochs": 1, "num_freqs": 512, "costs": []},
    "dm": {},
    "datadam": {},
    "datm": {
        "experts": 1,
        "expert_epochs": 3,
        "span": 1,
        "max_start": 2,
        "grow_from": 1,
        "grow_until": 2,
        "inner_steps": 10,
        "batch_syn": 0,
    },
}
SETTINGS["ncfm-released"] = {**SETTINGS["ncfm"], "batch_real": 1024, "num_freqs": 4096}
SETTINGS["ncfm-sampler"] = {**SETTINGS["ncfm"], "sampling_net": "scale_mixture"}
SETTINGS["datm-constant-memory"] = {**SETTINGS["datm"], "memory": "constant"}


def recipe_of(side: str, ipc: int, steps: int) -> Any:
    """Generated images of CIFAR-10's shape."""
    method = side.partition("-")[0]
    rows = 5000 if side == "ncfm-released" else 1000  # the others read 64 of a class
    options = {"kind": "images", "shape": [3, 32, 32], "classes": 10, "rows": rows, "val": 0}
    settings = {"ipc": ipc, "batch_real": 64, **SETTINGS[side]}
    if method == "datm":
        settings.pop("batch_real")  # experts have seen the real images
    return load_recipe(
        {
            "method": method,
            "data": {"name": "generated", "options": options},
            "student": {"model": "stillhouse:convnet", "options": {"width": 16, "depth": 3}},
            "settings": settings,
            "budget": {"steps": steps},
            "compare": [],
        }
    )


def resident(what: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Watched:
    """What the stage of the iterations adds to the resident set, data and networks left out."""

    def __init__(self) -> None:
        self.before = self.added = 0.0
        begin, finish = Stage.begin, Stage.finish

        def begun(stage: Stage) -> None:
            if stage.kind == "synthesis":
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
                self.before = resident("VmRSS")
            begin(stage)

        def finished(stage: Stage, result: Any) -> Any:
            if stage.kind == "synthesis":
                self.added = resident("VmHWM") - self.before
            return finish(stage, result)

        Stage.begin, Stage.finish = begun, finished


def main(side: str, ipc: int) -> None:
    """Warm up with one iteration, which makes pools and experts; then measure."""
    torch.set_num_threads(1)
    watched = Watched()
    with tempfile.TemporaryDirectory() as folder:
        for name, steps in (("warm", 1), ("measured", ITERATIONS)):
            recipe = recipe_of(side, ipc, steps)
            job = open_job(recipe, Path(folder) / name)
            open_method(recipe).run(job)
            job.log.close()
        stages = [s for s in job.stages if s["kind"] == "synthesis"]
    print(json.dumps({"s": stages[-1]["seconds"] / ITERATIONS, "mb": watched.added}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
