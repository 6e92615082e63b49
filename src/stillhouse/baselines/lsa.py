"""Latent semantic analysis of the training texts: a text encoder in closed form.

As a teacher (`teacher: {method: lsa, student: {model: stillhouse:lsa}}`) it is always at hand, and
its coordinates come in the order of their variance, like Matryoshka vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from stillhouse.artifact import Artifact
from stillhouse.batch import read_rows
from stillhouse.errors import RecipeError
from stillhouse.method import Card, Method, MethodConfig
from stillhouse.models.lsa import LatentSemantics


class Lsa(Method):
    """Weighted words in the leading directions of a corpus."""

    card = Card(
        id="lsa",
        kind="baseline",
        title="Indexing by Latent Semantic Analysis",
        summary="Weighted words in the leading directions of the training texts; closed form.",
        paper="Journal of the American Society for Information Science 41(6), 1990",
        year=1990,
        authors=(
            "Scott Deerwester",
            "Susan T. Dumais",
            "George W. Furnas",
            "Thomas K. Landauer",
            "Richard Harshman",
        ),
        links=("https://doi.org/10.1002/(SICI)1097-4571(199009)41:6%3C391::AID-ASI1%3E3.0.CO;2-9",),
        room="baselines",
        task="embedding",
        yields="model",
        stages=(("fit", "closed"),),
    )

    class Config(MethodConfig):
        """Settings of `lsa`."""

        split: str = Field(
            "train",
            min_length=1,
            description="whose texts are analysed; some data have their whole texts in another "
            "split than what is learnt from, such as 'corpus'",
            json_schema_extra={"source": "chosen here"},
        )

    def run(self, job: Any) -> Artifact:
        """The directions of the texts of a split.

        Raises:
            RecipeError: the student is no `stillhouse:lsa`.
        """
        net = job.student()
        model = net.module
        if not isinstance(model, LatentSemantics):
            raise RecipeError(
                f"lsa fits student: {{model: stillhouse:lsa}}, not {type(model).__name__}"
            )

        def fit() -> dict[str, torch.Tensor]:
            source = job.splits[self.config.split]
            model.fit(read_rows(source, torch.arange(len(source)), None).view("text"))
            return dict(model.state_dict())

        model.load_state_dict(job.once("fit", fit))
        artifact: Artifact = job.model_artifact(net)
        return artifact

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Eight directions of generated sentences."""
        return {
            "method": "lsa",
            "data": {"name": "generated_prose", "options": {"texts": 24, "pairs": True}},
            "student": {"model": "stillhouse:lsa", "options": {"width": 8, "buckets": 512}},
            "seed": seed,
        }
