"""Federated averaging of a small network, as another package would bring it: for tests.

Environment variables let a test look on and interfere: FEDAVG_WORK names a file to which every
piece of work is appended; FEDAVG_KILL names places such as `client:b:1,server:1`, at which a
process kills itself once, leaving a file of that name in the folder FEDAVG_KILLED.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from stillhouse.batch import Shuffled
from stillhouse.clock import Views
from stillhouse.method import Card, MethodConfig
from stillhouse.stages.federation import (
    FederatedMethod,
    Server,
    aggregate,
    packed,
    run_token,
    unpacked,
)


class Config(MethodConfig):
    """Settings of `fedavg-small`."""

    rounds: int = Field(3, description="rounds", json_schema_extra={"source": "chosen here"})


class Averaging:
    """Some steps of SGD on its own rows; its state counts them."""

    def __init__(self, job: Any, name: str) -> None:
        self.net, self.task, self.name = job.student(), job.task, name
        split = job.splits["train"]
        owners = job.task.about["parts"]["train"]
        self.source = split.sources[owners.index(name)]

    def answer(self, state, message, clock):
        noted(f"{self.name} {clock.step}")
        self.net.load_state_dict(unpacked("w", message))
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        order = Shuffled(self.source, 16, collate=self.task.collate)
        for rows in order.epoch(0, lambda: clock.rng("order")):
            batch = order.read(rows, Views(0))
            optimizer.zero_grad()
            sum(self.task.loss(self.net(batch.view("x")), batch).values()).backward()
            optimizer.step()
        die_if_told(f"client:{self.name}:{clock.step}")
        steps = int(state.get("steps", 0)) + len(self.source)
        return {"steps": steps}, {**packed("w", self.net.state_dict()), "rows": len(self.source)}


class FedAvgSmall(FederatedMethod):
    """Weights averaged by rows (McMahan et al. 2017)."""

    card = Card(
        id="fedavg-small",
        title="Federated averaging, small",
        summary="Averages weights.",
        kind="baseline",
        room="tests",
        stages=(("rounds", "train"),),
    )
    Config = Config

    def client(self, job, name):
        return Averaging(job, name)

    def run(self, job):
        net, names, transport = job.student(), self.clients(job), self.transport(job)
        server = Server(net.state_dict(), run_token(job.recipe))

        def one_round(server, clock):
            replies = server.ask(transport, packed("w", server.after), names)
            noted(f"server {clock.step}")
            die_if_told(f"server:{clock.step}")
            weights = [float(replies[n]["rows"]) for n in names]
            server.move(
                aggregate(server.after, [unpacked("w", replies[n]) for n in names], weights=weights)
            )

        job.loop("rounds", server, one_round, self.config.rounds, kind="train", save_each=True)
        net.load_state_dict(server.after)
        return job.model_artifact(net)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        sizes = {"a": 48, "b": 64, "c": 96}
        image = {"kind": "images", "shape": [1, 8, 8]}
        data = {n: {"name": "generated", "options": {**image, "rows": r}} for n, r in sizes.items()}
        return {
            "method": "fedavg-small",
            "data": {"name": "clients", "options": {"clients": data}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "hardware": {"threads": 1},
            "seed": seed,
        }


def noted(what: str) -> None:
    if path := os.environ.get("FEDAVG_WORK"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(what + "\n")


def die_if_told(where: str) -> None:
    told = os.environ.get("FEDAVG_KILL", "").split(",")
    if where not in told:
        return
    done = Path(os.environ["FEDAVG_KILLED"], where.replace(":", "-"))
    if not done.exists():
        done.write_text(where, encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)
