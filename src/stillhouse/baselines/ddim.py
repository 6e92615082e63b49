"""The pretrained diffusion model as it is, drawn from in several steps."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method, MethodConfig, Variant
from stillhouse.parts.noise import Sampler
from stillhouse.stages.audit import (
    checked_class,
    drawing_artifact,
    judged_forgetting,
    noise_predictor,
)


class Ddim(Method):
    """Draws by deterministic DDIM from the recipe's teacher; nothing is forgotten."""

    judges_teacher = True  # it is the teacher: its figures are not taken twice

    card = Card(
        id="ddim",
        kind="baseline",
        title="Denoising Diffusion Implicit Models",
        summary="The pretrained diffusion model itself, drawn from in several steps.",
        paper="ICLR 2021; arXiv 2010.02502",
        year=2021,
        authors=("Jiaming Song", "Chenlin Meng", "Stefano Ermon"),
        links=("https://arxiv.org/abs/2010.02502",),
        room="baselines",
        task="image-generation",
        needs=("fresh", "weights"),
        yields="model",
        stages=(("teacher?", "train"), ("judge", "judge")),
    )

    class Config(MethodConfig):
        """Settings of `ddim`."""

        forget: int = Field(
            0,
            ge=0,
            description="the class that the audit asks for; the model is not changed",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        steps: int = Field(
            50,
            ge=1,
            description="at equal distances, eta 0",
            json_schema_extra={"source": "paper: 10 to 100"},
        )
        guidance: float = Field(
            0.0,
            ge=0,
            description="(1 + g) e_c - g e_null, two calls a step; 0: by the class alone",
            json_schema_extra={"source": "classifier-free guidance (Ho and Salimans 2022)"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "ten-steps": Variant(set={"steps": 10}, about="ten steps"),
    }

    def run(self, job: Any) -> Artifact:
        """The teacher, with its sampler."""
        checked_class(job, "forget", self.config.forget)
        net = noise_predictor(job)
        net.sampler, net.guidance = Sampler(steps=self.config.steps), self.config.guidance
        return drawing_artifact(job, net, forgotten=None)

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The audit of images drawn in that many steps."""
        return judged_forgetting(job, artifact.module, self.config.forget)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny U-Net on generated images, two steps."""
        return {
            "method": "ddim",
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
            "seed": seed,
        }
