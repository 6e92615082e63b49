"""The gold standard of unlearning: training anew without the class."""

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
    retrained,
)


class RetrainWithout(Method):
    """The teacher's network trained from the start on all real images but those of one class.

    Its number for the class is one that was never taught: what it draws there is whatever its
    initial weights make of it.
    """

    judges_teacher = True  # no teacher takes part

    card = Card(
        id="retrain-without",
        kind="baseline",
        title="Retraining without the class",
        summary="The diffusion model trained anew on real data without the class, in several "
        "steps.",
        room="baselines",
        task="image-generation",
        needs=(),
        yields="model",
        stages=(("retrained", "train"), ("judge", "judge")),
    )

    class Config(MethodConfig):
        """Settings of `retrain-without`; budget and network are those of the teacher."""

        forget: int = Field(
            0,
            ge=0,
            description="the class that is left out, by its number",
            json_schema_extra={"source": "of the method that it is compared with"},
        )
        steps: int = Field(
            50,
            ge=1,
            description="of DDIM, by which it is drawn from",
            json_schema_extra={"source": "as the teacher's"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "ten-steps": Variant(set={"steps": 10}, about="drawn from in ten steps"),
    }

    def run(self, job: Any) -> Artifact:
        """One training without the class."""
        checked_class(job, "forget", self.config.forget)
        net = retrained(job, self.config.forget)
        net.sampler = Sampler(steps=self.config.steps)
        return drawing_artifact(job, net, forgotten=job.task.classes[self.config.forget])

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The audit of images drawn in that many steps."""
        return judged_forgetting(job, artifact.module, self.config.forget)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny U-Net on generated images, two steps."""
        return {
            "method": "retrain-without",
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
