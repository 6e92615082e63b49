"""A small run of the queue, for a test that compares one process with two."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    from test_comodo import plain_run

    objective = plain_run(folder / "run")
    if int(os.environ.get("RANK", "0")) == 0:
        state = {name: value.clone() for name, value in objective.state_dict().items()}
        state["queue"] = objective.queue.last()
        state["place"] = objective.queue.place.clone()
        save_file(state, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
