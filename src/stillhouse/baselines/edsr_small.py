"""EDSR-baseline at a chosen size: the plain residual network beside super-resolution methods.

Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR workshops
2017, arXiv 1707.02921. Its training here is the one of the method beside it: L1, equal data,
steps and optimiser.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method, MethodConfig
from stillhouse.models.edsr import EDSR
from stillhouse.stages.supervised import Supervised


class EdsrSmall(Method):
    """Trains a small EDSR on the task's loss; the recipe's student is not used."""

    card = Card(
        id="edsr-small",
        kind="baseline",
        title="Enhanced Deep Residual Networks for Single Image Super-Resolution",
        summary="A small EDSR-baseline, trained on the same data and steps.",
        paper="CVPR workshops 2017; arXiv 1707.02921",
        year=2017,
        authors=("Bee Lim", "Sanghyun Son", "Heewon Kim", "Seungjun Nah", "Kyoung Mu Lee"),
        links=("https://arxiv.org/abs/1707.02921",),
        room="baselines",
        task="super-resolution",
        yields="model",
        stages=(("student", "train"),),
    )

    class Config(MethodConfig):
        """Settings of `edsr-small`."""

        channels: int = Field(
            32,
            ge=1,
            description="width; 64 in EDSR-baseline",
            json_schema_extra={"source": "our choice: at x2, 121,987 parameters with 4 blocks"},
        )
        blocks: int = Field(
            4,
            ge=1,
            le=16,
            description="residual blocks; 16 in EDSR-baseline",
            json_schema_extra={"source": "our choice"},
        )

    variants: ClassVar[dict[str, Any]] = {}

    def run(self, job: Any) -> Artifact:
        """One training by the task's loss."""
        options = {
            "channels": self.config.channels,
            "blocks": self.config.blocks,
            "scale": job.task.scale,
        }
        net = job.task.net(job.build(lambda: EDSR(**options), "student"))
        objective = Supervised(net, job.task)
        job.fit("student", objective, job.order("train"))
        artifact: Artifact = job.model_artifact(objective.export())
        artifact.model = {"id": "stillhouse:edsr", "options": options}
        return artifact

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """The task's figures on whole images, and the number of parameters."""
        count = sum(p.numel() for p in artifact.module.parameters())
        return {**super().judge(job, artifact), "parameters": float(count)}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """One block on generated pairs."""
        return {
            "method": "edsr-small",
            "data": {"name": "generated-pairs", "options": {"scale": 2}},
            "settings": {"channels": 4, "blocks": 1},
            "budget": {"steps": 4, "batch": 4, "lr": 1e-3, "optimizer": "adam"},
            "seed": seed,
        }
