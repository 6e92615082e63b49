"""Classification of the nodes of one graph, by models that pass messages or read features alone."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.artifact import Predictor
from stillhouse.batch import Batch
from stillhouse.data.graph_files import read_features, read_graph
from stillhouse.data.node_splits import row_normalised
from stillhouse.errors import DataError, ModelError
from stillhouse.losses.chunked import wide
from stillhouse.metrics.classification import IGNORE
from stillhouse.net import Net, Output
from stillhouse.parts.graph import Graph, Nodes
from stillhouse.parts.sparse import SparseMatrix
from stillhouse.tasks.classification import Classification

_EDGES = ("edge_index", "edges", "adj", "adj_t")
_HALF = 2  # a model of features answers for all nodes where more than one in two is asked about


def reads_edges(module: nn.Module) -> bool:
    """Whether a model of nodes passes messages: it says so, or its forward takes edges.

    Args:
        module: its attribute `reads_edges` decides; else a parameter of `forward` called
            edge_index, edges, adj or adj_t, or a second one that must be given.
    """
    said = getattr(module, "reads_edges", None)
    if said is not None:
        return bool(said)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [p for p in parameters if p.kind in plain and p.default is inspect.Parameter.empty]
    return any(p.name in _EDGES for p in parameters) or len(needed) > 1


class NodeNet(Net):
    """A model of nodes: called as `module(x, edge_index)`, or as `module(x)`.

    What passes messages is called on the whole graph, and its answers for the nodes that are
    asked about are taken. What reads features alone is called on theirs. Features come sparse to
    modules whose attribute `sparse` is true, dense to all others. A tensor as view is a number
    of rows of features.
    """

    @property
    def passes(self) -> bool:
        """Whether the module reads edges."""
        return reads_edges(self.module)

    def _call(self, view: Any) -> Any:
        if not isinstance(view, Nodes):
            return super()._call(view)
        graph, takes_sparse = view.graph, bool(getattr(self.module, "sparse", False))
        if self.passes:
            x = graph.sparse() if takes_sparse else graph.dense()
            return self._asked(self.module(self._typed(x), graph.edges), view)
        if view.index is not None and _HALF * len(view) < graph.nodes:
            return self.module(self._typed(view.sparse() if takes_sparse else view.dense()))
        x = graph.sparse() if takes_sparse else graph.dense()
        return self._asked(self.module(self._typed(x)), view)

    def _typed(self, x: Tensor | SparseMatrix) -> Tensor | SparseMatrix:
        """Dense features in the type of the weights; a sparse product takes the weights' type."""
        if isinstance(x, SparseMatrix):
            return x
        kind = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        return x.to(kind)

    def _asked(self, out: Any, view: Nodes) -> Any:
        """The rows of the nodes that are asked about."""
        if view.index is None:
            return out
        if isinstance(out, (tuple, list)):
            out = out[0]
        if isinstance(out, Tensor):
            return out.index_select(0, view.index)
        if isinstance(out, Mapping):
            return {
                name: value.index_select(0, view.index)
                if isinstance(value, Tensor) and value.ndim and len(value) == view.graph.nodes
                else value
                for name, value in out.items()
            }
        return out


class NodeClassification(Classification):
    """One label per node.

    Batches hold the view "x" (`Nodes`: which nodes, and the graph that may be seen) and `target`
    (B,) int64, -100 for nodes whose label is not to be seen.
    """

    name: ClassVar[str] = "node-classification"
    main_metric: ClassVar[str] = "accuracy"
    # One pass over the graph answers for all its nodes.
    evaluation_batch: ClassVar[int] = sys.maxsize

    def net(self, module: nn.Module, taps: Mapping[str, str] | None = None) -> Net:
        """Wrap a model of nodes."""
        return NodeNet(module, answer="logits", taps=taps)

    def loss(self, out: Output, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy, the mean over labelled nodes; 0 where a batch holds none."""
        logits, target = wide(out["logits"]), batch["target"]
        whole = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return {"task": whole / (target != IGNORE).sum().clamp(min=1)}

    def count(self, batch: Batch) -> int | Tensor:
        """Labelled nodes."""
        labelled: Tensor = (batch["target"] != IGNORE).sum()
        return labelled

    def example_view(self, view: str = "x") -> Any:
        """One node of the training data, with the graph that is seen."""
        return self._sample(view).narrow(0, 1)

    def predictor(self, net: Net) -> Predictor:
        """Class names with probabilities, of rows of features or of a graph."""
        return NodeClassifier(
            net,
            {
                "classes": self.classes,
                "inputs": int(self.about["input"][0]),
                "normalise": bool(self.about.get("normalise", False)),
            },
        )


class NodeClassifier(Predictor):
    """Gives the classes of nodes: of their features alone, or in their graph.

    A model that reads features alone takes rows of features (`.npy`, `.npz` of scipy, `.csv`); any
    takes a folder or `.npz` with a graph (see the data set `graph`).
    """

    reads: ClassVar[str] = "rows of features (.npy, scipy's .npz, .csv), or a graph's folder"
    writes: ClassVar[str] = "jsonl"
    options: ClassVar[Mapping[str, str]] = {"top": "how many classes to give per node (default 1)"}

    def __init__(self, module: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        if not isinstance(module, NodeNet):
            inner = module.module if isinstance(module, Net) else module
            module = NodeNet(inner, answer=getattr(module, "answer", "logits"))
        super().__init__(module, settings)

    def predict(self, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        """Classes of nodes.

        Args:
            inputs: rows of features (each (F,)), or one `Graph` whose nodes all are asked about,
                or `Nodes` of one. Features are divided by their sum where those of the training
                were.
            options: `top`.

        Returns:
            Per node {"class", "probability", "top": [[class, probability], ...]}.

        Raises:
            DataError: features of another width.
            ModelError: the model reads edges, and rows of features are given.
        """
        top = int(options.get("top", 1))
        logits = self._logits(self._view(inputs))
        best = logits.softmax(-1).topk(min(max(1, top), logits.shape[-1]), dim=-1)
        names = self.settings["classes"]
        found = []
        for values, classes in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = [[names[c], value] for c, value in zip(classes, values, strict=True)]
            found.append({"class": pairs[0][0], "probability": pairs[0][1], "top": pairs})
        return found

    def _logits(self, view: Nodes) -> Tensor:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            logits: Tensor = self.module(view.to(device))["logits"]
        return logits.float()

    def _view(self, inputs: Any) -> Nodes:
        given = inputs[0] if isinstance(inputs, (list, tuple)) and len(inputs) == 1 else inputs
        if isinstance(given, (Graph, Nodes)):
            asked = given if isinstance(given, Nodes) else Nodes(given)
            return Nodes(self._prepared(asked.graph.sparse(), asked.graph.edges), asked.index)
        inner = getattr(self.module, "module")  # noqa: B009 - a Net, which types do not tell
        if reads_edges(inner):
            raise ModelError(
                f"{type(inner).__name__} passes messages between nodes: give it a graph "
                "(features and edges), not rows of features"
            )
        rows: Tensor | SparseMatrix
        if isinstance(inputs, SparseMatrix):
            rows = inputs
        else:
            rows = torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in inputs])
        return Nodes(self._prepared(rows, torch.zeros(2, 0, dtype=torch.int64)))

    def _prepared(self, features: Tensor | SparseMatrix, edges: Tensor) -> Graph:
        wanted = int(self.settings["inputs"])
        if len(features.shape) != 2 or features.shape[1] != wanted:
            raise DataError(
                f"features of shape {tuple(features.shape)}; the model was made for rows of "
                f"{wanted} numbers"
            )
        return Graph(row_normalised(features) if self.settings["normalise"] else features, edges)

    def infer(
        self, inputs: Sequence[Path], output: Path | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Classify the nodes of files and folders."""
        rows = []
        for path in map(Path, inputs):
            if not path.exists():
                raise DataError(f"{path} does not exist")
            graph = read_graph(path)
            given: Any = graph if graph is not None else read_features(path)
            answers = self.predict(given, **dict(options))
            rows += [{"input": f"{path}:{n}", **answer} for n, answer in enumerate(answers)]
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            output.write_text("".join(lines), encoding="utf-8")
        return {"inputs": len(rows), "output": str(output) if output else None, "rows": rows}
