r"""Relational distillation of vectors: the student has the teacher's similarities, not its space.

.. math::
    L = \frac{1}{B^2} \sum_{i,j} \left( \cos(y_i, y_j) - \cos(\hat y_i, \hat y_j) \right)^2

As in similarity-preserving distillation (Tung and Mori 2019), with cosines for both sides. Blind to
a rotation of the student's vectors, which therefore cannot be compared with the teacher's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.losses.relations import similarity_matrix
from stillhouse.method import Card, StudentTraining
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.stages.judge_vectors import judge_vectors, tables
from stillhouse.stages.vectors import ComparedConfig, distinct, remembered
from stillhouse.teacher import Knowledge, Want


class SimilarityMatrixObjective(Objective):
    """The term `relations`: similarities within a batch.

    Args:
        student: net with embedding (B, d).
    """

    wants = (Want("embedding"),)
    batchwide = True
    student: Net

    def __init__(self, student: Net) -> None:
        super().__init__(student)
        self._view = student.view

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The mean over all pairs of rows on which the teacher has spoken."""
        ours = self.student(batch.view(self._view))["embedding"]
        theirs, valid = knowledge.tensor("embedding"), knowledge.valid
        if valid is not None:
            if not bool(valid.any()):
                return {"relations": ours.sum() * 0.0}
            ours, theirs = ours[valid], theirs[valid]
        return {"relations": similarity_matrix(ours, theirs)}


class SimilarityMatrix(StudentTraining):
    """Similarities within a batch in place of the vectors themselves."""

    card = Card(
        id="similarity-matrix",
        kind="baseline",
        title="Similarity-Preserving Knowledge Distillation",
        summary="The teacher's similarities within a batch, not its vectors.",
        paper="ICCV 2019; arXiv 1907.09682 (with cosines of embeddings)",
        year=2019,
        authors=("Frederick Tung", "Greg Mori"),
        links=("https://arxiv.org/abs/1907.09682",),
        room="baselines",
        task="embedding",
        needs=("vector",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(ComparedConfig):
        """Settings of `similarity-matrix`."""

    def run(self, job: Any) -> Artifact:
        """The teacher's vectors, each text asked once; then the student."""
        job = distinct(job)
        objective = self.objective(job, job.student(), None)
        teacher = remembered(job, self.config.cache)
        job.fit("student", objective, self.order(job), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def objective(self, job: Any, student: Net, teacher: Any) -> Objective:
        """The similarities of a batch.

        Raises:
            RecipeError: several processes, each of which would see a part of the relations.
        """
        if job.hardware.world > 1:
            raise RecipeError(
                "similarity-matrix relates all rows of a batch to each other; in "
                f"{job.hardware.world} processes each would see its own alone: run it in one "
                "(hardware: {devices: 1})"
            )
        return SimilarityMatrixObjective(student)

    def training(self, job: Any) -> dict[str, Any]:
        """The cycles of the learning rate, if there are any."""
        given: dict[str, Any] = self.config.training()
        return given

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The student alone and beside its teacher."""
        return judge_vectors(job, artifact.module, job.teacher(), widths=self.config.widths)

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Tables of the modes of use and of shortened vectors."""
        return {"tables": tables(artifact.meta["figures"], self.config.widths)}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny perceptrons on generated vectors, judged on pairs of them."""
        model = {"model": "stillhouse:mlp"}
        return {
            "method": "similarity-matrix",
            "task": "embedding",
            "data": {"name": "generated", "options": {"kind": "vectors", "pairs": True}},
            "teacher": {**model, "options": {"widths": [16], "inputs": 6, "classes": 5}},
            "student": {**model, "options": {"widths": [8], "inputs": 6, "classes": 5}},
            "settings": {"widths": [2, 4]},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
