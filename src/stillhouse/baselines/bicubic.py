"""Bicubic enlargement: what every super-resolution network is measured from."""

from __future__ import annotations

from typing import Any, ClassVar

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method
from stillhouse.models.bicubic import Bicubic


class BicubicEnlargement(Method):
    """Matlab's bicubic enlargement; nothing is learned."""

    card = Card(
        id="bicubic",
        kind="baseline",
        title="Bicubic enlargement",
        summary="Enlarges images by Matlab's bicubic rule; nothing is learned.",
        room="baselines",
        task="super-resolution",
        yields="model",
        stages=(),
    )
    variants: ClassVar[dict[str, Any]] = {}

    def run(self, job: Any) -> Artifact:
        """No stage at all."""
        scale = job.task.scale
        artifact: Artifact = job.model_artifact(job.task.net(Bicubic(scale)))
        artifact.model = {"id": "stillhouse:bicubic", "options": {"scale": scale}}
        return artifact

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated pairs."""
        return {
            "method": "bicubic",
            "data": {"name": "generated-pairs", "options": {"scale": 2}},
            "budget": {"steps": 1, "batch": 4},
            "seed": seed,
        }
