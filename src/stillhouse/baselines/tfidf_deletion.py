"""TF-IDF deletion: words that are frequent in all texts go first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.method import Card
from stillhouse.parts.word_statistics import DocumentFrequency
from stillhouse.stages.word_labels import WordDeletion, texts_of, words_of


class TfIdfDeletion(WordDeletion):
    """Keeps the words with the highest TF-IDF: stop words go without a list of them."""

    card = Card(
        id="tfidf-deletion",
        kind="baseline",
        title="TF-IDF deletion",
        summary="Words are kept by frequency in the text and rarity in the training texts.",
        room="baselines",
        task="token-classification",
        needs=("text",),
        yields="analysis",
        stages=(),
    )

    def scorer(self, job: Any) -> Callable[[str], list[float]]:
        """TF-IDF, with the document frequencies of the training texts."""
        frequency = DocumentFrequency(words_of(text) for text in texts_of(job.splits["train"])[0])
        return lambda text: frequency.scores(words_of(text))

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """Generated sentences, shortened by the deleting rules."""
        return {
            "method": "tfidf-deletion",
            "data": {"name": "generated_prose"},
            "teacher": {
                "endpoint": {
                    "model": "rules",
                    "serve": {"rule": "stillhouse.teachers.delete_rules:compress"},
                }
            },
            "seed": seed,
        }
