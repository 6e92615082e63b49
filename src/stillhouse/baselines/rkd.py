r"""Relational knowledge distillation: how samples lie to each other, not where they lie.

Beside labels and soft targets, on the inputs of the last linear layers:

.. math::
    L = (1 - \alpha)\, CE + \alpha\, \tau^2 KL + w_d L_{distance} + w_a L_{angle}

with Huber's loss on the relative distances of pairs and on the cosines of triples within a batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.losses.relations import rkd_angle, rkd_distance
from stillhouse.method import Card, Claim, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.stages.soft_targets import SoftTargetsConfig
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want

EMBEDDING = Want("tap:head:input")
_TRIPLE = 3


class RKDObjective(Objective):
    """Labels, soft targets, and the relations of the embeddings within a batch.

    Args:
        student: net whose head's input is tapped.
        task: whose loss the labels use.
        config: see `RKD.Config`.
    """

    wants = (Want("logits"), EMBEDDING)
    batchwide = True

    def __init__(self, student: Net, task: Task, config: RKD.Config) -> None:
        super().__init__(student)
        self._task = task
        self.config = config
        student.add_tap("head:input")

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task`, `logits`, `relations/distance` and `relations/angle`."""
        config, valid = self.config, knowledge.valid
        out = self.student(batch.view("x"))
        terms = config.terms(self._task, out, batch, knowledge)
        own, theirs = out["taps"]["head:input"], knowledge.tensor(EMBEDDING.key)
        if valid is not None:
            own, theirs = own[valid], theirs[valid]
        # An epoch's last batch may be too small for relations: their terms then say nothing.
        few = len(own) < _TRIPLE
        for name, weight, loss in (
            ("distance", config.distance, rkd_distance),
            ("angle", config.angle, rkd_angle),
        ):
            if weight > 0:
                value = own.sum() * 0.0 if few else loss(own, theirs)
                terms[f"relations/{name}"] = weight * value
        return terms


class RKD(StudentTraining):
    """Distances and angles of the teacher's embeddings beside soft targets."""

    card = Card(
        id="rkd",
        kind="baseline",
        title="Relational Knowledge Distillation",
        summary="Distances and angles between a batch's embeddings, beside soft targets.",
        paper="CVPR 2019; arXiv 1904.05068",
        year=2019,
        authors=("Wonpyo Park", "Dongju Kim", "Yan Lu", "Minsu Cho"),
        links=("https://arxiv.org/abs/1904.05068", "https://github.com/lenscloth/RKD"),
        room="baselines",
        needs=("logits", "taps"),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(SoftTargetsConfig):
        """Settings of `rkd`."""

        distance: float = Field(
            25.0,
            ge=0,
            description="weight of the pairs' distances",
            json_schema_extra={"source": "paper, 4.2: 25 for classification"},
        )
        angle: float = Field(
            50.0,
            ge=0,
            description="weight of the triples' angles",
            json_schema_extra={"source": "paper, 4.2: 50 for classification"},
        )

        @model_validator(mode="after")
        def _some_relation(self) -> RKD.Config:
            if self.distance == 0 and self.angle == 0:
                raise ValueError("distance and angle are both 0: this is plain distillation, kd")
            return self

    variants: ClassVar[dict[str, Variant]] = {
        "soft-only": Variant(set={"alpha": 1.0}, about="no labels at all"),
        "distance": Variant(set={"angle": 0.0}, about="pairs only"),
        "angle": Variant(set={"distance": 0.0}, about="triples only"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "rkd", "supervised"),
    ]

    def objective(self, job: Any, student: Net, teacher: Any) -> Objective:
        """The student with its embedding tapped.

        Raises:
            RecipeError: several processes, each of which would see a part of the relations.
        """
        if job.hardware.world > 1:
            raise RecipeError(
                f"rkd relates all rows of a batch to each other; in {job.hardware.world} processes "
                "each would see its own alone: run it in one (hardware: {devices: 1})"
            )
        return RKDObjective(student, job.task, self.config)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "rkd",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
