"""A graph with features, its parts, and the matrices by which networks pass messages on it."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from typing import Literal, get_args

import torch
from torch import Tensor

from stillhouse.batch import RowView
from stillhouse.errors import DataError
from stillhouse.parts.sparse import SparseMatrix

Passing = Literal["gcn", "sage", "sage-loops", "loops"]

_KEPT = 16  # matrices that are remembered; requests bring graphs of their own
_SPARSE_BELOW = 0.1  # share of entries that are not 0, below which features are kept sparse


class Graph:
    """Nodes with features, and directed edges between them.

    Args:
        features: (N, F) floating point, dense or sparse.
        edges: (2, E) int64, from `edges[0]` to `edges[1]`; an undirected edge stands in both
            directions. Loops and doubles are left out by `tidy_edges`.
        checked: look at both; False for parts of a graph that was.

    Raises:
        DataError: an edge to a node that is not there; features that are not finite.
    """

    def __init__(
        self, features: Tensor | SparseMatrix, edges: Tensor, *, checked: bool = True
    ) -> None:
        if checked:
            _check(features, edges)
        self.edges = edges.long()
        self.nodes = len(features)
        self._dense = features if isinstance(features, Tensor) else None
        self._sparse = features if isinstance(features, SparseMatrix) else None
        self._mostly_zero: bool | None = None  # not looked at yet
        self._fingerprint = ""
        self._elsewhere: dict[torch.device, Graph] = {}

    @property
    def features(self) -> int:
        """Number of features F."""
        held = self._dense if self._dense is not None else self._sparse
        assert held is not None
        return int(held.shape[1])

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.edges.device

    def dense(self) -> Tensor:
        """(N, F) features with their zeros; made once."""
        if self._dense is None:
            assert self._sparse is not None
            with torch.inference_mode(False):  # what is kept must serve a training too
                self._dense = self._sparse.dense()
        return self._dense

    def sparse(self) -> Tensor | SparseMatrix:
        """The features as a sparse matrix, where most of them are 0; else dense.

        All of them are looked at once: a request for one node must not cost a pass over the graph.
        """
        if self._sparse is None:
            dense = self.dense()
            if self._mostly_zero is None:
                found = int(torch.count_nonzero(dense))
                self._mostly_zero = found <= _SPARSE_BELOW * max(1, dense.numel())
            if not self._mostly_zero:
                return dense
            with torch.inference_mode(False):
                self._sparse = SparseMatrix.of(dense)
        return self._sparse

    @property
    def fingerprint(self) -> str:
        """Of features and edges."""
        if not self._fingerprint:
            own = self.sparse()
            matrix = own if isinstance(own, SparseMatrix) else SparseMatrix.of(own)
            digest = hashlib.sha256(matrix.fingerprint().encode())
            digest.update(self.edges.cpu().contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def induced(self, keep: Tensor) -> Graph:
        """The graph of some nodes and the edges among them, numbered in their order.

        Args:
            keep: (M,) int64, each node once.
        """
        place = torch.full((self.nodes,), -1, dtype=torch.int64, device=self.device)
        place[keep] = torch.arange(len(keep), device=self.device)
        edges = place[self.edges]
        held = self._sparse.rows(keep) if self._sparse is not None else self.dense()[keep]
        return Graph(held, edges[:, (edges >= 0).all(0)], checked=False)

    def neighbourhood(self, nodes: Tensor, hops: int) -> tuple[Graph, Tensor]:
        """What a network of `hops` layers reads to answer for some nodes.

        The time does not grow with the graph, only with what is found. Matrices for passing
        messages are cut out of those of the whole graph, so the degrees in them are right and
        the answers equal those of a pass over the whole graph.

        Args:
            nodes: (B,) int64 that are asked about.
            hops: layers.

        Returns:
            The graph of all nodes that reach one of them in so many steps, and the (B,)
            numbers of the asked nodes in it.
        """
        whole = passing(self.edges, self.nodes, "loops")
        found = torch.unique(nodes)
        for _ in range(hops):
            found = torch.unique(whole.columns[whole.places(found)[1]])
        _, place = whole.places(found)
        target = torch.searchsorted(found, whole.row_numbers()[place])
        source = torch.searchsorted(found, whole.columns[place]).clamp_(max=len(found) - 1)
        inside = found[source] == whole.columns[place]
        place, target, source = place[inside], target[inside], source[inside]
        crossing = source != target
        edges = torch.stack([source[crossing], target[crossing]])
        held = self._sparse.rows(found) if self._sparse is not None else self.dense()[found]
        part = Graph(held, edges, checked=False)
        _hand_down(self, part, place, target, source)
        return part, torch.searchsorted(found, nodes)

    def to(self, device: torch.device | str) -> Graph:
        """The graph on a device, moved once; itself when it is there."""
        target = torch.device(device)
        if target == self.device:
            return self
        if target not in self._elsewhere:
            held = self._sparse if self._sparse is not None else self.dense()
            self._elsewhere[target] = Graph(held.to(target), self.edges.to(target), checked=False)
        return self._elsewhere[target]


class Nodes(RowView):
    """Nodes of a graph that are asked about: the view that models of nodes read.

    A network that passes messages reads the whole graph and answers for these; one that reads
    features alone reads only theirs.

    Args:
        graph: which they are of.
        index: (B,) int64 numbers of nodes; None for all, in order.
    """

    def __init__(self, graph: Graph, index: Tensor | None = None) -> None:
        self.graph = graph
        self.index = index
        self._sparse: Tensor | SparseMatrix | None = None

    def __len__(self) -> int:
        return self.graph.nodes if self.index is None else len(self.index)

    @property
    def numbers(self) -> Tensor:
        """(B,) node numbers."""
        if self.index is None:
            return torch.arange(self.graph.nodes, device=self.graph.device)
        return self.index

    @property
    def device(self) -> torch.device:
        """Of the graph."""
        return self.graph.device

    @property
    def fingerprint(self) -> str:
        """Of the graph and the nodes."""
        digest = hashlib.sha256(self.graph.fingerprint.encode())
        digest.update(self.numbers.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def select(self, rows: Tensor) -> Nodes:
        """Some of them, by place."""
        return Nodes(self.graph, self.numbers[rows.to(self.device)])

    def narrow(self, start: int, stop: int) -> Nodes:
        """Those from place `start` to before `stop`."""
        if self.index is None and (start, stop) == (0, self.graph.nodes):
            return self
        return Nodes(self.graph, self.numbers[start:stop])

    def to(self, device: torch.device | str) -> Nodes:
        """On a device; itself when they are there."""
        if torch.device(device) == self.device:
            return self
        index = None if self.index is None else self.index.to(device)
        return Nodes(self.graph.to(device), index)

    def sparse(self) -> Tensor | SparseMatrix:
        """(B, F) features, sparse where most are 0; gathered once."""
        if self._sparse is None:
            whole = self.graph.sparse()
            if self.index is None:
                self._sparse = whole
            else:
                with torch.inference_mode(False):
                    own = whole.rows(self.index) if isinstance(whole, SparseMatrix) else None
                    self._sparse = whole[self.index] if isinstance(whole, Tensor) else own
        assert self._sparse is not None
        return self._sparse

    def dense(self) -> Tensor:
        """(B, F) features with their zeros."""
        whole = self.graph.dense()
        return whole if self.index is None else whole[self.index]


def _check(features: Tensor | SparseMatrix, edges: Tensor) -> None:
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        raise DataError(
            f"edges are two rows of node numbers (2, E), not {tuple(edges.shape)} of {edges.dtype}"
        )
    low, high = (int(edges.min()), int(edges.max())) if edges.numel() else (0, 0)
    if low < 0 or high >= max(1, len(features)):
        raise DataError(
            f"an edge names node {low if low < 0 else high}; there are {len(features)} nodes, "
            "numbered from 0"
        )
    values = features.values if isinstance(features, SparseMatrix) else features
    if len(features.shape) != 2 or not values.is_floating_point():
        raise DataError("the nodes' features are floating-point numbers (N, F)")
    if not bool(torch.isfinite(values).all()):
        raise DataError("the nodes' features hold a number that is not finite")


def tidy_edges(edges: Tensor, nodes: int, *, undirected: bool = True) -> Tensor:
    """Edges without loops and doubles, sorted; in both directions.

    Args:
        edges: (2, E) int64, loops and doubles among them.
        nodes: number of nodes.
        undirected: give every edge both directions.

    Returns:
        (2, E').
    """
    edges = edges.long()
    if undirected:
        edges = torch.cat([edges, edges.flip(0)], dim=1)
    edges = edges[:, edges[0] != edges[1]]
    codes = torch.unique(edges[0] * nodes + edges[1])
    return torch.stack([torch.div(codes, nodes, rounding_mode="floor"), codes % nodes])


def with_loops(edges: Tensor, nodes: int) -> Tensor:
    """(2, E + N): the edges, then a loop at every node."""
    loops = torch.arange(nodes, device=edges.device)
    return torch.cat([edges, torch.stack([loops, loops])], dim=1)


# ---- passing messages ----------------------------------------------------------------------

_Key = tuple[int, int, str]
_remembered: OrderedDict[_Key, tuple[weakref.ref[Tensor], int, SparseMatrix]] = OrderedDict()


def _version(edges: Tensor) -> int:
    return 0 if edges.is_inference() else edges._version


def _recalled(edges: Tensor, nodes: int, kind: str) -> SparseMatrix | None:
    held = _remembered.get((id(edges), nodes, kind))
    if held is None or held[0]() is not edges or held[1] != _version(edges):
        return None
    _remembered.move_to_end((id(edges), nodes, kind))
    return held[2]


def _remember(edges: Tensor, nodes: int, kind: str, matrix: SparseMatrix) -> None:
    _remembered[id(edges), nodes, kind] = (weakref.ref(edges), _version(edges), matrix)
    while len(_remembered) > _KEPT:
        _remembered.popitem(last=False)


def _hand_down(whole: Graph, part: Graph, place: Tensor, target: Tensor, source: Tensor) -> None:
    """Cut the matrices of a graph to a part of it: all kinds have their entries alike."""
    starts = torch.zeros(part.nodes + 1, dtype=torch.int64, device=part.device)
    starts[1:] = torch.bincount(target, minlength=part.nodes).cumsum(0)
    for kind in get_args(Passing):
        matrix = _recalled(whole.edges, whole.nodes, kind)
        if matrix is not None:
            values = matrix.values[place]
            made = SparseMatrix(starts, source, values, part.nodes, checked=False)
            _remember(part.edges, part.nodes, kind, made)


def passing(edges: Tensor, nodes: int, kind: Passing) -> SparseMatrix:
    """The matrix that gives each node the weighted sum of what its sources hold.

    - "gcn": D^-1/2 (A + I) D^-1/2, D the degrees with the loop (Kipf and Welling 2017, eq. 2);
    - "sage": (A + I) / (deg + 1), GraphSAGE's gcn aggregator (Hamilton et al. 2017, section 3.3);
    - "sage-loops": (A + 2 I) / (deg + 2), the same on a graph that holds loops already;
    - "loops": A + I, its rows sorted.

    Remembered for the tensor of edges it was made of, since a training passes messages over
    the same graph in every step.

    Args:
        edges: (2, E) int64 from source to target, without loops.
        nodes: number of nodes.
        kind: see above.

    Returns:
        (N, N), rows are targets.
    """
    held = _recalled(edges, nodes, kind)
    if held is None:
        with torch.inference_mode(False):  # what is kept must serve a training too
            own = edges.clone() if edges.is_inference() else edges
            held = _passing(own, nodes, kind)
        _remember(edges, nodes, kind, held)
    return held


def _passing(edges: Tensor, nodes: int, kind: Passing) -> SparseMatrix:
    whole = with_loops(edges, nodes)
    source, target = whole[0], whole[1]
    weight = torch.ones(whole.shape[1], dtype=torch.float64, device=edges.device)
    if kind == "sage-loops":
        weight[edges.shape[1] :] = 2.0
    degree = torch.zeros(nodes, dtype=torch.float64, device=edges.device)
    degree.index_add_(0, target, weight)
    if kind == "gcn":
        weight = weight / (degree[source] * degree[target]).sqrt()
    elif kind != "loops":
        weight = weight / degree[target]
    return SparseMatrix.of_entries(target, source, weight, nodes, nodes)
