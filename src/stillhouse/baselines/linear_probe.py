"""A linear probe: a trained last layer on the frozen features of a pretrained model.

The features are captured once into a store, which every seed and every later run on the same
data reads again; the last linear layer is trained on them. It is the cheapest strong teacher
where a pretrained encoder is at hand, and a yardstick for what its features hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.method import Card, Method, MethodConfig
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.recipe import StoreSpec
from stillhouse.stages.capture import captured
from stillhouse.task import Task
from stillhouse.teacher import Knowledge
from stillhouse.teachers.headed import FEATURES, Headed
from stillhouse.teachers.live import Live
from stillhouse.teachers.stored import Stored


class HeadObjective(Objective):
    """The task's loss on the last linear layer alone, which reads stored features.

    Args:
        net: whose last linear layer is trained, in place.
        task: whose loss it is.
    """

    wants = (FEATURES,)

    def __init__(self, net: Net, task: Task) -> None:
        super().__init__(net.head_layer())
        self._loss = task.loss
        self._net = (net,)  # in a tuple it is no child: only the head is trained and saved

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The task's terms."""
        return self._loss({"logits": self.student(knowledge.tensor(FEATURES.key))}, batch)

    def export(self) -> nn.Module:
        """The whole net."""
        return self._net[0]


class LinearProbe(Method):
    """Trains the last linear layer of a student on the stored features of all before it."""

    card = Card(
        id="linear-probe",
        kind="baseline",
        title="Linear probe on frozen features",
        summary="Only the last linear layer is trained, on features that are stored once.",
        room="baselines",
        yields="model",
        stages=(("capture", "capture"), ("head", "train")),
    )
    Config = MethodConfig

    def run(self, job: Any) -> Artifact:
        """Capture the features, then train the head on them."""
        net = job.student()
        head = net.head_layer()
        self._stored = self._features(job, net, head)
        for parameter in head.parameters():
            parameter.requires_grad_(True)
        job.fit("head", HeadObjective(net, job.task), job.order("train"), teacher=self._stored)
        artifact: Artifact = job.model_artifact(net)
        return artifact

    def teacher(self, job: Any, artifact: Artifact) -> Headed:
        """The stored features under the trained head."""
        net = artifact.module
        assert isinstance(net, Net)
        return Headed(net, self._stored)

    def _features(self, job: Any, net: Net, head: nn.Linear) -> Stored:
        """The store of the features, which do not depend on the head.

        While it is named by the net's weights, the head is blank, so that all seeds share it.
        """
        initial = {name: value.clone() for name, value in head.state_dict().items()}
        with torch.no_grad():
            for value in head.parameters():
                value.zero_()
        # Who is taught by this probe may read rows without labels too.
        splits = [role for role in ("train", "unlabelled") if role in job.splits]
        teacher = captured(job, Live(net), StoreSpec(dtype="float32"), splits)
        teacher.bind(HeadObjective.wants, job.task)
        head.load_state_dict(initial)
        assert teacher.stored is not None
        return teacher.stored

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny multilayer perceptron on generated vectors."""
        return {
            "method": "linear-probe",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
