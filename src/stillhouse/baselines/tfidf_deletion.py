"""TF-IDF deletion: words that are frequent in all texts go first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method, Variant
from stillhouse.parts.text_spans import split_words
from stillhouse.parts.word_statistics import DocumentFrequency
from stillhouse.stages.word_labels import Shortening, judge_scores, judged_words, texts_of


class TfIdfDeletion(Method):
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
    variants: ClassVar[dict[str, Variant]] = {}

    def run(self, job: Any) -> Artifact:
        """Document frequencies are counted when judging; nothing else is learnt."""
        return Artifact("analysis", meta={"data": job.splits.edition})

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """As the compressors are judged, on the same words."""
        texts = texts_of(job.splits["train"])[0]
        frequency = DocumentFrequency([w.text for w in split_words(text)] for text in texts)

        def score(given: Sequence[str]) -> list[list[float]]:
            return [frequency.scores([w.text for w in split_words(text)]) for text in given]

        return judge_scores(*judged_words(job, Shortening()), score)

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
