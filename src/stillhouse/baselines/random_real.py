"""Random real images, as many as a distilled set has: the least it must beat."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job
from stillhouse.method import Card, Variant
from stillhouse.parts.distilled_set import Decode
from stillhouse.stages.set_distillation import SetConfig, SetDistillation


class RandomReal(SetDistillation):
    """Random real images of each class, the same that real initialisation begins with."""

    card = Card(
        id="random-real",
        kind="baseline",
        title="Random real images",
        summary="As many random real images per class as a distilled set has.",
        room="baselines",
        yields="dataset",
        stages=(
            ("whitening?", "closed"),
            ("moments?", "closed"),
            ("initial images", "closed"),
            ("judge", "judge"),
        ),
    )
    compares: ClassVar[bool] = False

    class Config(SetConfig):
        """Settings of `random-real`."""

        factor: int = Field(
            1,
            ge=1,
            description="tiles per side: 2 keeps four images of a class, shrunk, in the place of "
            "one, which are brought to full size for training",
            json_schema_extra={"source": "what a set of mosaics must beat (IDC, NCFM)"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "mosaic": Variant(set={"factor": 2}, about="four shrunk images in the place of one"),
    }

    def run(self, job: Job) -> Artifact:
        """Draw them."""
        real = self.real_images(job)
        return self.artifact_of(
            job, self.initial_set(job, real, "real", Decode(self.config.factor))
        )

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """One generated image per class."""
        return {
            "method": "random-real",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
            "settings": {"ipc": 1, "judge_epochs": 4, "judge_nets": 1},
            "seed": seed,
        }
