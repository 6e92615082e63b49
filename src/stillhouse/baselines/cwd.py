r"""Channel-wise knowledge distillation for dense prediction (Shu et al., ICCV 2021).

Each channel of a map is turned into a distribution over the positions, so that its most salient
regions count, whatever its scale:

.. math::
    L = L_{seg} + w\, \frac{T^2}{C} \sum_c \sum_i \phi(t_{c,i}) \log
        \frac{\phi(t_{c,i})}{\phi(z_{c,i})}, \qquad
    \phi(y_{c,i}) = \frac{\exp(y_{c,i} / T)}{\sum_j \exp(y_{c,j} / T)}

averaged over the images. The maps are the logits (released code: T 4, w 3), or features by taps
(w 50), where a 1x1 convolution that leaves with the training brings the student's channels to
the teacher's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.chunked import wide
from stillhouse.losses.spatial import kl_space, mean_of_rows, resized_to
from stillhouse.method import Card, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want

_TAP = "map"


class CWDObjective(Objective):
    """The task's loss, and each channel's divergence over space.

    Args:
        student: net with `logits` (B, K, h, w), or the tap `map`.
        task: whose loss the labels use.
        config: see `CWD.Config`.
        projector: from the student's features to the teacher's channels; none for logits.
    """

    def __init__(
        self, student: Net, task: Task, config: CWD.Config, projector: nn.Module | None = None
    ) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config
        self.projector = projector
        self.wants = (Want(f"tap:{_TAP}" if config.features else "logits"),)

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms of the task and `channels`."""
        out = self.student(batch.view("x"))
        terms = self._loss(out, batch)
        if self.config.weight > 0:
            own = out["taps"][_TAP] if self.config.features else out["logits"]
            if self.projector is not None:
                own = self.projector(own)
            own = wide(own)
            teacher = knowledge.tensor(self.wants[0].field).to(own.dtype)
            teacher = resized_to(teacher, (own.shape[2], own.shape[3]))
            found = kl_space(own, teacher, temperature=self.config.temperature, reduction="none")
            terms["channels"] = self.config.weight * mean_of_rows(found.mean(1), knowledge.valid)
        return terms


class CWD(StudentTraining):
    """Distils where each channel looks: a softmax over space per channel."""

    card = Card(
        id="cwd",
        kind="baseline",
        title="Channel-wise Knowledge Distillation for Dense Prediction",
        summary="Matches each channel's distribution over space, of logits or features.",
        paper="ICCV 2021; arXiv 2011.13256",
        year=2021,
        authors=("Changyong Shu", "Yifan Liu", "Jianfei Gao", "Zheng Yan", "Chunhua Shen"),
        links=("https://arxiv.org/abs/2011.13256",),
        room="baselines",
        task="segmentation",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `cwd`."""

        weight: float = Field(
            3.0,
            ge=0,
            description="weight of the channels' term",
            json_schema_extra={"source": "paper and released code: 3 for logits, 50 for features"},
        )
        temperature: float = Field(
            4.0,
            gt=0,
            description="softens the distributions over space",
            json_schema_extra={"source": "paper, section 4.1: 4"},
        )
        features: bool = Field(
            False,
            description="compare the tap 'map' of both networks instead of the logits",
            json_schema_extra={"source": "paper: both are tried; a 1x1 convolution fits channels"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "features": Variant(
            set={"features": True, "weight": 50.0}, about="features by the tap 'map', weight 50"
        ),
    }

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels and channels; for features the projector's sizes by one dry call each."""
        projector = None
        if self.config.features and self.config.weight > 0:
            if _TAP not in student.taps:
                student.add_tap(_TAP, getattr(student.module, "taps", {}).get(_TAP))
            teacher.bind((Want(f"tap:{_TAP}"),), job.task)
            view = job.task.example_view().to(job.device)
            own = student.tried(view)["taps"][_TAP].shape[1]
            theirs = teacher.knowledge(Batch(x=view)).tensor(f"tap:{_TAP}").shape[1]
            projector = job.build(lambda: nn.Conv2d(own, theirs, 1), "projector")
        return CWDObjective(student, job.task, self.config, projector)

    def wants_teacher(self) -> bool:
        """Not at weight 0."""
        return bool(self.config.weight > 0)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny networks on generated scenes."""
        return {
            "method": "cwd",
            "data": {"name": "generated-scenes"},
            "teacher": {"model": "stillhouse:small_segmenter", "options": {"widths": [6, 8, 8]}},
            "student": {"model": "stillhouse:small_segmenter", "options": {"widths": [4, 4]}},
            "budget": {"steps": 4, "batch": 4, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
