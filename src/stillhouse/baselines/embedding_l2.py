r"""Regression onto a teacher's vectors, coordinate by coordinate.

With student vectors :math:`y_i` and teacher vectors :math:`\hat y_i` of one width,

.. math::
    L = \frac{1}{B} \sum_i d(y_i, \hat y_i), \qquad
    d \in \{ \lVert y - \hat y \rVert_2^2,\ \lVert y - \hat y \rVert_2,\
    \tfrac{1}{D} \lVert y - \hat y \rVert_2^2,\ 1 - \cos(y, \hat y) \}

The embedding-matching part of EmbedDistill (Kim et al. 2023, equations 7 and 8, the plain norm)
and what sentence-transformers offers as `EmbedDistillLoss`. Only (text, vector) pairs are needed,
so the teacher may be a module, a store, an endpoint or a function. For unit vectors the squared
norm is 2 (1 - cos).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.losses.features import Distance, vector_distance
from stillhouse.method import Card, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.teacher import Knowledge, Want


class EmbeddingL2Objective(Objective):
    """The mean distance of the student's vectors from the teacher's.

    Args:
        student: net with embedding (B, D).
        config: see `EmbeddingL2.Config`.
    """

    wants = (Want("embedding"),)

    def __init__(self, student: Net, config: EmbeddingL2.Config) -> None:
        super().__init__(student)
        self.config = config
        self._view = student.view

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `embedding`.

        Raises:
            ModelError: the teacher's vectors have another width.
        """
        ours = self.student(batch.view(self._view))["embedding"]
        theirs = knowledge.tensor("embedding")
        if ours.shape != theirs.shape:
            raise ModelError(
                f"the student's vectors have shape {tuple(ours.shape)}, the teacher's "
                f"{tuple(theirs.shape)}: give the student the teacher's width (options: "
                f"{{width: {theirs.shape[-1]}}})"
            )
        items = vector_distance(ours, theirs, self.config.distance)
        valid = knowledge.valid
        if valid is None:
            return {"embedding": items.mean()}
        spoken = valid.to(items.dtype)
        return {"embedding": (items * spoken).sum() / spoken.sum().clamp(min=1.0)}


class EmbeddingL2(StudentTraining):
    """The student learns the teacher's text-to-vector function by regression."""

    card = Card(
        id="embedding-l2",
        kind="baseline",
        title="EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval",
        summary="Regression onto a teacher's vectors, coordinate by coordinate.",
        paper="arXiv 2301.12005 (the embedding-matching part)",
        year=2023,
        authors=(
            "Seungyeon Kim",
            "Ankit Singh Rawat",
            "Manzil Zaheer",
            "Sadeep Jayasumana",
            "Veeranjaneyulu Sadhanala",
            "Wittawat Jitkrittum",
            "Aditya Krishna Menon",
            "Rob Fergus",
            "Sanjiv Kumar",
        ),
        links=("https://arxiv.org/abs/2301.12005",),
        room="baselines",
        task="embedding",
        needs=("vector",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `embedding-l2`."""

        distance: Distance = Field(
            "l2sq",
            description="of two vectors: l2sq the squared norm, l2 the norm, mse the squared norm "
            "over the width, cos 1 - cosine",
            json_schema_extra={
                "source": "chosen here; the paper: l2; sentence-transformers: cos, l2 or mse"
            },
        )

    variants: ClassVar[dict[str, Variant]] = {
        "l2": Variant(set={"distance": "l2"}, about="the norm, as EmbedDistill has it"),
        "mse": Variant(set={"distance": "mse"}, about="mean over coordinates"),
        "cos": Variant(set={"distance": "cos"}, about="direction only"),
    }

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """The distance from the teacher's vectors."""
        return EmbeddingL2Objective(student, self.config)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny perceptrons on generated vectors, judged on pairs of them."""
        return {
            "method": "embedding-l2",
            "task": "embedding",
            "data": {"name": "generated", "options": {"kind": "vectors", "pairs": True}},
            "teacher": {
                "model": "stillhouse:mlp",
                "options": {"widths": [16], "inputs": 6, "classes": 5},
            },
            "student": {
                "model": "stillhouse:mlp",
                "options": {"widths": [8], "inputs": 6, "classes": 5},
            },
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
