r"""IMDN: lightweight image super-resolution with information multi-distillation (ACM MM 2019).

"Distillation" here means splitting channels inside one network; there is no teacher. Each block
keeps a quarter of its channels at every step and sends the rest on, so that the later
convolutions are narrower; the kept quarters are joined, re-weighted by an attention on mean
plus standard deviation, and fused. The network is `stillhouse:imdn` (models/imdn.py), which also
loads the published checkpoints; `stillhouse:imdn-as` keeps the size of its enlarged input and so
serves any factor.

Training is L1 between the restored and the true image (released code, train_IMDN.py). With a
teacher (our addition, after FAKD's teacher-supervised term) the loss is

.. math::
    L = (1 - w)\, \lVert S(x) - y \rVert_1 + w\, \lVert S(x) - T(x) \rVert_1
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.errors import RecipeError
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.models.imdn import IMDN, IMDN_AS, load_published, no_split_width, parameter_count
from stillhouse.models.loading import find_weights
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.schedule import halved_every
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want

PUBLISHED = {"attention": "contrast", "split": True, "collect": True}


class ImdnObjective(Objective):
    """L1 to the true image, and to a teacher's image where there is one.

    Args:
        student: net with `image` (B, 3, sH, sW).
        task: whose loss the true images use.
        teacher_weight: w; 0 asks no teacher.
    """

    def __init__(self, student: Net, task: Task, teacher_weight: float = 0.0) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.teacher_weight = teacher_weight
        self.wants = (Want("image"),) if teacher_weight > 0 else ()

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task` and, with a teacher, `teacher`: means over all elements."""
        out = self.student(batch.view("x"))
        weight = self.teacher_weight
        terms: dict[str, Tensor] = {}
        if weight < 1:
            task = self._loss(out, batch)
            terms.update({name: (1 - weight) * value for name, value in task.items()})
        if weight > 0:
            gap = out["image"].float() - knowledge.tensor("image").float()
            terms["teacher"] = weight * gap.abs().mean()
        return terms


class Imdn(StudentTraining):
    """Trains IMDN, or its ablations, on pairs of low- and high-resolution patches."""

    card = Card(
        id="imdn",
        title="Lightweight Image Super-Resolution with Information Multi-distillation Network",
        summary="A small super-resolution network that keeps a quarter of its channels per step.",
        paper="ACM Multimedia 2019; arXiv 1909.11856",
        year=2019,
        authors=("Zheng Hui", "Xinbo Gao", "Yunchu Yang", "Xiumei Wang"),
        links=("https://arxiv.org/abs/1909.11856", "https://github.com/Zheng222/IMDN"),
        room="dense",
        task="super-resolution",
        needs=(),
        yields="model",
        stages=(("teacher?", "train"), ("student?", "train")),
    )

    class Config(MethodConfig):
        """Settings of `imdn`; the network's size is said by the student's options."""

        attention: Literal["contrast", "mean", "none"] = Field(
            "contrast",
            description="channel attention on mean + deviation, on the mean alone, or none",
            json_schema_extra={"source": "paper: contrast-aware; mean and none are its ablations"},
        )
        split: bool = Field(
            True,
            description="keep a quarter of the channels per step; false: three full convolutions "
            "a block, at the least width that has as many parameters",
            json_schema_extra={"source": "paper, ablation 'plain'; its inside is reconstructed"},
        )
        collect: bool = Field(
            True,
            description="join the outputs of all blocks before the last convolution (IIC)",
            json_schema_extra={"source": "paper; false is its ablation"},
        )
        train: bool = Field(
            True,
            description="false: judge and export the network as its weights are",
            json_schema_extra={"source": "our addition, for published checkpoints"},
        )
        start: str | None = Field(
            None,
            description="weights to begin with, all but the tail: x3 and x4 begin with x2",
            json_schema_extra={"source": "paper, training details"},
        )
        halve_every: int | None = Field(
            None,
            ge=1,
            description="epochs after which the learning rate is halved, epochs counted from 1; "
            "none: the budget's schedule",
            json_schema_extra={"source": "released code: 200"},
        )
        teacher_weight: float = Field(
            0.0,
            ge=0,
            le=1,
            description="weight of the L1 to a teacher's image; the true image has the rest",
            json_schema_extra={"source": "our addition (FAKD uses 0.5); the paper has no teacher"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "no-split": Variant(set={"split": False}, about="plain blocks, at least as large"),
        "mean-attention": Variant(set={"attention": "mean"}, about="attention on the mean alone"),
        "no-attention": Variant(set={"attention": "none"}, about="no attention"),
        "no-collection": Variant(set={"collect": False}, about="without the collection (IIC)"),
        "plain": Variant(
            set={"split": False, "attention": "none", "collect": False},
            about="the paper's plain network",
        ),
        "official": Variant(
            set={"halve_every": 200},
            budget={
                "epochs": 1000,
                "steps": None,
                "batch": 16,
                "optimizer": "adam",
                "lr": 2e-4,
                "weight_decay": 0.0,
                "schedule": "constant",
            },
            about="the released schedule; with DIV2K, patch 192, repeats 20, 64 x 6 blocks",
        ),
    }
    claims: ClassVar[list[Claim]] = [
        Claim(
            "restores Set5 better than bicubic by 0.7 dB", "psnr_y", "imdn", "bicubic", margin=0.7
        ),
        Claim(
            "within 0.05 dB of a plain network of at least its size, or above",
            "psnr_y",
            "imdn",
            "imdn/no-split",
            margin=-0.05,
        ),
        Claim(
            "contrast attention is better than attention on the mean",
            "psnr_y",
            "imdn",
            "imdn/mean-attention",
        ),
        Claim("collecting the blocks helps", "psnr_y", "imdn", "imdn/no-collection"),
        Claim(
            "within 0.05 dB of an EDSR of its size, or above",
            "psnr_y",
            "imdn",
            "edsr-small",
            margin=-0.05,
        ),
    ]

    def wants_teacher(self) -> bool:
        """Only where its images have a weight."""
        return bool(self.config.train and self.config.teacher_weight > 0)

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """L1 to the true image, and to the teacher's."""
        weight = self.config.teacher_weight if teacher is not None else 0.0
        return ImdnObjective(student, job.task, weight)

    def run(self, job: Any) -> Artifact:
        """The network (an ablation, a published start), then one training."""
        teacher = job.teacher() if self.wants_teacher() else None
        student = self.network(job)
        if self.config.train:
            objective = self.objective(job, student, teacher)
            job.fit("student", objective, job.order("train"), teacher=teacher, **self.training(job))
        artifact: Artifact = job.model_artifact(student)
        artifact.model.update(self._rebuilt(student))
        return artifact

    def network(self, job: Any) -> Net:
        """The recipe's student, changed as the settings say.

        Raises:
            RecipeError: an ablation of a network that is no IMDN.
        """
        student: Net = job.student()
        module = student.module
        changed = {k: v for k, v in self._parts().items() if v != PUBLISHED[k]}
        if changed:
            if not isinstance(module, (IMDN, IMDN_AS)):
                raise RecipeError(
                    f"settings {sorted(changed)} are for stillhouse:imdn and stillhouse:imdn-as; "
                    f"the student is a {type(module).__name__}"
                )
            if job.recipe.student is not None and job.recipe.student.weights is not None:
                raise RecipeError(
                    f"settings {sorted(changed)} change the network that student.weights was "
                    "saved from; leave out one of them"
                )
            student = job.task.net(job.build(lambda: _changed(module, changed), "student"))
        if self.config.start is not None:
            load_published(find_weights(self.config.start), student.module, start=True)
        return student

    def _parts(self) -> dict[str, Any]:
        """The settings that say what the network is made of."""
        return {name: getattr(self.config, name) for name in PUBLISHED}

    def training(self, job: Any) -> dict[str, Any]:
        """The released schedule where it is asked for."""
        if self.config.halve_every is None:
            return {}
        return {"schedule": halved_every(self.config.halve_every)}

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The task's figures on whole images, and the number of parameters."""
        figures = super().judge(job, artifact)
        return {**figures, "parameters": float(parameter_count(artifact.module))}

    @staticmethod
    def _rebuilt(student: Any) -> dict[str, Any]:
        """How to build the network again, where it is not what the recipe's options say."""
        module = student.module
        if isinstance(module, IMDN):
            return {"id": "stillhouse:imdn", "options": module.settings()}
        if isinstance(module, IMDN_AS):
            return {"id": "stillhouse:imdn-as", "options": module.settings()}
        return {}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A network of one block on generated pairs."""
        return {
            "method": "imdn",
            "data": {"name": "generated-pairs", "options": {"scale": 2}},
            "student": {"model": "stillhouse:imdn", "options": {"channels": 8, "blocks": 1}},
            "budget": {"steps": 4, "batch": 4, "lr": 1e-3, "optimizer": "adam"},
            "seed": seed,
        }


def _changed(module: IMDN | IMDN_AS, parts: dict[str, Any]) -> IMDN | IMDN_AS:
    """A fresh network like `module` but for `parts`.

    Without splitting it takes the least width at which it is as large as `module`.
    """
    options = {**module.settings(), **parts}
    if not options["split"]:
        own = module.settings()
        options["channels"] = no_split_width(
            own["channels"],
            own["blocks"],
            own.get("scale", 4),
            rate=own["rate"],
            attention=options["attention"],
            collect=options["collect"],
        )
    return type(module)(**options)
