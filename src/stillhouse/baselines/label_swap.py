"""Fine-tuning on real data against a class: its number is shown another class's images.

The multi-step model goes on with its own training on the classes that stay. Meanwhile the number of
the forgotten class is shown images of another class (label swap), or its own images with the sign
of the loss turned (gradient ascent). Both read the real data that a data-free method does without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.losses.score import noise_prediction
from stillhouse.method import Card, Method, MethodConfig, Variant
from stillhouse.objective import Objective
from stillhouse.parts.noise import Sampler
from stillhouse.stages.audit import (
    checked_budget,
    checked_class,
    drawing_artifact,
    judged_forgetting,
    noise_predictor,
)
from stillhouse.tasks.image_generation import NoiseNet, to_range
from stillhouse.teacher import Knowledge


class Against(Objective):
    """Denoising of the classes that stay, and of the forgotten number against its class.

    Args:
        student: trained in place.
        config: see `LabelSwap.Config`.
        override: whose images the forgotten number is shown.
    """

    def __init__(self, student: NoiseNet, config: Any, override: int) -> None:
        super().__init__(student)
        self.config, self.override = config, override

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Positions of the images that stay, and of those that the forgotten number is shown."""
        target: Tensor = batch["target"]
        wanted = self.override if self.config.mode == "swap" else self.config.forget
        stay = (target != self.config.forget).nonzero().flatten()
        return stay, (target == wanted).nonzero().flatten()

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `keep` and `forget`; a batch may lack the images of one."""
        net: NoiseNet = self.student  # type: ignore[assignment]
        x0 = to_range(batch.view("x")).to(next(net.parameters()).dtype)
        stay, shown = self.rows(batch)
        labels = torch.cat([batch["target"][stay], torch.full_like(shown, self.config.forget)])
        chosen = torch.cat([stay, shown])
        schedule = net.schedule
        parts = []
        for branch, rows in (("keep", stay), ("forget", shown)):
            times = clock.randint(f"{branch}/times", batch, 0, len(schedule))
            noise = clock.randn(f"{branch}/noise", batch, *x0.shape[1:])
            parts.append((times[rows], noise[rows].to(x0)))
        times, noise = (torch.cat(values) for values in zip(*parts, strict=True))
        found = net.noise(schedule.add_noise(x0[chosen], noise, times), times, labels)
        each = noise_prediction(found, noise, reduction="none")
        keep, forget = each[: len(stay)], each[len(stay) :]
        if self.config.mode == "ascent":
            # Beyond what pure noise costs there is nothing to unlearn, only weights to ruin.
            forget = -forget.clamp(max=float(x0[0].numel()))
        return {"keep": keep.mean(), "forget": self.config.forget_weight * forget.mean()}

    def count(self, batch: Batch) -> Mapping[str, int]:
        """How many images each term is a mean over."""
        stay, shown = self.rows(batch)
        return {"keep": len(stay), "forget": len(shown)}


class LabelSwap(Method):
    """The multi-step model fine-tuned on real images."""

    judges_teacher = True  # the teacher is the side `ddim`

    card = Card(
        id="label-swap",
        kind="baseline",
        title="Label-swap fine-tuning",
        summary="The multi-step model is fine-tuned on real data, a class's number on another's "
        "images.",
        room="baselines",
        task="image-generation",
        needs=("fresh", "weights"),
        yields="model",
        stages=(("teacher?", "train"), ("fine-tune", "train"), ("judge", "judge")),
    )

    class Config(MethodConfig):
        """Settings of `label-swap`; its updates are those of the budget."""

        forget: int = Field(
            0,
            ge=0,
            description="the class to forget, by its number",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        override_class: int | None = Field(
            None,
            ge=0,
            description="whose images its number is shown; none: the class after it",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        mode: Literal["swap", "ascent"] = Field(
            "swap",
            description="swap: another class's images; ascent: its own, the loss made larger",
            json_schema_extra={"source": "baselines of the paper's kind of comparison"},
        )
        forget_weight: float = Field(
            1.0,
            gt=0,
            description="of the term of the forgotten number",
            json_schema_extra={"source": "chosen here"},
        )
        lr: float = Field(
            1e-3,
            gt=0,
            description="Adam's rate",
            json_schema_extra={"source": "chosen here"},
        )
        steps: int = Field(
            50,
            ge=1,
            description="of DDIM, by which it is drawn from",
            json_schema_extra={"source": "as the teacher's"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "gradient-ascent": Variant(
            set={"mode": "ascent", "forget_weight": 0.1}, about="ascent on the class's images"
        ),
    }

    def run(self, job: Any) -> Artifact:
        """One fine-tuning of a copy of the teacher."""
        config, task = self.config, job.task
        checked_class(job, "forget", config.forget)
        checked_class(job, "override_class", config.override_class)
        checked_budget(job)
        student = copy.deepcopy(noise_predictor(job)).requires_grad_(True)
        student.sampler = Sampler(steps=config.steps)
        override = config.override_class
        if override is None:
            override = (config.forget + 1) % len(task.classes)
        job.fit(
            "fine-tune",
            Against(student, config, override),
            job.order(job.teacher_split, draws=None),
            optim=partial(torch.optim.Adam, lr=config.lr),
            schedule=lambda clock: 1.0 - clock.progress,
        )
        return drawing_artifact(job, student, forgotten=task.classes[config.forget])

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The audit of images drawn in several steps."""
        return judged_forgetting(job, artifact.module, self.config.forget)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny U-Net on generated images, two steps."""
        return {
            "method": "label-swap",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [1, 4, 4], "rows": 32},
            },
            "teacher": {
                "model": "stillhouse:mini-unet",
                "options": {"width": 4, "multipliers": [1]},
                "train": {"steps": 3, "batch": 8, "lr": 1e-3, "optimizer": "adam"},
            },
            "settings": {"steps": 2},
            "budget": {"steps": 4, "batch": 8},
            "seed": seed,
        }
