"""A run with a store that a test starts in one process and in two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from test_capture import recipe, trained


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    chosen = recipe(
        {"path": str(folder / "store"), "dtype": "float32", "batch": 16},
        budget={"steps": 20, "batch": 16, "lr": 0.01, "optimizer": "sgd"},
        hardware={"accelerator": "cpu"},
    )
    state, job = trained(chosen, folder / "run")
    if job.hardware.is_main:
        print("world", job.hardware.world)
        save_file(state, folder / "end.safetensors")
    job.hardware.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
