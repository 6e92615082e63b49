"""Generated sentences: for examples and contract tests, never for a measurement."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from stillhouse.batch import Splits, TensorSource
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.options import DataOptions


class GeneratedProseOptions(DataOptions):
    """Options of the generated sentences."""

    texts: int = Field(24, ge=8, description="texts of train; val and test have half of it")
    sentences: int = Field(2, ge=1, description="sentences of a text")
    pairs: bool = Field(
        False, description="texts are the sides of pairs, scored by the words they share"
    )


class GeneratedProse(DataSet[GeneratedProseOptions]):
    """Sentences put together from a few words, with the names in them marked."""

    name = "generated_prose"
    title = "simulated sentences, for examples and tests"
    tasks = ("token-classification", "embedding")
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"
    Options = GeneratedProseOptions

    _names: ClassVar[tuple[str, ...]] = ("Ada", "Boole", "Curie", "Darwin", "Euler", "Franklin")
    _deeds: ClassVar[tuple[str, ...]] = (
        "was asked to measure the",
        "quickly wrote a letter on the",
        "had found an error (in the notes) of the",
        "was the first to describe a",
    )
    _things: ClassVar[tuple[str, ...]] = ("engine", "comet", "island", "magnet", "bridge", "cell")

    def open(self, options: GeneratedProseOptions, seed: int) -> Splits:
        """Views "text" and "entities"; the seed does not enter."""
        sizes = {"train": options.texts, "val": options.texts // 2, "test": options.texts // 2}
        sources = {}
        for split, count in sizes.items():
            rng = generator("generated prose", split)
            made = [self._text(options.sentences, rng) for _ in range(count)]
            texts = [text for text, _ in made]
            views: dict[str, Any] = {"text": texts, "entities": [spans for _, spans in made]}
            if options.pairs:
                views |= _pairs(texts)
            sources[split] = TensorSource(views, name=f"generated prose {split}")
        return Splits(sources, "generated prose (simulated)", {"name": self.name})

    def _text(self, sentences: int, rng: Generator) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "", []
        for _ in range(sentences):
            draw = torch.randint(0, 1 << 20, (4,), generator=rng).tolist()
            name = self._names[draw[0] % len(self._names)]
            start = len(text) + bool(text)
            spans.append((start, start + len(name)))
            deed = self._deeds[draw[1] % len(self._deeds)]
            thing = self._things[draw[2] % len(self._things)]
            sentence = f"{name} {deed} {thing} in {1800 + draw[3] % 200}."
            text = f"{text} {sentence}" if text else sentence
        return text, spans


def _pairs(texts: list[str]) -> dict[str, Tensor]:
    """Rows 2 p and 2 p + 1 as the sides of pair p, scored by their share of common words."""
    rows, words = torch.arange(len(texts)), [set(text.split()) for text in texts]
    last = len(texts) - 1
    scores = [
        len(words[i & ~1] & words[min(i | 1, last)]) / len(words[i & ~1] | words[min(i | 1, last)])
        for i in range(len(texts))
    ]
    places = torch.stack([rows // 2, rows % 2, torch.full_like(rows, len(rows) // 2)], dim=1)
    return {"pair": places, "target": torch.tensor(scores)}
