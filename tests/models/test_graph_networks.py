"""Graph networks: reference layers, sparse equals dense, relabelling, neighbourhoods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.gat import GAT, GATLayer, softmax_by
from stillhouse.models.gcn import GCN, GCNLayer
from stillhouse.models.loading import load_model
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.models.sage import SAGE, SAGELayer
from stillhouse.parts.graph import Graph, Nodes, tidy_edges, with_loops
from stillhouse.parts.sparse import SparseMatrix
from stillhouse.tasks.node_classification import NodeNet

EXACT = {"rtol": 1e-12, "atol": 1e-12}
NETS = {
    "gcn": lambda **more: GCN(3, 10, width=8, **more),
    "sage": lambda **more: SAGE(3, 10, width=8, **more),
    "sage twice": lambda **more: SAGE(3, 10, width=8, self_loops=True, **more),
    "gat": lambda **more: GAT(3, 10, width=8, heads=2, **more),
}


def graph_of(seed: int = 0, nodes: int = 30) -> Graph:
    rng = torch.Generator().manual_seed(seed)
    edges = tidy_edges(torch.randint(0, nodes - 1, (2, 40), generator=rng), nodes)
    x = torch.randn(nodes, 10, generator=rng)
    x[torch.rand(nodes, 10, generator=rng) > 0.08] = 0.0
    return Graph(x, edges)


def test_layers_are_the_reference_ones(golden):
    case = {
        k: torch.from_numpy(np.asarray(v)) for k, v in golden("ffg2m").case("gnn_layers").items()
    }
    x, edges = case["X"], case["edges"]
    for key, layer in {
        "gcn": GCNLayer(*case["W"].shape),
        "sage": SAGELayer(*case["W"].shape),
        "sage_release": SAGELayer(*case["W"].shape, self_loops=True),
    }.items():
        layer.double()
        with torch.no_grad():
            layer.linear.weight.copy_(case["W"].T)
            layer.bias.copy_(case["b"])
            torch.testing.assert_close(layer(x, edges), case[key], **EXACT)
            sparse = SparseMatrix.of(x)
            torch.testing.assert_close(layer(sparse, edges), case[key], **EXACT)
    heads, inputs, outputs = case["gat_W"].shape
    gat = GATLayer(inputs, outputs, heads).double()
    with torch.no_grad():
        gat.linear.weight.copy_(case["gat_W"].permute(0, 2, 1).reshape(heads * outputs, inputs))
        gat.source.copy_(case["gat_a_src"])
        gat.target.copy_(case["gat_a_dst"])
        gat.bias.copy_(case["gat_b"].reshape(-1))
        found = gat(x, with_loops(edges, len(x)))
    torch.testing.assert_close(found, case["gat"], **EXACT)


@pytest.mark.parametrize("name", NETS)
def test_sparse_features_give_what_dense_ones_give(name):
    graph, net = graph_of(), NETS[name]().double().eval()
    assert isinstance(graph.sparse(), SparseMatrix)
    x = graph.dense().double()
    found = []
    for features in (x, SparseMatrix.of(x)):
        net.zero_grad()
        out = net(features, graph.edges)
        out.square().sum().backward()
        found.append((out.detach(), [p.grad.clone() for p in net.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_neighbourhood_answers_as_the_whole_graph(name, layers):
    graph = graph_of(1)
    net = NodeNet(NETS[name](layers=layers)).eval()
    with torch.no_grad():
        whole = net(Nodes(graph))["logits"]
        for asked in (torch.tensor([3]), torch.tensor([7, 2, 11]), torch.tensor([29])):
            part, places = graph.neighbourhood(asked, layers)
            assert part.nodes <= graph.nodes
            found = net(Nodes(part, places))["logits"]
            torch.testing.assert_close(found, whole[asked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_names_of_nodes_do_not_matter(name):
    graph, net = graph_of(2), NETS[name]().eval()
    names = torch.randperm(graph.nodes, generator=torch.Generator().manual_seed(0))
    renamed = torch.argsort(names)[graph.edges]
    with torch.no_grad():
        out = net(graph.dense(), graph.edges)
        torch.testing.assert_close(net(graph.dense()[names], renamed), out[names])


def test_an_isolated_node_keeps_its_own_features():
    graph, layer = graph_of(), SAGELayer(10, 4)
    alone = graph.nodes - 1
    assert not (graph.edges == alone).any()
    with torch.no_grad():
        own = graph.dense()[alone] @ layer.linear.weight.T + layer.bias
        torch.testing.assert_close(layer(graph.dense(), graph.edges)[alone], own)


def test_softmax_by_group():
    group = torch.tensor([0, 2, 0, 2, 2])
    score = torch.tensor([[800.0], [1.0], [801.0], [2.0], [-900.0]])
    found = softmax_by(score, group, 4)
    torch.testing.assert_close(found[[0, 2]], score[[0, 2]].softmax(0))
    torch.testing.assert_close(found[[1, 3, 4]], score[[1, 3, 4]].softmax(0))


def test_they_are_found_by_name_and_refuse_strange_sizes():
    about = {"classes": ["a", "b"], "input": [5]}
    for name, kind in (("gcn", GCN), ("sage", SAGE), ("gat", GAT), ("node_mlp", NodeMLP)):
        module = load_model(f"stillhouse:{name}", options={"width": 4}, about=about)
        assert isinstance(module, kind)
    for made in (
        lambda: GCN(0, 5), lambda: SAGE(2, 5, layers=0), lambda: NodeMLP(2, 5, dropout=1.0),
        lambda: GAT(2, 5, width=6, heads=4),
    ):  # fmt: skip
        with pytest.raises(ModelError):
            made()
