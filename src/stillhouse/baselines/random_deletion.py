"""Random deletion: words go by chance, at the rate of the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.clock import seed_of
from stillhouse.method import Card
from stillhouse.stages.word_labels import WordDeletion, words_of


class RandomDeletion(WordDeletion):
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

    def scorer(self, job: Any) -> Callable[[str], list[float]]:
        """Numbers in [0, 1) by the text, the place and the run's seed."""
        return lambda text: [
            seed_of(job.seed, "deletion", text, i) / 2.0**63 for i in range(len(words_of(text)))
        ]

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
