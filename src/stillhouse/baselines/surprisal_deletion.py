"""Surprisal deletion: words that a causal model foresees go first.

The idea of Selective-Context (Li et al. 2023, arXiv 2310.06201) and LLMLingua (Jiang et al.
2023, arXiv 2310.05736), with a bigram model of the training texts as the causal model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stillhouse.artifact import Artifact
from stillhouse.method import Card, Method, Variant
from stillhouse.parts.text_spans import split_words
from stillhouse.parts.word_statistics import BigramModel
from stillhouse.stages.word_labels import Shortening, judge_scores, judged_words, texts_of


class SurprisalDeletion(Method):
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
    variants: ClassVar[dict[str, Variant]] = {}

    def run(self, job: Any) -> Artifact:
        """The bigram model is counted when judging; nothing else is learnt."""
        return Artifact("analysis", meta={"data": job.splits.edition})

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """As the compressors are judged, on the same words."""
        texts = texts_of(job.splits["train"])[0]
        model = BigramModel([w.text for w in split_words(text)] for text in texts)

        def score(given: Sequence[str]) -> list[list[float]]:
            return [model.surprisal([w.text for w in split_words(text)]) for text in given]

        return judge_scores(*judged_words(job, Shortening()), score)

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
