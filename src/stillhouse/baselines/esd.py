r"""Erased stable diffusion, for classes: the scores of one class are turned away from it.

A copy :math:`\theta` of the multi-step model learns, on noised images of the forgotten class,

.. math::
    e_\theta(x_t, t, c_f) \to e_\phi(x_t, t, \varnothing)
        - \eta [ e_\phi(x_t, t, c_f) - e_\phi(x_t, t, \varnothing) ]

(Gandikota et al. 2023), or the scores of another class. The images are drawn by the pretrained
model itself, so no data is read. The paper keeps other concepts by moving cross-attention alone,
which a class-conditional U-Net has not: here all weights move, and a second term keeps the scores
of the other classes on their own images.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Draws
from stillhouse.clock import Clock
from stillhouse.losses.score import guided, noise_prediction
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
from stillhouse.tasks.image_generation import NoiseNet, draw_images, to_range
from stillhouse.teacher import Frozen, Knowledge


class Redirection(Objective):
    """Scores of one class are turned, those of the others kept.

    Args:
        student: theta.
        teacher: phi.
        images: (K, n, C, H, W) in [-1, 1], drawn by phi for each class.
        config: see `Esd.Config`.
        override: the class of target "override".
    """

    def __init__(
        self, student: NoiseNet, teacher: Frozen, images: Tensor, config: Any, override: int
    ) -> None:
        super().__init__(student)
        self._teacher, self.config, self.override = teacher, config, override
        self.register_buffer("images", images, persistent=False)
        self.others = [c for c in range(len(images)) if c != config.forget]

    def guests(self) -> Any:
        """The pretrained model."""
        yield self._teacher

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `forget` and `keep`."""
        net: NoiseNet = self.student  # type: ignore[assignment]
        forgotten = torch.full((batch.size,), self.config.forget, device=batch.device)
        others = torch.tensor(self.others, device=batch.device)
        kept = others[clock.randint("labels", batch, 0, len(others))]
        labels = torch.cat([forgotten, kept])
        x_t, times = self._noised(labels, batch, clock)
        with torch.no_grad():
            target = self._target(x_t, times, labels, batch.size)
        each = noise_prediction(net.noise(x_t, times, labels), target, reduction="none")
        terms = {"forget": each[: batch.size].mean()}
        if self.config.keep_weight > 0:
            terms["keep"] = self.config.keep_weight * each[batch.size :].mean()
        return terms

    def _noised(self, labels: Tensor, batch: Batch, clock: Clock) -> tuple[Tensor, Tensor]:
        net: NoiseNet = self.student  # type: ignore[assignment]
        images: Tensor = self.images  # type: ignore[assignment]
        steps, count = len(net.schedule), images.shape[1]
        parts = []
        for branch in ("forget", "keep"):
            rows = clock.randint(f"{branch}/rows", batch, 0, count)
            times = clock.randint(f"{branch}/times", batch, 0, steps)
            noise = clock.randn(f"{branch}/noise", batch, *images.shape[2:])
            parts.append((rows, times, noise))
        rows, times, noise = (torch.cat(values) for values in zip(*parts, strict=True))
        x0 = images[labels, rows]
        return net.schedule.add_noise(x0, noise.to(x0), times), times

    def _target(self, x_t: Tensor, times: Tensor, labels: Tensor, count: int) -> Tensor:
        """What theta should answer: its first `count` rows are of the forgotten class."""
        phi: NoiseNet = self._teacher.module  # type: ignore[assignment]
        if self.config.target == "override":
            asked = labels.clone()
            asked[:count] = self.override
            return phi.noise(x_t, times, asked)
        found = phi.noise(x_t, times, labels)
        none = torch.full_like(labels[:count], phi.null or 0)
        away = guided(
            phi.noise(x_t[:count], times[:count], none), found[:count], self.config.strength
        )
        return torch.cat([away, found[count:]])


class Esd(Method):
    """The multi-step model fine-tuned on its own images, data-free."""

    judges_teacher = True  # the teacher is the side `ddim`

    card = Card(
        id="esd",
        kind="baseline",
        title="Erasing Concepts from Diffusion Models",
        summary="The multi-step model's scores of a class are turned away from it; data-free.",
        paper="ICCV 2023; arXiv 2303.07345",
        year=2023,
        authors=("Rohit Gandikota", "Joanna Materzynska", "Jaden Fiotto-Kaufman", "David Bau"),
        links=("https://arxiv.org/abs/2303.07345",),
        room="baselines",
        task="image-generation",
        needs=("fresh", "weights"),
        yields="model",
        stages=(
            ("teacher?", "train"), ("samples", "synthesis"), ("redirect", "train"),
            ("judge", "judge"),
        ),
    )  # fmt: skip

    class Config(MethodConfig):
        """Settings of `esd`; its updates are those of the budget."""

        forget: int = Field(
            0,
            ge=0,
            description="the class to forget, by its number",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        override_class: int | None = Field(
            None,
            ge=0,
            description="for target: override; none: the class after the forgotten one",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        target: Literal["negative", "override"] = Field(
            "negative",
            description="negative: away from the class, past no class; override: another class's",
            json_schema_extra={"source": "paper, eq. 7; override as in concept ablation"},
        )
        strength: float = Field(
            1.0,
            ge=0,
            description="eta, how far past no class",
            json_schema_extra={"source": "paper: 1"},
        )
        keep_weight: float = Field(
            1.0,
            ge=0,
            description="of the other classes' scores",
            json_schema_extra={"source": "ours, in place of moving cross-attention alone"},
        )
        lr: float = Field(
            1e-3,
            gt=0,
            description="Adam's rate",
            json_schema_extra={"source": "ours; the paper's 1e-5 is for a large network"},
        )
        samples: int = Field(
            100,
            ge=1,
            description="images of each class that the pretrained model draws to train on",
            json_schema_extra={"source": "ours; the paper draws anew at every update"},
        )
        steps: int = Field(
            50,
            ge=1,
            description="of DDIM, to draw those and to judge",
            json_schema_extra={"source": "paper: 50"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "override": Variant(set={"target": "override"}, about="towards another class"),
        "no-keeping": Variant(set={"keep_weight": 0.0}, about="without the term of the others"),
    }

    def run(self, job: Any) -> Artifact:
        """Images of the pretrained model, then the redirection of a copy."""
        config, task = self.config, job.task
        checked_class(job, "forget", config.forget)
        checked_class(job, "override_class", config.override_class)
        checked_budget(job)
        net = noise_predictor(job)
        if config.target == "negative" and net.null is None:
            raise job.recipe.refusal(
                "settings.target",
                "negative needs a teacher that was also trained without classes: set override",
            )
        images = job.once("samples", lambda: self._drawn(job, net), kind="synthesis")
        student = copy.deepcopy(net).requires_grad_(True)
        student.sampler = Sampler(steps=config.steps)
        place = next(net.parameters())
        override = config.override_class
        objective = Redirection(
            student,
            Frozen(net),
            images.to(place.device, place.dtype),
            config,
            (config.forget + 1) % len(task.classes) if override is None else override,
        )
        steps = job.budget.steps or 1000
        job.fit(
            "redirect",
            objective,
            Draws(job.budget.batch, steps),
            steps=steps,
            optim=partial(torch.optim.Adam, lr=config.lr),
            schedule=lambda clock: 1.0 - clock.progress,
        )
        return drawing_artifact(job, student, forgotten=task.classes[config.forget])

    def _drawn(self, job: Any, net: NoiseNet) -> Tensor:
        classes, each = len(job.task.classes), self.config.samples
        net.sampler = Sampler(steps=self.config.steps)
        condition = torch.arange(classes).repeat_interleave(each)
        made = to_range(draw_images(net, condition, job.task.shape, job.rng("samples")))
        return made.view(classes, each, *job.task.shape)

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The audit of images drawn in several steps."""
        return judged_forgetting(job, artifact.module, self.config.forget)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny U-Net on generated images, two steps."""
        return {
            "method": "esd",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [1, 4, 4], "rows": 32},
            },
            "teacher": {
                "model": "stillhouse:mini-unet",
                "options": {"width": 4, "multipliers": [1]},
                "train": {"steps": 3, "batch": 8, "lr": 1e-3, "optimizer": "adam"},
            },
            "settings": {"steps": 2, "samples": 4},
            "budget": {"steps": 4, "batch": 4},
            "seed": seed,
        }
