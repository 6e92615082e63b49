"""The student as the seed has left it: what its features hold before anything is learned.

With `student: {model: FOLDER}`, the artifact of another run, that encoder is probed as it is on
the data named here: trained on one data set, frozen, judged on another.
"""

from __future__ import annotations

from typing import Any

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method, MethodConfig


class RandomEncoder(Method):
    """No training at all; whatever an encoder is taught must show against this."""

    card = Card(
        id="random-encoder",
        kind="baseline",
        title="The untrained encoder",
        summary="The student untrained: random weights, or those that it came with.",
        room="baselines",
        task="representation",
        yields="model",
        stages=(),
    )
    Config = MethodConfig

    def run(self, job: Any) -> Artifact:
        """The student as it is."""
        artifact: Artifact = job.model_artifact(job.student().eval())
        return artifact

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny series CNN on generated series."""
        return {
            "method": "random-encoder",
            "data": {"name": "generated", "options": {"kind": "series"}},
            "student": {
                "model": "stillhouse:series_cnn",
                "options": {"channels": 3, "widths": [4], "kernel": 3},
            },
            "budget": {"steps": 1, "batch": 16},
            "seed": seed,
        }
