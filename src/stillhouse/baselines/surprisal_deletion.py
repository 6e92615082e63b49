"""Surprisal deletion: words that a causal model foresees go first.

The idea of Selective-Context (Li et al. 2023, arXiv 2310.06201) and LLMLingua (Jiang et al.
2023, arXiv 2310.05736), with a bigram model of the training texts as the causal model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.method import Card
from stillhouse.parts.word_statistics import BigramModel
from stillhouse.stages.word_labels import WordDeletion, texts_of, words_of


class SurprisalDeletion(WordDeletion):
    """Keeps the words that surprise a causal bigram model most."""

    card = Card(
        id="surprisal-deletion",
        kind="baseline",
        title="Surprisal deletion (Selective-Context, LLMLingua) with a bigram model",
        summary="Words are kept by their surprisal under a causal language model.",
        paper="after EMNLP 2023; arXiv 2310.06201 and 2310.05736",
        year=2023,
        links=("https://arxiv.org/abs/2310.06201", "https://arxiv.org/abs/2310.05736"),
        room="baselines",
        task="token-classification",
        needs=("text",),
        yields="analysis",
        stages=(),
    )

    def scorer(self, job: Any) -> Callable[[str], list[float]]:
        """Surprisal under a bigram model of the training texts."""
        model = BigramModel(words_of(text) for text in texts_of(job.splits["train"])[0])
        return lambda text: model.surprisal(words_of(text))

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated sentences, shortened by the deleting rules."""
        return {
            "method": "surprisal-deletion",
            "data": {"name": "generated_prose"},
            "teacher": {
                "endpoint": {
                    "model": "rules",
                    "serve": {"rule": "stillhouse.teachers.delete_rules:compress"},
                }
            },
            "seed": seed,
        }
