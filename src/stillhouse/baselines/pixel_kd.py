r"""Distillation pixel by pixel: Hinton's soft targets at every position of the logit maps.

.. math::
    L = L_{seg} + w\, T^2\, \frac{1}{B h w} \sum_i KL(\sigma(t_i / T) \,\|\, \sigma(z_i / T))

with student and teacher logits :math:`z, t` before they are enlarged, the teacher's resized to
the student's (Liu et al., Structured Knowledge Distillation, CVPR 2019, section 3.1, the
pixel-wise term; there T is 1 and w 10). With `region: edges` only positions near class borders
count, by a mask that all classes share: what is gained by looking there alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.spatial import IGNORE, kl_pixels, mean_of_rows, resized_to, soft_trimap
from stillhouse.method import Card, MethodConfig, StudentTraining, Variant
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want


class PixelKDObjective(Objective):
    """The task's loss, and the divergence at every position of the logit maps.

    Args:
        student: net with `logits` (B, K, h, w).
        task: whose loss the labels use.
        config: see `PixelKD.Config`.
    """

    wants = (Want("logits"),)

    def __init__(self, student: Net, task: Task, config: PixelKD.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self._ignore = int(task.about.get("ignore", IGNORE))
        self.config = config

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms of the task and `pixels`."""
        out = self.student(batch.view("x"))
        terms = self._loss(out, batch)
        if self.config.weight > 0:
            student = out["logits"]
            size = (student.shape[2], student.shape[3])
            teacher = resized_to(knowledge.tensor("logits").to(student.dtype), size)
            found = kl_pixels(
                student, teacher, temperature=self.config.temperature, reduction="none"
            )
            mask = self._edges(batch["target"], student)
            each = found.mean((1, 2)) if mask is None else _weighted(found, mask)
            terms["pixels"] = self.config.weight * mean_of_rows(each, knowledge.valid)
        return terms

    def _edges(self, labels: Tensor, student: Tensor) -> Tensor | None:
        """(B, h, w): how much of each position is near a border of any class."""
        if self.config.region == "all":
            return None
        size = (student.shape[2], student.shape[3])
        edges, _ = soft_trimap(
            labels, student.shape[1], size, radius=self.config.radius, ignore=self._ignore
        )
        return edges.amax(1)


def _weighted(values: Tensor, mask: Tensor) -> Tensor:
    """Per image the mean of (B, h, w) by weights; 0 where there are none."""
    total = mask.sum((1, 2))
    return (values * mask).sum((1, 2)) / total.masked_fill(total == 0, 1.0)


class PixelKD(StudentTraining):
    """Soft targets of the teacher at every pixel, beside the labels."""

    card = Card(
        id="pixel-kd",
        kind="baseline",
        title="Pixel-wise distillation of segmentation networks",
        summary="Soft targets of the teacher at every pixel, beside the labels.",
        paper="the pixel-wise term of Structured Knowledge Distillation, CVPR 2019",
        year=2019,
        authors=("Yifan Liu", "Ke Chen", "Chris Liu", "Zengchang Qin", "Zhenbo Luo"),
        links=("https://arxiv.org/abs/1903.04197",),
        room="baselines",
        task="segmentation",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `pixel-kd`."""

        weight: float = Field(
            1.0,
            ge=0,
            description="weight of the soft targets; the labels have 1",
            json_schema_extra={"source": "chosen here; the paper has 10 at temperature 1"},
        )
        temperature: float = Field(
            4.0,
            gt=0,
            description="softens both distributions",
            json_schema_extra={"source": "that of cwd and bpkd; the paper has 1"},
        )
        region: Literal["all", "edges"] = Field(
            "all",
            description="every position, or those near the border of any class",
            json_schema_extra={"source": "edges: an ablation of BPKD"},
        )
        radius: int = Field(
            3,
            ge=0,
            description="for region edges: pixels of the label map on both sides of a border",
            json_schema_extra={"source": "as bpkd"},
        )
        shared: ClassVar[frozenset[str]] = frozenset({"radius"})

    variants: ClassVar[dict[str, Variant]] = {
        "tau-1": Variant(set={"temperature": 1.0}, about="at temperature 1, as in the paper"),
        "edges": Variant(set={"region": "edges"}, about="only near class borders"),
    }

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels and soft targets."""
        return PixelKDObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not at weight 0."""
        return bool(self.config.weight > 0)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Two tiny networks on generated scenes."""
        return {
            "method": "pixel-kd",
            "data": {"name": "generated-scenes"},
            "teacher": {"model": "stillhouse:small_segmenter", "options": {"widths": [6, 8, 8]}},
            "student": {"model": "stillhouse:small_segmenter", "options": {"widths": [4, 4]}},
            "budget": {"steps": 4, "batch": 4, "lr": 0.05, "optimizer": "sgd"},
            "seed": seed,
        }
