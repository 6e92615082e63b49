"""Models of sentence-transformers, as teachers and as students: a folder, a hub id, an object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, ModelError
from stillhouse.models.loading import find_folder

_VECTOR = "sentence_embedding"


class SentenceTransformerNet(nn.Module):
    """A `SentenceTransformer` called on raw texts, in training as in use.

    It gives what the model's own `encode` does: with the default prompt that the model names,
    and cut to its `truncate_dim`. Prompts by kind of text belong to the data.

    Args:
        folder: hub id or folder of a model of sentence-transformers; or the model itself.
        width: append a linear layer (Dense without activation) to this width, before a last
            scaling to unit length if there is one; None: the model as it is.

    Attributes:
        model: the `SentenceTransformer`.
        reads: the view of a batch this model is called on: the raw texts.

    Raises:
        ModelError: no model there, or it gives no vector of texts.
        MissingExtra: sentence-transformers is not installed.
    """

    reads = "text"

    def __init__(self, folder: Any, width: int | None = None) -> None:
        super().__init__()
        model = folder if isinstance(folder, nn.Module) else _loaded(str(folder))
        self.model: Any = model if width is None else _widened(model, width)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(B, D) vectors of B texts.

        Raises:
            ModelError: the model's last module gives no vector per text.
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        given = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._prepared(list(texts)).items()
        }
        found = self.model(given).get(_VECTOR)
        if not isinstance(found, Tensor):
            raise ModelError(
                f"the sentence-transformers model gives no '{_VECTOR}': its last modules are "
                f"{', '.join(type(m).__name__ for m in self.model)}"
            )
        width = getattr(self.model, "truncate_dim", None)
        return found if width is None else found[..., : int(width)]

    def _prepared(self, texts: list[str]) -> dict[str, Any]:
        """Word pieces of texts behind the model's default prompt, where it has one."""
        name = getattr(self.model, "default_prompt_name", None)
        prompt = (getattr(self.model, "prompts", None) or {}).get(name) if name else None
        prepare = getattr(self.model, "preprocess", None)
        if prepare is not None:
            return dict(prepare(texts, prompt=prompt) if prompt else prepare(texts))
        # Releases before 6: a pooling that leaves the prompt out is told how long it is.
        given = dict(self.model.tokenize([(prompt or "") + text for text in texts]))
        if prompt:
            given["prompt_length"] = self.model.tokenize([prompt])["input_ids"].shape[-1] - 1
        return given


def sentence_transformer(folder: str, width: int | None = None) -> SentenceTransformerNet:
    """See `SentenceTransformerNet`."""
    return SentenceTransformerNet(folder, width)


def is_sentence_transformer(module: nn.Module) -> bool:
    """Whether a module is a model of sentence-transformers, without importing that."""
    return any(
        kind.__name__ == "SentenceTransformer"
        and kind.__module__.partition(".")[0] == "sentence_transformers"
        for kind in type(module).__mro__
    )


def _package() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtra("sentence-transformers", "language", "to read such a model") from error
    return sentence_transformers


def _loaded(name: str) -> Any:
    place = Path(name) if Path(name).is_dir() else find_folder(name)
    try:
        return _package().SentenceTransformer(str(place or name), device="cpu").train()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no sentence-transformers model at {place or name}: {error}") from error


def _widened(model: Any, width: int) -> Any:
    if width < 1:
        raise ModelError(f"the width of vectors must be at least 1, not {width}")
    package = _package()
    parts = package.sentence_transformer.modules
    modules = list(model)
    last = [modules.pop()] if type(modules[-1]).__name__ == "Normalize" else []
    sizes = [m for m in (getattr(model, "get_embedding_dimension", None),) if m is not None]
    inner = int((sizes[0] if sizes else model.get_sentence_embedding_dimension)())
    modules.append(parts.Dense(inner, width, activation_function=nn.Identity()))
    return package.SentenceTransformer(modules=[*modules, *last], device="cpu").train()
