"""Planetoid's citation graphs (Yang, Cohen, Salakhutdinov 2016): Cora, Citeseer, Pubmed.

A graph is eight files `ind.NAME.SUFFIX`. Six are pickles of numpy and scipy objects, read by an
unpickler that makes nothing else; `x`, `y` are features and one-hot labels of the training
nodes, `allx`, `ally` of all nodes but the test's, `tx`, `ty` of the test's in the order of
`test.index`, `graph` neighbours by node. Validation nodes are the 500 after the training's.
Citeseer's `test.index` has gaps: isolated nodes without a row, which stay without features.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.data.cached import write_whole
from stillhouse.data.data_set import DataSet
from stillhouse.data.downloads import download_file, offline
from stillhouse.data.node_splits import Setting, node_splits, row_normalised
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import cache_root, find_file, missing
from stillhouse.errors import DataError
from stillhouse.metrics.classification import IGNORE
from stillhouse.parts.graph import Graph, tidy_edges
from stillhouse.parts.sparse import SparseMatrix

_URL = "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/"
SUFFIXES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
VALIDATION = 500

# What the files are made of, by the names of old and new versions; nothing else is called.
_ALLOWED = {
    **dict.fromkeys(
        [("scipy.sparse.csr", "csr_matrix"), ("scipy.sparse._csr", "csr_matrix")], "csr_matrix"
    ),
    **dict.fromkeys(
        [
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ],
        "_reconstruct",
    ),
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("collections", "defaultdict"): "defaultdict",
    ("__builtin__", "list"): "list",
    ("builtins", "list"): "list",
    ("_codecs", "encode"): "encode",
}


class PlanetoidOptions(DataOptions):
    """Options of the citation graphs."""

    graph: Literal["cora", "citeseer", "pubmed"] = Field("cora", description="which of them")
    setting: Setting = Field(
        "transductive",
        description="transductive: all nodes and edges are seen in training; inductive: a share "
        "of the test nodes is not, and is what is judged",
    )
    hidden: float = Field(
        0.2, gt=0, lt=1, description="share of the test nodes that the inductive setting hides"
    )
    keep_rest: bool = Field(
        False,
        description="in the inductive setting, nodes of no split are seen too; released code of "
        "GNN-to-MLP methods drops them",
    )
    normalise: bool = Field(True, description="divide each node's features by their sum")


class Planetoid(DataSet[PlanetoidOptions]):
    """Papers as nodes, citations as edges, words as features, fields as classes."""

    name = "planetoid"
    title = "citation graphs Cora, Citeseer and Pubmed with their public split"
    tasks = ("node-classification",)
    licence = "MIT (repository)"
    source = "github.com/kimiyoung/planetoid"
    files = (
        "planetoid/ind.cora.graph",
        "planetoid/ind.citeseer.graph",
        "planetoid/ind.pubmed.graph",
    )
    editions: ClassVar = {
        "3417fe44f3072b365b2acc1f7e89a71a174c62b6e077938fc28fb10608cec1a8": "public split",
        "16fe357be49cf64396bb27dc51d37008475f8111cf4dcc248e08eae5f9f7ec3f": "public split",
    }
    rows: ClassVar = {"train": 140, "val": 500, "test": 1_000}
    get = "with a network it is downloaded on first use; or put ind.* of the source there"

    Options = PlanetoidOptions

    def open(self, options: PlanetoidOptions, seed: int) -> Splits:
        """The public split; see `node_splits` for what each part holds."""
        folder = self._folder(options.graph)
        digest = files_hash(folder, options.graph)
        raw = read_planetoid(folder, options.graph)
        features = row_normalised(raw.features) if options.normalise else raw.features
        return node_splits(
            Graph(features, raw.edges),
            raw.labels,
            raw.train,
            raw.val,
            raw.test,
            classes=[f"class {c}" for c in range(raw.classes)],
            setting=options.setting,
            hidden=options.hidden,
            keep_rest=options.keep_rest,
            seed=seed,
            name=options.graph,
            edition=f"{options.graph} ({self.edition_of(digest)})",
            about={
                "name": self.name,
                "hash": digest,
                "licence": self.licence,
                "normalise": options.normalise,
            },
        )

    def _folder(self, graph: str) -> Path:
        """Where the files of a graph lie; downloaded where they lie nowhere."""
        wanted = [f"planetoid/ind.{graph}.{suffix}" for suffix in SUFFIXES]
        found = find_file([wanted[SUFFIXES.index("graph")]])
        if found is None:
            found = self._fetched(graph, wanted)
        lacking = [
            Path(name).name for name in wanted if not (found.parent / Path(name).name).is_file()
        ]
        if lacking:
            raise DataError(f"{found.parent} lacks {', '.join(lacking)} of the graph '{graph}'")
        return found.parent

    def _fetched(self, graph: str, wanted: list[str]) -> Path:
        if offline():
            raise missing(self.name, wanted, get=self.get, tried="none, STILLHOUSE_OFFLINE is set")
        folder = cache_root() / "data" / "planetoid"
        # The graph last: it is what is looked for, and stands for all.
        for suffix in sorted(SUFFIXES, key=lambda s: s == "graph"):
            name = f"ind.{graph}.{suffix}"
            try:
                write_whole(folder / name, partial(download_file, _URL + name))
            except OSError as error:
                tried = f"{_URL}{name}: {type(error).__name__}: {error}"
                raise missing(self.name, wanted, get=self.get, tried=tried) from error
        return folder / f"ind.{graph}.graph"


@dataclass(frozen=True)
class RawGraph:
    """What the files of a graph hold.

    Attributes:
        features: (N, F).
        labels: (N,) int64, -100 for nodes without a row.
        edges: (2, E) in both directions, without loops and doubles.
        classes: their number K.
        train: node numbers of the public split; so `val` and `test`.
        val: the 500 after them, or as many as there are.
        test: ascending.
    """

    features: SparseMatrix
    labels: Tensor
    edges: Tensor
    classes: int
    train: Tensor
    val: Tensor
    test: Tensor


def read_planetoid(folder: Path, name: str) -> RawGraph:
    """Read a graph in Planetoid's raw format.

    Args:
        folder: holds `ind.NAME.x` and the others.
        name: of the graph.

    Raises:
        DataError: a file is missing or damaged, holds what it should not, or does not fit the
            others.
    """
    held = {suffix: _load(folder / f"ind.{name}.{suffix}") for suffix in SUFFIXES[:-1]}
    index = _test_index(folder / f"ind.{name}.test.index")
    where = f"{folder}/ind.{name}"
    for features, labels in (("x", "y"), ("tx", "ty"), ("allx", "ally")):
        _check_pair(held[features], held[labels], f"{where}.{features}")
    first, count = held["allx"].shape[0], int(index.max()) + 1
    if len(index) != held["tx"].shape[0] or int(index.min()) < first:
        raise DataError(
            f"{where}.test.index names {len(index)} nodes from {int(index.min())}; tx has "
            f"{held['tx'].shape[0]} rows, and they follow the {first} of allx"
        )
    entries = [held["allx"].tocoo(), held["tx"].tocoo()]
    places = [np.arange(first), index]
    rows = np.concatenate([place[e.row] for place, e in zip(places, entries, strict=True)])
    matrix = SparseMatrix.of_entries(
        torch.from_numpy(rows.astype(np.int64)),
        torch.from_numpy(np.concatenate([e.col for e in entries]).astype(np.int64)),
        torch.from_numpy(np.concatenate([e.data for e in entries]).astype(np.float32)),
        count,
        held["allx"].shape[1],
    )
    known = np.full(count, IGNORE, dtype=np.int64)
    for one_hot, place in zip((held["ally"], held["ty"]), places, strict=True):
        has = one_hot.any(1)
        known[place[has]] = one_hot[has].argmax(1)
    train = held["y"].shape[0]
    return RawGraph(
        matrix,
        torch.from_numpy(known),
        _edges(held["graph"], count, f"{where}.graph"),
        held["ally"].shape[1],
        torch.arange(train),
        torch.arange(train, min(train + VALIDATION, first)),
        torch.from_numpy(np.sort(index)),
    )


def _edges(graph: Mapping[int, Any], nodes: int, where: str) -> Tensor:
    if not isinstance(graph, dict):
        raise DataError(f"{where} holds no lists of neighbours by node")
    pairs = [(int(u), int(v)) for u, neighbours in graph.items() for v in neighbours]
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
        raise DataError(f"{where} names node {int(edges.max())}; there are {nodes}, from 0")
    return tidy_edges(edges, nodes)


def _test_index(path: Path) -> Any:
    try:
        lines = path.read_text(encoding="utf-8").split()
        index = np.array([int(line) for line in lines], dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of node numbers: {error}") from error
    if len(index) == 0 or len(np.unique(index)) < len(index):
        raise DataError(f"{path} is empty, or names a node twice")
    return index


def _check_pair(features: Any, labels: Any, where: str) -> None:
    from scipy.sparse import csr_matrix

    if not isinstance(features, csr_matrix) or not isinstance(labels, np.ndarray):
        raise DataError(f"{where} and its labels are no sparse matrix and array")
    try:
        features.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{where} is damaged: {error}") from error
    if labels.ndim != 2 or features.shape[0] != labels.shape[0]:
        raise DataError(
            f"{where} has {features.shape[0]} rows, its labels are of shape {labels.shape}"
        )


class _Restricted(pickle.Unpickler):
    """Makes arrays, sparse matrices and lists; whatever else a file names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = _ALLOWED.get((module, name))
        if wanted is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")
        return _constructors()[wanted]


def _constructors() -> dict[str, Callable[..., Any]]:
    import codecs

    from scipy.sparse import csr_matrix

    # An array is rebuilt by a function of numpy's that is named differently by its versions.
    rebuild = np.zeros(0).__reduce__()[0]
    assert callable(rebuild)
    return {
        "csr_matrix": csr_matrix,
        "_reconstruct": rebuild,
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "defaultdict": defaultdict,
        "list": list,
        "encode": codecs.encode,
    }


def _load(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _Restricted(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:
        # A damaged pickle raises whatever its broken instructions come upon.
        raise DataError(f"{path} is no file of Planetoid: {error}") from error


def files_hash(folder: Path, name: str) -> str:
    """sha256 over the names and contents of a graph's files."""
    digest = hashlib.sha256()
    for suffix in SUFFIXES:
        path = folder / f"ind.{name}.{suffix}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        digest.update(f"{suffix}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def write_planetoid(
    folder: Path,
    name: str,
    graph: Graph,
    labels: Tensor,
    classes: int,
    train: Tensor,
    val: Tensor,
    test: Tensor,
) -> Tensor:
    """Write a graph in Planetoid's raw format, which many readers know.

    The format has no place for which nodes are which: train come first, then val (of which
    readers take 500), then those of no split, then test. Nodes that stand so already keep
    their numbers.

    Args:
        folder: made when absent.
        name: of the graph.
        graph: undirected edges in both directions.
        labels: (N,) int64, -100 for none.
        classes: their number K.
        train: node numbers.
        val: likewise.
        test: likewise.

    Returns:
        (N,) int64, the node that stands at each number of the files.
    """
    held = graph.sparse()
    features = held if isinstance(held, SparseMatrix) else SparseMatrix.of(held)
    bare = (labels == IGNORE) & (features.starts[1:] == features.starts[:-1])
    order, first = _raw_order(bare, train, val, test)
    place = torch.empty_like(order)
    place[order] = torch.arange(graph.nodes)
    rows = _scipy(features.rows(order))
    one_hot = np.zeros((graph.nodes, classes), dtype=np.int32)
    ordered = labels[order]
    known = (ordered != IGNORE).nonzero()[:, 0]
    one_hot[known.numpy(), ordered[known].numpy()] = 1
    tested = place[test].sort().values.numpy()
    neighbours: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(graph.nodes):
        neighbours[node] = []
    for u, v in place[graph.edges].T.tolist():
        neighbours[u].append(v)
    content: dict[str, Any] = {
        "x": rows[: len(train)],
        "y": one_hot[: len(train)],
        "allx": rows[:first],
        "ally": one_hot[:first],
        "tx": rows[tested],
        "ty": one_hot[tested],
        "graph": neighbours,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, value in content.items():
        _write(folder / f"ind.{name}.{suffix}", pickle.dumps(value, protocol=2))
    lines = "".join(f"{node}\n" for node in tested.tolist())
    _write(folder / f"ind.{name}.test.index", lines.encode())
    return order


def _write(path: Path, content: bytes) -> None:
    write_whole(path, lambda beside: beside.write_bytes(content))


def _raw_order(bare: Tensor, train: Tensor, val: Tensor, test: Tensor) -> tuple[Tensor, int]:
    """The order in which the format wants the nodes, and where the test's region begins.

    Nodes without label and features may lie in that region: they are the gaps of the index.
    """
    nodes, first = len(bare), int(test.min())
    free = torch.ones(nodes, dtype=torch.bool)
    free[torch.cat([train, val, test])] = False
    stands = torch.equal(torch.cat([train, val]), torch.arange(len(train) + len(val)))
    after = first >= len(train) + len(val) and int(test.max()) == nodes - 1
    if stands and after and bool(bare[first:][free[first:]].all()):
        return torch.arange(nodes), first
    return torch.cat([train, val, free.nonzero()[:, 0], test]), nodes - len(test)


def _scipy(matrix: SparseMatrix) -> Any:
    from scipy.sparse import csr_matrix

    parts = (matrix.values, matrix.columns, matrix.starts)
    return csr_matrix(tuple(part.cpu().numpy() for part in parts), shape=matrix.shape)
