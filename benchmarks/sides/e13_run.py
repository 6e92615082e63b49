"""E13, the run: images from a mapped file, a teacher captured into a store, one epoch from it.

Arguments: the file of images, the folder of the run, rows, the teacher's numbers per row.
"""

import json
import mmap
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import stillhouse as still
from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views

file, home, rows, width = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
pixels = np.memmap(file, dtype=np.uint8, mode="r+", shape=(rows, 3, 32, 32))
pixels._mmap.madvise(mmap.MADV_RANDOM)  # as the store does by itself beyond the memory's room
held: list[float] = []


def private() -> float:
    """MiB of memory of its own, mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / 1024


class Watched(TensorSource):
    """Looks at the process's memory at each reading."""

    def read(self, positions, views: Views | None) -> Batch:
        """As its base does."""
        held.append(private())
        return super().read(positions, views)


class Linear(nn.Module):
    """One layer on shrunken images: what is measured is what is read and kept."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(48, outputs)

    def forward(self, x):
        """Logits."""
        return self.layer(nn.functional.avg_pool2d(x, 8).flatten(1))


target = torch.arange(rows) % width
data = Watched({"x": torch.from_numpy(pixels), "target": target})
still.distill(
    Linear(width),
    Linear(width),
    data,
    test=TensorSource({"x": torch.from_numpy(pixels[:256]), "target": target[:256]}),
    classes=width,
    store={"path": str(home / "store"), "batch": 256, "dtype": "float32"},
    compare=[],
    folder=home / "run",
    batch=256,
    epochs=1,
    lr=0.01,
    optimizer="sgd",
)
stored = sum(p.stat().st_size for p in (home / "store").rglob("*") if p.is_file())
steps = -(-rows // 256)
capture, train = held[:steps], held[-steps:]
tenth = max(1, steps // 10)
print(
    json.dumps(
        {
            "read_gb": (file.stat().st_size + stored) / 1e9,
            "capture_growth": max(capture[tenth:]) - capture[tenth],
            "train_growth": max(train[tenth:]) - train[tenth],
            "most": max(held),
        }
    )
)
