r"""FitNet: the student's embedding is led to the teacher's by a learnt projection.

Beside labels and soft targets, with :math:`h` the inputs of the last linear layers and a linear
map :math:`A` that is learnt with the student and thrown away:

.. math::
    L = (1 - \alpha)\, CE + \alpha\, \tau^2 KL + w\, \tfrac1D \| A h^s - h^t \|^2

Romero et al. 2015 guide a middle layer in a first stage; the joint loss on the embedding is the
form that later comparisons use.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import TeacherError
from stillhouse.losses.chunked import wide
from stillhouse.method import Card, Claim, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.heads import ExtraHead
from stillhouse.stages.soft_targets import SoftTargetsConfig
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want, to_device

EMBEDDING = Want("tap:head:input")


class FitNetObjective(Objective):
    """Labels, soft targets, and the distance of the projected embedding.

    Args:
        student: net whose head's input is tapped.
        task: whose loss the labels use.
        config: see `FitNet.Config`.
        projector: from the student's embedding to the teacher's width.
    """

    wants = (Want("logits"), EMBEDDING)

    def __init__(
        self, student: Net, task: Task, config: FitNet.Config, projector: ExtraHead
    ) -> None:
        super().__init__(student)
        self._task = task
        self.config = config
        self.projector = projector
        student.add_tap("head:input")

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task`, `logits` and `features`."""
        config, valid = self.config, knowledge.valid
        out = self.student(batch.view("x"))
        terms = config.terms(self._task, out, batch, knowledge)
        guided = wide(self.projector(out["taps"]["head:input"]))
        rows = F.mse_loss(guided, wide(knowledge.tensor(EMBEDDING.key)), reduction="none").mean(-1)
        mean = rows.mean() if valid is None else (rows * valid).sum() / valid.sum().clamp(min=1)
        terms["features"] = config.weight * mean
        return terms


class FitNet(StudentTraining):
    """Regression of the teacher's embedding beside soft targets."""

    card = Card(
        id="fitnet",
        kind="baseline",
        title="FitNets: Hints for Thin Deep Nets",
        summary="The student's embedding is led to the teacher's by a learnt linear map.",
        paper="ICLR 2015; arXiv 1412.6550",
        year=2015,
        authors=(
            "Adriana Romero",
            "Nicolas Ballas",
            "Samira Ebrahimi Kahou",
            "Antoine Chassang",
            "Carlo Gatta",
            "Yoshua Bengio",
        ),
        links=("https://arxiv.org/abs/1412.6550",),
        room="baselines",
        needs=("logits", "taps"),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(SoftTargetsConfig):
        """Settings of `fitnet`."""

        weight: float = Field(
            1.0,
            gt=0,
            description="of the embedding's mean squared error",
            json_schema_extra={"source": "chosen here; published weights lie between 1 and 100"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "soft-only": Variant(set={"alpha": 1.0}, about="no labels at all"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the student alone at equal steps", "accuracy", "fitnet", "supervised"),
    ]

    def objective(self, job: Any, student: Net, teacher: Any) -> Objective:
        """The student with a projection to the width of the teacher's embedding.

        Raises:
            TeacherError: the teacher gives no vector per row as its head's input.
        """
        teacher.bind(FitNetObjective.wants, job.task)
        to_device(teacher, job.device)
        row = job.order("train", 1, shuffle=False, augment=augmented(job))
        batch = row.read(row.epoch(0, lambda: job.rng("row"))[0], job.views()).to(job.device)
        shape = teacher.knowledge(batch).tensor(EMBEDDING.key).shape
        if len(shape) != 2:
            raise TeacherError(
                f"the teacher's embedding is {tuple(shape[1:])} per row; a vector is needed"
            )
        widths = (student.head_layer().in_features, shape[1])
        projector = job.build(lambda: ExtraHead(widths), "projector")
        return FitNetObjective(student, job.task, self.config, projector)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny multilayer perceptrons on generated vectors."""
        return {
            "method": "fitnet",
            "data": {"name": "generated", "options": {"kind": "vectors"}},
            "teacher": {"model": "stillhouse:mlp", "options": {"widths": [16]}},
            "student": {"model": "stillhouse:mlp", "options": {"widths": [8]}},
            "budget": {"steps": 4, "batch": 16, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }


def augmented(job: Any) -> bool:
    """Whether a store keeps augmented views, and no plain ones."""
    store = getattr(getattr(job.recipe, "teacher", None), "store", None)
    return store is not None and bool(store.draws)
