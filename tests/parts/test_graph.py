"""Graphs: parts of them, neighbourhoods, tidy edges, matrices for passing messages."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.graph_frequency import frequency_errors
from stillhouse.parts.graph import Graph, Nodes, passing, tidy_edges, with_loops

PATH = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])


def path(nodes: int = 6) -> Graph:
    return Graph(torch.eye(nodes), tidy_edges(PATH, nodes))


def test_tidy_edges():
    strange = torch.tensor([[1, 0, 2, 2, 1], [0, 1, 2, 0, 0]])
    assert tidy_edges(strange, 3).T.tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert tidy_edges(strange, 3, undirected=False).T.tolist() == [[0, 1], [1, 0], [2, 0]]


def test_rows_of_the_matrices_add_up():
    edges = path().edges
    for kind in ("sage", "sage-loops"):
        sums = passing(edges, 6, kind).dense().sum(1)
        torch.testing.assert_close(sums, torch.ones(6, dtype=torch.float64))
    gcn = passing(edges, 6, "gcn").dense()
    torch.testing.assert_close(gcn, gcn.T)
    assert gcn[5, 5] == 1.0
    assert gcn[0, 1].item() == pytest.approx(1 / (2 * 3) ** 0.5)


def test_an_induced_graph_renumbers_nodes_and_edges():
    part = path().induced(torch.tensor([3, 2, 5]))
    assert part.edges.T.tolist() == [[1, 0], [0, 1]]
    assert torch.equal(part.dense(), torch.eye(6)[[3, 2, 5]])


def test_a_neighbourhood_holds_what_is_reached():
    part, places = path().neighbourhood(torch.tensor([0, 5]), 2)
    assert part.nodes == 4  # 0, 1, 2 and the isolated 5
    assert torch.equal(part.dense()[places], torch.eye(6)[[0, 5]])
    assert part.edges.shape == (2, 4)
    alone, _ = path().neighbourhood(torch.tensor([5]), 3)
    assert (alone.nodes, alone.edges.shape[1]) == (1, 0)


def test_directed_edges_are_followed_backwards():
    graph = Graph(torch.eye(6), tidy_edges(PATH, 6, undirected=False))
    part, places = graph.neighbourhood(torch.tensor([3]), 2)
    assert torch.equal(part.dense(), torch.eye(6)[[1, 2, 3]])
    assert places.tolist() == [2]


def test_matrices_of_a_part_are_those_of_the_whole():
    graph = path()
    whole = passing(graph.edges, 6, "gcn").dense()
    part, _ = graph.neighbourhood(torch.tensor([1]), 1)
    own = passing(part.edges, part.nodes, "gcn").dense()
    assert torch.equal(own, whole[:3, :3])  # node 2 keeps its degree of three


def test_nodes_are_rows():
    nodes = Nodes(path())
    assert len(nodes) == 6
    some = nodes.select(torch.tensor([4, 1]))
    assert some.numbers.tolist() == [4, 1]
    assert torch.equal(some.dense(), torch.eye(6)[[4, 1]])
    assert nodes.narrow(0, 6) is nodes
    assert some.fingerprint != nodes.fingerprint != Nodes(path(7)).fingerprint


def test_strange_graphs_are_told():
    with pytest.raises(DataError, match="names node 9"):
        Graph(torch.eye(6), torch.tensor([[0], [9]]))
    with pytest.raises(DataError, match="two rows"):
        Graph(torch.eye(6), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="not finite"):
        Graph(torch.full((2, 2), torch.nan), torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(DataError, match="floating-point"):
        Graph(torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64))


def test_errors_by_frequency():
    graph = path()
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    same = frequency_errors(teacher, teacher, graph.edges)
    assert same["low_error"] == pytest.approx(0, abs=1e-9)
    assert same["high_error"] == 0
    # a constant student has no differences at all: its error is the teacher's mean difference
    flat = frequency_errors(torch.zeros(6, 3), teacher, graph.edges)
    ends = teacher[graph.edges[0]] - teacher[graph.edges[1]]
    assert flat["high_error"] == pytest.approx(ends.abs().mean().item(), rel=1e-6)
    mean = passing(graph.edges, 6, "sage").product(teacher.double().softmax(-1))
    low = (mean * (mean * 3).log()).sum(-1).mean()
    assert flat["low_error"] == pytest.approx(low.item(), rel=1e-6)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert frequency_errors(teacher * 2, teacher, none)["high_error"] == 0


def test_loops_come_last():
    assert with_loops(PATH, 5)[:, 4:].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_request_does_not_look_at_the_whole_graph_again(monkeypatch):
    graph = Graph(torch.randn(30, 4), torch.tensor([[0, 1], [1, 0]]))
    Nodes(graph, torch.tensor([3])).sparse()
    monkeypatch.setattr(torch, "count_nonzero", lambda *_: pytest.fail("a second look"))
    found = Nodes(graph, torch.tensor([7])).sparse()
    assert torch.equal(found, graph.dense()[7:8])
