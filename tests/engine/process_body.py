"""A small training that a test runs in one process and in several, and compares."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from test_loop import Regression, data, recipe

from stillhouse.batch import Shuffled, Splits
from stillhouse.engine.hardware import Hardware
from stillhouse.engine.job import Job
from stillhouse.engine.log import RunLog
from stillhouse.objective import Objective
from stillhouse.parts.gradient import Project


class Pair(Objective):
    """Two terms over different counts, clock noise, and a proposal."""

    def __init__(self, student):
        super().__init__(student)
        self.register_buffer("seen", torch.zeros(()))

    def count(self, batch):
        return {"": batch.size, "masked": int((batch["target"][:, 0] > 0.2).sum())}

    def forward(self, batch, knowledge, clock):
        dtype = next(self.student.parameters()).dtype
        x = (batch.view("x") + 0.1 * clock.randn("noise", batch, 6)).to(dtype)
        target = batch["target"].to(dtype)
        y = self.student(x)["y"]
        error = (y - target).square().mean(1)
        return {
            "task": F.mse_loss(y, target),
            "masked": error[batch["target"][:, 0] > 0.2].mean(),
        }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    hardware = Hardware(accelerator="cpu")
    for kind in ("flat-sum", "flat-project", "ddp-sum", "fsdp-sum"):
        hardware.strategy, gradient = kind.split("-")
        train(folder / kind, hardware, gradient)
    hardware.strategy = "flat"
    train(folder / "flat-float64", hardware, "sum", torch.float64)


def train(
    folder: Path, hardware: Hardware, gradient: str, dtype: torch.dtype = torch.float32
) -> None:
    rows = 97  # uneven blocks in the last step
    job = Job(
        recipe(steps=20, epochs=None, batch=15, lr=0.01, momentum=0.9, warmup=0),
        Regression(Splits({"train": data(rows), "val": data(33)}, "toy")),
        folder,
        seed=3,
        hardware=hardware,
        log=RunLog(folder, enabled=hardware.is_main),
        models=None,
        cache=folder / "cache",
    )
    net = job.task.net(
        job.build(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), "s")
    )
    objective = Pair(net.to(dtype))
    how = Project(("task",), ("masked",)) if gradient == "project" else None
    order = Shuffled(job.splits["train"], 15)
    plain = dtype == torch.float32
    job.fit("student", objective, order, gradient=how, validate_every=10 if plain else None)
    scores = job.evaluate(net.float(), "val") if plain else {"error": 0.0}
    if hardware.is_main:
        state = {k: v.clone() for k, v in net.state_dict().items()}
        state["error"] = torch.tensor(scores["error"], dtype=torch.float64)
        save_file(state, folder / "end.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
