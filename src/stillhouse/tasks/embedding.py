"""Embedding: one vector per text (or image, or series), judged by what is similar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import Predictor
from stillhouse.errors import DataError, ModelError, nearest
from stillhouse.losses.chunked import wide
from stillhouse.metrics.ranking import Retrieval
from stillhouse.metrics.similarity import PairSimilarity
from stillhouse.models.loading import is_hugging_face
from stillhouse.models.sentence_transformer import (
    SentenceTransformerNet,
    is_sentence_transformer,
)
from stillhouse.net import Net, Output
from stillhouse.parts.text_lines import texts_of
from stillhouse.task import Metric, Task


class Embedding(Task):
    """One vector per row, "embedding" (B, D).

    Rows to learn from need no label. Rows to judge on are the sides of scored pairs: `pair`
    (B, 3) int64 (number of the pair, side, number of pairs) and `target` (B,), the score; or the
    documents and queries of a collection: `place` (B, 4) and `relevant` (B, M, 2), as
    `metrics/ranking.py` has them. A split may hold both.
    """

    name: ClassVar[str] = "embedding"
    main_metric: ClassVar[str] = "spearman"

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap an encoder; one of sentence-transformers is called on raw texts.

        Raises:
            ModelError: the data are raw texts, and the encoder reads word pieces.
        """
        if is_sentence_transformer(module):
            module = SentenceTransformerNet(module)
        self._refuse_bare_encoder(module)
        return Net(module, answer="embedding", taps=taps)

    def _refuse_bare_encoder(self, module: nn.Module) -> None:
        """A Hugging Face encoder has no tokenizer and no pooling of its own."""
        views = getattr(self.splits["train"], "views", {}) if "train" in self.splits else {}
        if "text" not in views or "x" in views or not is_hugging_face(module):
            return
        place = str(getattr(module.config, "_name_or_path", "")) or "ID_OR_FOLDER"
        raise ModelError(
            f"{type(module).__name__} reads word pieces and gives a state for each; texts need its "
            "tokenizer and a mean over them as well: {model: stillhouse:sentence_embedder, "
            f"options: {{encoder: {place}}}}} (with `width` for a linear layer), or a folder of "
            "sentence-transformers"
        )

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cosine against scores in [0, 1] where both sides of a pair are in the batch.

        Raises:
            DataError: the rows have no scores.
        """
        if "pair" not in batch:
            raise DataError(
                f"the rows of '{self.splits.edition}' have no scores to learn from; an embedding "
                "is learned from a teacher here"
            )
        vectors = F.normalize(wide(out["embedding"]), dim=-1)
        same = batch["pair"][:, None, 0] == batch["pair"][None, :, 0]
        first, second = torch.triu(same, diagonal=1).nonzero(as_tuple=True)
        cosine = (vectors[first] * vectors[second]).sum(-1)
        wanted = batch["target"][first].to(cosine.dtype)
        return {"task": F.mse_loss(cosine, wanted) if len(first) else vectors.sum() * 0.0}

    def metrics(self) -> Mapping[str, Metric]:
        """Correlations of cosines with the scores of pairs; figures of rankings by cosine."""
        return {"similarity": PairSimilarity(), "retrieval": Retrieval()}

    def check(self, student: Net | None, teacher: Net | None) -> None:
        """Refuse models that give no vector per row."""
        for role, net in (("student", student), ("teacher", teacher)):
            if net is not None:
                self._check_net(role, net, self.example_view(net.view))

    def _check_net(self, role: str, net: Net, view: Any) -> None:
        name = type(net.module).__name__
        try:
            found = net.tried(view).get("embedding")
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(
                f"the {role} {name} cannot read the data '{self.splits.edition}': {error}"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(view):
            shape = tuple(found.shape) if isinstance(found, Tensor) else "no tensor 'embedding'"
            raise ModelError(
                f"the {role} {name} gives {shape} for {len(view)} rows; one vector per row is "
                "needed, (rows, width)"
            )

    def example_view(self, view: str = "x") -> Any:
        """Two rows of the training data; of texts where there is no other view."""
        batch = self.first_rows(2)
        return batch.view("text" if view == "x" and "x" not in batch else view)

    def predictor(self, net: Net) -> Predictor:
        """Vectors of texts or arrays; it knows the prefixes that the data put before texts."""
        prefixes = self.splits.about.get("prefixes")
        return Embedder(net, {"reads": net.view, **({"prefixes": prefixes} if prefixes else {})})


class Embedder(Predictor):
    """Gives the vectors of texts or arrays."""

    reads: ClassVar[str] = "text lines, .jsonl, .csv or .tsv, or .npy arrays of rows"
    writes: ClassVar[str] = ".npy (rows, width), or jsonl"
    options: ClassVar[Mapping[str, str]] = {
        "batch": "inputs at a time (default 64)",
        "kind": "query or document: texts get the prefix that was learned for that kind",
        "prefix": "put before each text instead",
        "text": "field or column of .jsonl, .csv and .tsv files (default text)",
    }

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[Tensor]:
        """One vector (width,) per input.

        Args:
            inputs: strings for a model of texts, else arrays or tensors as in training.
            options: `batch`, `kind`, `prefix`.
        """
        size = int(options.get("batch", 64))
        prefix = self._prefix(options)
        if prefix:
            inputs = [prefix + text for text in inputs]
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        found: list[Tensor] = []
        for start in range(0, len(inputs), size):
            part = list(inputs[start : start + size])
            view: Any = part
            if self.settings.get("reads", "x") != "text":
                view = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x in part])
                view = view.to(device, non_blocking=True)
            with torch.inference_mode():
                found += self.module(view)["embedding"].float().cpu().unbind(0)
        return found

    def _prefix(self, options: Mapping[str, Any]) -> str:
        """What is put before each text.

        Raises:
            DataError: an unknown kind, or a prefix for something else than texts.
        """
        kind, prefix = options.get("kind"), options.get("prefix")
        if kind is None and prefix is None:
            return ""
        if self.settings.get("reads", "x") != "text":
            raise DataError("kind and prefix are for models of texts")
        if prefix is not None:
            return str(prefix)
        known = {"query": "", "document": "", **self.settings.get("prefixes", {})}
        if kind not in known:
            raise DataError(f"kind is query or document, not '{kind}'{nearest(str(kind), known)}")
        return str(known[kind])

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Vectors of the lines of text files, or of the rows of .npy arrays."""
        names: list[str] = []
        values: list[Any] = []
        for path in map(Path, inputs):
            if not path.exists():
                raise DataError(f"{path} does not exist")
            rows = self._rows(path, str(options.get("text", "text")))
            names += [f"{path}:{number}" for number, _ in rows]
            values += [value for _, value in rows]
        if not values:
            raise DataError("nothing to read: no line of text and no row of an array was found")
        vectors = torch.stack(self.predict(values, **dict(options)))
        if output is not None:
            _write(names, vectors, Path(output))
        shape = list(vectors.shape)
        return {"inputs": len(names), "shape": shape, "output": str(output) if output else None}

    def _rows(self, path: Path, field: str) -> list[tuple[int, Any]]:
        """Each input of a file with its number: of the line, or of the row."""
        array = path.suffix.lower() == ".npy"
        if array == (self.settings.get("reads", "x") == "text"):
            wanted = ".npy arrays" if not array else "texts"
            raise DataError(f"{path}: this model reads {wanted}")
        if not array:
            return list(texts_of(path, field))
        try:
            return list(enumerate(np.load(path, allow_pickle=False), 1))
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read as an array: {error}") from error


def _write(names: Sequence[str], vectors: Tensor, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".npy":
        np.save(output, vectors.numpy(), allow_pickle=False)
        return
    with output.open("w", encoding="utf-8") as file:
        for name, vector in zip(names, vectors.tolist(), strict=True):
            file.write(json.dumps({"input": name, "vector": vector}) + "\n")
