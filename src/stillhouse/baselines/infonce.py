r"""InfoNCE between modalities: pick the own clip of the teacher among those of the batch.

.. math:: L = -\frac{1}{B} \sum_i \log
          \frac{\exp(\cos(g(f(x_i)), h_i) / \tau)}{\sum_j \exp(\cos(g(f(x_i)), h_j) / \tau)}

with the teacher's vectors h and a head g of the student that leaves at the end: IMU2CLIP (Moon et
al. 2023) in the form of COMODO's released baseline (one linear layer, tau = .1). `symmetric` adds
the other direction (their sum, not their mean).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from stillhouse.batch import Batch, together
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.losses.contrastive import infonce
from stillhouse.method import Card, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.across import whole_batch
from stillhouse.parts.projector import Projector
from stillhouse.parts.schedule import warmup_linear
from stillhouse.stages.vector_widths import LEARNED, student_width, teacher_width
from stillhouse.teacher import Knowledge, Want


class InfoNCEObjective(Objective):
    """The own pair against the other pairs of the batch.

    Args:
        student: net with embedding (B, E).
        head: from E to the teacher's width.
        config: see `InfoNCE.Config`.
    """

    wants = (Want("embedding"),)
    batchwide = True

    def __init__(self, student: Net, head: nn.Module, config: InfoNCE.Config) -> None:
        super().__init__(student)
        self.head = head
        self.config = config
        self._view = student.view

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The term `contrast`; with several processes against the pairs of all of them."""
        theirs = knowledge.tensor("embedding")
        positives = None
        if clock.world > 1:
            positives = batch.rows.to(theirs.device)
            theirs = whole_batch(theirs, batch.of, clock)
        if batch.size == 0:  # a last batch that is smaller than the number of processes
            return {}
        ours = self.head(self.student(batch.view(self._view))["embedding"])
        loss = infonce(
            ours,
            theirs,
            positives=positives,
            temperature=self.config.temperature,
            symmetric=self.config.symmetric,
        )
        return {"contrast": loss}


class InfoNCE(StudentTraining):
    """The student's vector must be nearer to its own teacher's than to the others' of the batch."""

    card = Card(
        id="infonce",
        kind="baseline",
        title="IMU2CLIP: Multimodal Contrastive Learning for IMU Motion Sensors from Egocentric "
        "Videos and Text",
        summary="Contrast of a student's vectors with a teacher's over the pairs of a batch.",
        paper="arXiv 2210.14395; loss arXiv 1807.03748",
        year=2023,
        authors=(
            "Seungwhan Moon",
            "Andrea Madotto",
            "Zhaojiang Lin",
            "Alireza Dirafzoon",
            "Aparajita Saraf",
            "Amy Bearman",
            "Babak Damavandi",
        ),
        links=("https://arxiv.org/abs/2210.14395",),
        room="baselines",
        task="representation",
        needs=("vector",),
        yields="model",
        stages=(("teacher?", "train"), ("capture?", "capture"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `infonce`."""

        temperature: float = Field(
            0.1,
            gt=0,
            description="tau",
            json_schema_extra={"source": "COMODO's code, loss.py"},
        )
        symmetric: bool = Field(
            False,
            description="add the direction from the teacher to the student",
            json_schema_extra={"source": "COMODO's code, loss.py (option)"},
        )
        warmup: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="share of the steps that the rate rises, before its linear fall; 0: the "
            "schedule of the budget",
            json_schema_extra={"source": "COMODO's code, train.py"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "symmetric": Variant(set={"symmetric": True}, about="both directions"),
    }

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """The contrast, with a linear head to the teacher's width.

        Raises:
            RecipeError: both directions under several processes.
        """
        if self.config.symmetric and job.hardware.world > 1:
            raise RecipeError(
                "the symmetric form needs the gradient of all rows on one process; run it on one"
            )
        widths = student_width(job, student), teacher_width(job, teacher)
        head = job.build(lambda: Projector(*widths), "head")
        return InfoNCEObjective(student, head, self.config)

    def order(self, job: Any) -> Any:
        """All training rows, also those without labels."""
        order = job.order("train")
        order.source = together(job.splits, [role for role in LEARNED if role in job.splits])
        return order

    def training(self, job: Any) -> dict[str, Any]:
        """Linear warm-up and decay."""
        return {"schedule": warmup_linear(self.config.warmup)} if self.config.warmup else {}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny series CNNs, each on its own of two generated sensors."""
        options = {"channels": 3, "widths": [4], "kernel": 3}
        return {
            "method": "infonce",
            "data": {"name": "generated", "options": {"kind": "series"}},
            "teacher": {"model": "stillhouse:series_cnn", "options": {**options, "reads": "other"}},
            "student": {"model": "stillhouse:series_cnn", "options": options},
            "budget": {"steps": 4, "batch": 16, "lr": 0.01},
            "seed": seed,
        }
