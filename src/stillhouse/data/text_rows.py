"""Labelled texts as sources: the raw strings and their hashed words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stillhouse.batch import Source, Splits, TensorSource
from stillhouse.data.data_set import DataSet
from stillhouse.data.hash_tokens import HashTokens
from stillhouse.data.options import TextOptions
from stillhouse.data.splitting import choose


@dataclass(frozen=True)
class TextRows:
    """One official split.

    Attributes:
        texts: N strings.
        labels: (N,) int64.
    """

    texts: Sequence[str]
    labels: Tensor

    def where(self, keep: Tensor) -> TextRows:
        """The rows that are kept.

        Args:
            keep: (N,) bool.
        """
        chosen = keep.nonzero()[:, 0]
        return TextRows([self.texts[row] for row in chosen.tolist()], self.labels[chosen])


def text_splits(
    data: DataSet[Any],
    official: Mapping[str, TextRows],
    options: TextOptions,
    *,
    classes: Sequence[str],
    digest: str,
    edition: str,
) -> Splits:
    """Splits with the views "text" (strings), "x" (B, length) int64 hashed words, "target".

    Where classes are joined, the view "subclass" says which one a text was of.

    Args:
        data: its facts.
        official: texts by official split.
        options: what is kept, and how words are hashed.
        classes: names of all classes.
        digest: sha256 of the content.
        edition: name of the edition.
    """
    tokens = HashTokens(options.buckets, options.length)
    choice = choose({r: s.labels for r, s in official.items()}, classes, options, name=data.name)
    sources: dict[str, Source] = {}
    for role, chosen in choice.splits.items():
        texts = [official[role].texts[row] for row in chosen.rows.tolist()]
        sources[role] = TensorSource(
            {"x": tokens(texts), "text": texts, **chosen.views()},
            ids=chosen.ids,
            name=f"{data.name}/{role}",
        )
    about = {
        "name": data.name,
        "hash": digest,
        "licence": data.licence,
        "source": data.source,
        **choice.about(),
        "input": {"length": options.length},
        "vocabulary": options.buckets,
        "tokens": tokens.settings(),
    }
    return Splits(sources, f"{data.name} ({edition})", about)
