r"""LEAF: a small encoder learns a large one's text-to-vector function, in the same vector space.

Every distinct text is embedded once by the teacher (stage `capture`); all that is known of it is
its vectors. The student is an encoder, the mean over its real tokens, one linear layer to the
teacher's width, and unit length where the teacher's vectors have it:

.. math::
    y_i = \mathrm{unit}(W\, \mathrm{mean}(\mathrm{enc}(x_i)) + b), \qquad
    L = \frac{1}{B} \sum_i \lVert y_i - \hat y_i \rVert_2^2

Documents and queries are shuffled together; the learning rate falls in a straight line from
its top to a tenth of it, three times over with hard restarts. Since coordinates are matched one by
one, documents may stay indexed by the teacher while the student embeds the queries (asymmetric
use), and what holds of the teacher's coordinates (Matryoshka truncation, int8, bits) is inherited.

No training code was released. Known from secondary sources: the data, the students, the schedule,
AdamW, batch 32, the l2 error (its square is told by one of them; the plain norm fits the published
losses as well: `loss: l2`). Chosen here: the bias of the linear layer, weight decay, no warm-up,
clipping at 1, the step convention of the schedule.

A prefix that the teacher wants before queries belongs to the data (`data.options.prefix`), so that
teacher, store and student are given the same text. Vectors wider than the student's are cut to
their first coordinates (`width`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, read_rows
from stillhouse.clock import Clock
from stillhouse.errors import ModelError
from stillhouse.losses.features import Distance, vector_distance
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.schedule import cycles
from stillhouse.parts.vector_codes import prefix
from stillhouse.stages.judge_vectors import judge_vectors, tables
from stillhouse.stages.vectors import distinct, of_kind, remembered
from stillhouse.teacher import Knowledge, Teacher, Want

VECTOR = Want("embedding")
_PROBE = 32
_UNIT = 0.05


class LeafObjective(Objective):
    """The distance of the student's vectors from the teacher's: the term `embed`.

    Args:
        student: net with embedding (B, D).
        loss: see `losses.features.vector_distance`.
        width: first coordinates of the teacher that are learnt; None: all.
    """

    wants = (VECTOR,)
    student: Net

    def __init__(self, student: Net, loss: Distance = "l2sq", width: int | None = None) -> None:
        super().__init__(student)
        self.loss, self.width = loss, width
        self._view = student.view

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The mean over the rows on which the teacher has spoken.

        Raises:
            ModelError: the teacher's vectors have another width.
        """
        ours = self.student(batch.view(self._view))["embedding"]
        theirs = self.target(knowledge.tensor("embedding"))
        refuse_width(ours.shape[-1], theirs.shape[-1])
        items = vector_distance(ours, theirs, self.loss)
        if knowledge.valid is None:
            return {"embed": items.mean()}
        spoken = knowledge.valid.to(items.dtype)
        return {"embed": (items * spoken).sum() / spoken.sum().clamp(min=1.0)}

    def target(self, vectors: Tensor) -> Tensor:
        """What is learnt of the teacher's vectors (B, D): (B, width)."""
        return vectors if self.width is None else prefix(vectors, self.width)


class Leaf(StudentTraining):
    """A student whose vectors can stand in for the teacher's."""

    card = Card(
        id="leaf",
        title="LEAF: Knowledge Distillation of Text Embedding Models with Teacher-Aligned "
        "Representations",
        summary="A small text encoder in its teacher's own vector space, from vectors alone.",
        paper="arXiv 2509.12539",
        year=2025,
        authors=("Robin Vujanic", "Thomas Rueckstiess"),
        links=(
            "https://arxiv.org/abs/2509.12539",
            "https://huggingface.co/MongoDB/mdbr-leaf-ir",
        ),
        room="retrieval",
        task="embedding",
        needs=("vector",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
        reconstructed=True,
    )

    class Config(MethodConfig):
        """Settings of `leaf`."""

        loss: Distance = Field(
            "l2sq",
            description="of two vectors: l2sq the squared norm, l2 the norm, mse the squared norm "
            "over the width, cos 1 - cosine",
            json_schema_extra={"source": "one review: l2sq; the paper: 'l2 approximation error'"},
        )
        cycles: int = Field(
            3,
            ge=0,
            description="straight falls of the learning rate, one after another; 0: the schedule "
            "of the budget",
            json_schema_extra={"source": "secondary: 3 cycles of 10 epochs"},
        )
        floor: float = Field(
            0.1,
            ge=0,
            le=1,
            description="the learning rate at the end of a cycle, as a share of its top",
            json_schema_extra={"source": "secondary: 1e-4 to 1e-5"},
        )
        width: int | None = Field(
            None,
            ge=1,
            description="learn only so many first coordinates of a teacher with Matryoshka "
            "vectors; none: all",
            json_schema_extra={"source": "sheet, optional variants"},
        )
        texts: Literal["both", "documents", "queries"] = Field(
            "both",
            description="what is learnt from",
            json_schema_extra={"source": "secondary: both; queries alone are much worse"},
        )
        backbone: Literal["trained", "frozen"] = Field(
            "trained",
            description="frozen trains the last linear layer only",
            json_schema_extra={"source": "sheet, a baseline: linear probe to the teacher"},
        )
        cache: Literal["float32", "float16", "int8"] = Field(
            "float32",
            description="numbers of the teacher's vectors on disk, where the recipe's teacher "
            "asks for no store of its own",
            json_schema_extra={"source": "chosen here: float32; float16 errs by less than 1e-3"},
        )
        widths: list[int] = Field(
            [16, 32, 64, 128, 256, 384],
            description="numbers of first coordinates that are judged",
            json_schema_extra={"source": "sheet"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "l2": Variant(set={"loss": "l2"}, about="the norm, not squared"),
        "mse": Variant(set={"loss": "mse"}, about="mean over coordinates"),
        "cos": Variant(set={"loss": "cos"}, about="direction only; for unit vectors the same"),
        "queries-only": Variant(set={"texts": "queries"}, about="learns from queries alone"),
        "documents-only": Variant(set={"texts": "documents"}, about="learns from documents alone"),
        "frozen": Variant(
            set={"backbone": "frozen"}, about="linear probe of a random backbone to the teacher"
        ),
        "one-cycle": Variant(set={"cycles": 1}, about="one fall of the learning rate"),
        "published": Variant(
            about="the budget of the paper",
            budget={"epochs": 30, "batch": 32, "lr": 1e-4, "optimizer": "adamw", "clip": 1.0},
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim(
            "documents by the teacher and queries by the student find no less than the student "
            "alone",
            "asymmetric_ndcg@10",
            "leaf",
            "leaf",
            than_metric="ndcg@10",
        ),
        Claim(
            "in asymmetric use it beats relational distillation",
            "asymmetric_ndcg@10",
            "leaf",
            "similarity-matrix",
        ),
        Claim(
            "relational distillation is at chance in asymmetric use",
            "asymmetric_ndcg@10",
            "similarity-matrix",
            "similarity-matrix",
            "equal",
            margin=0.02,
            than_metric="chance_ndcg@10",
        ),
        Claim(
            "queries and documents teach more than queries alone",
            "ndcg@10",
            "leaf",
            "leaf/queries-only",
        ),
        Claim(
            "the cosine alone is as good for unit vectors",
            "ndcg@10",
            "leaf",
            "leaf/cos",
            "equal",
            margin=0.01,
        ),
        Claim(
            "beats the same student trained by contrast of pseudo pairs",
            "ndcg@10",
            "leaf",
            "pair-contrast",
        ),
        Claim("beats a linear probe of a random backbone", "ndcg@10", "leaf", "leaf/frozen"),
        Claim(
            "shortened vectors rank like the teacher's: rank correlation of the forms' figures",
            "curve_agreement",
            "leaf",
            "0.9",
        ),
        Claim("keeps 85 % of the teacher's nDCG@10", "retention", "leaf", "0.85"),
    ]

    judges_teacher = True

    def run(self, job: Any) -> Artifact:
        """The teacher's vectors, each text asked once; then the student."""
        job = distinct(job)
        objective = self.objective(job, job.student(), None)
        teacher = self.embed(job, objective)
        self._refuse_lengths(job, objective, teacher)
        job.fit("student", objective, self.order(job), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def embed(self, job: Any, objective: LeafObjective) -> Teacher:
        """The recipe's teacher, whatever it is, as a store of its vectors of all texts."""

        def accept(shapes: Mapping[str, Sequence[int]]) -> None:
            theirs = int(shapes["embedding"][-1])
            if self.config.width is not None and self.config.width > theirs:
                raise ModelError(
                    f"width: {self.config.width} coordinates cannot be learnt of vectors that "
                    f"have {theirs}"
                )
            refuse_width(_width(job, objective.student), self.config.width or theirs)

        teacher = remembered(job, self.config.cache, accept)
        teacher.bind(objective.wants, job.task)
        return teacher

    def objective(self, job: Any, student: Net, teacher: Any) -> LeafObjective:
        """The distance, and what of the student is trained."""
        if self.config.backbone == "frozen":
            head = student.head_layer()
            student.requires_grad_(False)
            head.requires_grad_(True)
        return LeafObjective(student, self.config.loss, self.config.width)

    def order(self, job: Any) -> Any:
        """Documents and queries shuffled together, or one kind of them."""
        kind = self.config.texts
        return job.order("train") if kind == "both" else of_kind(job, kind).order("train")

    def training(self, job: Any) -> dict[str, Any]:
        """The cycles of the learning rate."""
        if self.config.cycles == 0:
            return {}
        return {"schedule": cycles(self.config.cycles, self.config.floor)}

    def _refuse_lengths(self, job: Any, objective: LeafObjective, teacher: Teacher) -> None:
        """Vectors of unit length cannot match others.

        Raises:
            ModelError: the student scales its vectors to unit length, the teacher does not.
        """
        source = job.splits["train"]
        batch = read_rows(source, torch.arange(min(_PROBE, len(source))), None, job.task.collate)
        batch = batch.to(job.device)
        theirs = teacher.knowledge(batch).tensor("embedding")
        student = objective.student
        student.eval()
        with torch.no_grad():
            ours = student(batch.view(student.view))["embedding"]
        student.train()
        if _unit(ours) and not _unit(theirs) and self.config.loss != "cos":
            raise ModelError(
                "the student scales its vectors to unit length and the teacher's have lengths of "
                f"{float(theirs.norm(dim=-1).min()):.3g} to "
                f"{float(theirs.norm(dim=-1).max()):.3g}: give the student options: "
                "{normalise: false}, or learn the direction only (settings: {loss: cos})"
            )

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The student alone and beside its teacher, whole and shortened."""
        return judge_vectors(
            job,
            artifact.module,
            job.teacher(),
            widths=self.config.widths,
            width=self.config.width,
        )

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """Tables of the modes of use and of shortened vectors."""
        return {"tables": tables(artifact.meta["figures"], self.config.widths)}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny perceptrons on generated vectors, judged on pairs of them."""
        return {
            "method": "leaf",
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
            "settings": {"widths": [2, 4]},
            "budget": {"steps": 6, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }


def refuse_width(ours: int, theirs: int) -> None:
    """The student's vectors must be as wide as what is learnt of the teacher's.

    Raises:
        ModelError: they are not.
    """
    if ours != theirs:
        raise ModelError(
            f"the student's vectors have {ours} coordinates, those of the teacher {theirs}: give "
            f"the student the teacher's width (options: {{width: {theirs}}}), or learn its first "
            "coordinates (settings: {width: ...})"
        )


def _width(job: Any, student: Net) -> int:
    student.eval()
    with torch.no_grad():
        view = job.task.example_view(student.view)
        found = student(view.to(job.device) if isinstance(view, Tensor) else view)["embedding"]
    student.train()
    return int(found.shape[-1])


def _unit(vectors: Tensor) -> bool:
    return bool(((vectors.norm(dim=-1) - 1.0).abs() < _UNIT).all())
