"""Random deletion: words go by chance, at the rate of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stillhouse.artifact import Artifact
from stillhouse.clock import seed_of
from stillhouse.method import Card, Method, Variant
from stillhouse.parts.text_spans import split_words
from stillhouse.stages.word_labels import Shortening, judge_scores, judged_words


class RandomDeletion(Method):
    """Keeps words by uniform chance: what any rule for shortening must beat."""

    card = Card(
        id="random-deletion",
        kind="baseline",
        title="Random deletion",
        summary="Words of a text are kept by chance.",
        room="baselines",
        task="token-classification",
        needs=("text",),
        yields="analysis",
        stages=(),
    )
    variants: ClassVar[dict[str, Variant]] = {}

    def run(self, job: Any) -> Artifact:
        """Nothing is learnt."""
        return Artifact("analysis", meta={"data": job.splits.edition})

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """As the compressors are judged, on the same words."""

        def score(texts: Sequence[str]) -> list[list[float]]:
            return [
                [seed_of(job.seed, "deletion", text, i) / 2.0**63 for i in range(count)]
                for text, count in ((text, len(split_words(text))) for text in texts)
            ]

        return judge_scores(*judged_words(job, Shortening()), score)

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated sentences, shortened by the deleting rules."""
        return {
            "method": "random-deletion",
            "data": {"name": "generated_prose"},
            "teacher": {
                "endpoint": {
                    "model": "rules",
                    "serve": {"rule": "stillhouse.teachers.delete_rules:compress"},
                }
            },
            "seed": seed,
        }
