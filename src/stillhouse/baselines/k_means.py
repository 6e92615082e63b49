"""Real images nearest to k-means centres in the embedding of a trained network.

A strong and cheap selection that papers often leave out (DC-BENCH, Cui et al., NeurIPS 2022).
"""

from __future__ import annotations

from typing import Any, ClassVar

from stillhouse.artifact import Artifact
from stillhouse.engine.job import Job
from stillhouse.method import Card
from stillhouse.stages.fresh_nets import fresh_net
from stillhouse.stages.initial_set import class_names, set_of
from stillhouse.stages.judge_distilled_set import full_data_net, k_means_images
from stillhouse.stages.set_distillation import SetDistillation


class KMeansReal(SetDistillation):
    """Per class, the real images nearest to k-means centres of one trained network's features."""

    card = Card(
        id="k-means",
        kind="baseline",
        title="Real images near k-means centres",
        summary="As many real images per class as a distilled set has, nearest to k-means centres "
        "in a trained network's embedding.",
        room="baselines",
        yields="dataset",
        stages=(
            ("whitening?", "closed"),
            ("moments?", "closed"),
            ("full", "judge"),
            ("k-means-rows", "judge"),
            ("judge", "judge"),
        ),
    )
    compares: ClassVar[bool] = False

    def run(self, job: Job) -> Artifact:
        """Train a network on the full data (shared with the judge), cluster, choose."""
        config = self.config
        real = self.real_images(job)
        classes = class_names(job)
        net = full_data_net(
            job,
            lambda number: fresh_net(job, number),
            config.full_protocol(),
            real.preprocessing,
            self.share(job),
        )
        images = k_means_images(job, real, net, [config.ipc] * len(classes))
        return self.artifact_of(job, set_of(images, config.ipc, classes, real.preprocessing))

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """One generated image per class."""
        return {
            "method": "k-means",
            "data": {
                "name": "generated",
                "options": {"kind": "images", "shape": [3, 8, 8], "rows": 32},
            },
            "student": {"model": "stillhouse:convnet", "options": {"width": 4, "depth": 2}},
            "settings": {"ipc": 1, "judge_epochs": 4, "judge_nets": 1, "full_epochs": 1},
            "seed": seed,
        }
