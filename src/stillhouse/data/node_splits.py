"""Splits of the nodes of one graph: which labels are seen, and which nodes at all.

Transductive: one graph, whose features and edges all are seen in training; of the labels only
those of the training nodes. Inductive: some test nodes are hidden; whoever trains sees a graph
in which they do not occur, neither their features nor their edges nor their labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample, Splits
from stillhouse.clock import Views, generator
from stillhouse.errors import DataError
from stillhouse.metrics.classification import IGNORE
from stillhouse.parts.graph import Graph, Nodes, tidy_edges
from stillhouse.parts.sparse import SparseMatrix

Setting = Literal["transductive", "inductive"]


class NodeSource:
    """Nodes of a graph as rows; the graph comes along with whatever is read.

    Args:
        graph: all that may be seen.
        nodes: (B,) int64 numbers in the graph; None for all, in order.
        labels: (B,) int64 classes, -100 where there is none to be seen.
        ids: (B,) content ids: numbers in the data set's whole graph.
        name: part of the fingerprint.
    """

    def __init__(
        self, graph: Graph, nodes: Tensor | None, labels: Tensor, ids: Tensor, name: str = "nodes"
    ) -> None:
        self.whole = Nodes(graph, nodes)
        if not len(self.whole) == len(labels) == len(ids):
            raise DataError(
                f"{len(self.whole)} nodes, {len(labels)} labels and {len(ids)} ids of '{name}'"
            )
        self.targets = labels.long()
        self.ids = ids
        self.name = name
        self._order = torch.arange(len(ids))
        self._fingerprint = ""

    @property
    def graph(self) -> Graph:
        """All that may be seen."""
        return self.whole.graph

    @property
    def fingerprint(self) -> str:
        """Of the graph, the nodes and their labels."""
        if not self._fingerprint:
            digest = hashlib.sha256(f"{self.name}|{self.whole.fingerprint}".encode())
            digest.update(self.targets.numpy().tobytes())
            digest.update(self.ids.numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        row = torch.tensor([int(item[0])])
        return {"x": self.whole.select(row), "target": self.targets[row[0]]}

    def id_of(self, index: int) -> int:
        """The node's number in the data set's whole graph."""
        return int(self.ids[index])

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The nodes at positions `rows`, with the graph."""
        if torch.equal(rows, self._order):
            return Batch(id=self.ids, x=self.whole, target=self.targets)
        return Batch(id=self.ids[rows], x=self.whole.select(rows), target=self.targets[rows])


@dataclass(frozen=True)
class InductiveSplit:
    """Which nodes are observed, and where the splits lie among them.

    Attributes:
        observed: (M,) node numbers in the whole graph: train, val, the rest of test, others.
        hidden: (H,) test nodes that training does not see, in the whole graph.
        train: positions in `observed`.
        val: likewise.
        test: of the test nodes that are observed, likewise.
    """

    observed: Tensor
    hidden: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


def inductive_split(
    train: Tensor,
    val: Tensor,
    test: Tensor,
    share: float,
    order: Tensor,
    others: Tensor | None = None,
) -> InductiveSplit:
    """Hide the first part of a permutation of the test nodes.

    Args:
        train: (n,) node numbers.
        val: likewise.
        test: likewise.
        share: of the test nodes that is hidden, in (0, 1).
        order: (len(test),) a permutation.
        others: nodes of no split that are observed too.

    Raises:
        DataError: the share hides no test node.
    """
    count = int(len(test) * share)
    if count < 1:
        raise DataError(f"a share of {share:g} of {len(test)} test nodes hides none")
    shuffled = test[order]
    hidden, kept = shuffled[:count], shuffled[count:]
    parts = [train, val, kept, *([] if others is None else [others])]
    places = torch.arange(sum(map(len, parts)))
    ends = len(train), len(train) + len(val), len(train) + len(val) + len(kept)
    own = places[: ends[0]], places[ends[0] : ends[1]], places[ends[1] : ends[2]]
    return InductiveSplit(torch.cat(parts), hidden, *own)


def node_splits(
    graph: Graph,
    labels: Tensor,
    train: Tensor,
    val: Tensor,
    test: Tensor,
    *,
    classes: Sequence[str],
    setting: Setting = "transductive",
    hidden: float = 0.2,
    keep_rest: bool = False,
    seed: int = 0,
    name: str = "graph",
    edition: str = "",
    about: Mapping[str, Any] | None = None,
) -> Splits:
    """Splits for the training and judging of models of nodes.

    `train` holds every node that may be seen, with the labels of the training nodes only, so
    that what a teacher says of the others can be learned from; `val` and `test` hold theirs.

    Args:
        graph: the whole one.
        labels: (N,) int64, -100 where unknown.
        train: (n,) node numbers; so `val` and `test`.
        val: for selection.
        test: for judging.
        classes: names.
        setting: see the module's text.
        hidden: share of the test nodes that is hidden in the inductive setting; these alone
            are judged then, in the whole graph.
        keep_rest: nodes of no split are observed in the inductive setting too; released code
            of FF-G2M drops them.
        seed: of the choice of hidden nodes.
        name: of the data set.
        edition: for reports.
        about: further facts.

    Raises:
        DataError: splits that overlap, are empty, or name nodes that are not there.
    """
    _check_parts(graph.nodes, {"train": train, "val": val, "test": test})
    facts = {"classes": list(classes), "input": [graph.features], "setting": setting}
    if setting == "transductive":
        sources = {
            "train": NodeSource(
                graph, None, _seen(labels, train), torch.arange(graph.nodes), f"{name} train"
            ),
            "val": NodeSource(graph, val, labels[val], val, f"{name} val"),
            "test": NodeSource(graph, test, labels[test], test, f"{name} test"),
        }
        return Splits(sources, edition or name, {**facts, **(about or {})})
    taken = torch.zeros(graph.nodes, dtype=torch.bool)
    taken[torch.cat([train, val, test])] = True
    order = torch.randperm(len(test), generator=generator(seed, "hidden"))
    others = (~taken).nonzero()[:, 0] if keep_rest else None
    split = inductive_split(train, val, test, hidden, order, others)
    observed, own = graph.induced(split.observed), labels[split.observed]
    ids = split.observed
    sources = {
        "train": NodeSource(observed, None, _seen(own, split.train), ids, f"{name} observed train"),
        "val": NodeSource(observed, split.val, own[split.val], ids[split.val], f"{name} val"),
        "test": NodeSource(graph, split.hidden, labels[split.hidden], split.hidden, f"{name} test"),
    }
    told = f"{len(split.hidden):,} test nodes hidden from training, {len(ids):,} observed"
    return Splits(
        sources,
        f"{edition or name}, inductive",
        {**facts, "selection": told, **(about or {})},
    )


def _seen(labels: Tensor, nodes: Tensor) -> Tensor:
    """The labels of some nodes; of the others none."""
    seen = torch.full_like(labels, IGNORE)
    seen[nodes] = labels[nodes]
    return seen


def _check_parts(nodes: int, parts: Mapping[str, Tensor]) -> None:
    owner: dict[int, str] = {}
    for role, part in parts.items():
        if len(part) == 0:
            raise DataError(f"the split '{role}' holds no node")
        if not 0 <= int(part.min()) <= int(part.max()) < nodes:
            raise DataError(
                f"the split '{role}' names node {int(part.max())}; there are {nodes}, from 0"
            )
        for node in part.tolist():
            if node in owner:
                raise DataError(f"node {node} is in the splits '{owner[node]}' and '{role}'")
            owner[node] = role


def random_parts(
    labels: Tensor, *, per_class: int, val: int, test: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A random split of labelled nodes, as is usual where a graph has no public one.

    Args:
        labels: (N,) int64, -100 where unknown.
        per_class: training nodes of every class.
        val: validation nodes.
        test: test nodes.
        seed: of the choice.

    Returns:
        Node numbers of train, val and test, ascending.

    Raises:
        DataError: too few labelled nodes.
    """
    known = (labels != IGNORE).nonzero()[:, 0]
    order = known[torch.randperm(len(known), generator=generator(seed, "nodes"))]
    picked = torch.zeros(len(labels), dtype=torch.bool)
    for value in torch.unique(labels[known]).tolist():
        own = order[labels[order] == value]
        if len(own) < per_class:
            raise DataError(
                f"class {value} has {len(own)} labelled nodes; {per_class} are asked for training"
            )
        picked[own[:per_class]] = True
    rest = order[~picked[order]]
    if len(rest) < val + test:
        raise DataError(
            f"{len(rest)} labelled nodes are left beside train; {val} + {test} are asked for "
            "validation and test"
        )
    train = picked.nonzero()[:, 0]
    return train, rest[:val].sort().values, rest[val : val + test].sort().values


def row_normalised(features: Tensor | SparseMatrix) -> Tensor | SparseMatrix:
    """Rows that add up to 1; empty ones stay empty."""
    if isinstance(features, Tensor):
        total = features.sum(1, keepdim=True)
        return torch.where(total != 0, features / total, features)
    total = torch.zeros(len(features), dtype=features.values.dtype)
    total.index_add_(0, features.row_numbers(), features.values)
    scale = torch.where(total != 0, 1 / total, total)[features.row_numbers()]
    return SparseMatrix(features.starts, features.columns, features.values * scale, features.width)


def splits_of_graph(
    data: Any,
    *,
    classes: Sequence[str] | int | None = None,
    setting: Setting = "transductive",
    hidden: float = 0.2,
    keep_rest: bool = False,
    seed: int = 0,
    per_class: int = 20,
    val: int = 500,
    test: int = 1000,
) -> Splits:
    """Splits of a graph object: PyTorch Geometric's `Data`, or whatever has its attributes.

    Args:
        data: with `x` (N, F), `edge_index` (2, E) and `y` (N,), of which -100 is no label;
            `train_mask`, `val_mask` and `test_mask` (N,) where it brings a split (of several,
            (N, S), the first is taken), else one is drawn.
        classes: names or number; counted when not given.
        setting: see `node_splits`.
        hidden: likewise.
        keep_rest: likewise.
        seed: of what is drawn.
        per_class: training nodes of every class, where a split is drawn.
        val: validation nodes, likewise.
        test: test nodes, likewise.

    Raises:
        DataError: an attribute is missing, or of another shape.
    """
    for name in ("x", "edge_index", "y"):
        if not isinstance(getattr(data, name, None), Tensor):
            raise DataError(
                f"{type(data).__name__} has no tensor '{name}': a graph needs x (N, F), "
                "edge_index (2, E) and y (N,)"
            )
    x = data.x.to_dense() if data.x.layout != torch.strided else data.x
    labels = data.y.reshape(-1).cpu().long()
    if x.ndim != 2 or len(labels) != len(x):
        raise DataError(
            f"features of shape {tuple(x.shape)} and labels of shape {tuple(data.y.shape)} do not "
            "belong to the same nodes"
        )
    edges = data.edge_index.cpu()
    Graph(x.cpu().float(), edges)  # refuses strange edges before they are sorted
    graph = Graph(x.cpu().float(), tidy_edges(edges, len(x)))
    masks = [getattr(data, f"{role}_mask", None) for role in ("train", "val", "test")]
    if all(isinstance(mask, Tensor) for mask in masks):
        parts = tuple(_places(mask, len(x)) for mask in masks)
    else:
        parts = random_parts(labels, per_class=per_class, val=val, test=test, seed=seed)
    if classes is None:
        classes = int(labels.max()) + 1
    names = [str(c) for c in range(classes)] if isinstance(classes, int) else list(classes)
    return node_splits(
        graph,
        labels,
        *parts,
        classes=names,
        setting=setting,
        hidden=hidden,
        keep_rest=keep_rest,
        seed=seed,
        name="own graph",
        about={"hash": graph.fingerprint},
    )


def _places(mask: Any, nodes: int) -> Tensor:
    mask = mask if mask.ndim == 1 else mask[:, 0]
    if len(mask) != nodes:
        raise DataError(f"a mask of {len(mask)} nodes on a graph of {nodes}")
    places: Tensor = mask.cpu().bool().nonzero()[:, 0]
    return places
