"""Serving nodes: requests are answered as in the whole graph; times are ratios in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.data import open_data
from stillhouse.models.gat import GAT
from stillhouse.models.gcn import GCN
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.models.sage import SAGE
from stillhouse.parts.graph import Nodes
from stillhouse.stages.serving_nodes import answer_nodes, requests, serving
from stillhouse.tasks.node_classification import NodeNet


@pytest.fixture
def graph():
    return open_data("generated-graph", options={"nodes": 90})["train"].graph


@pytest.mark.parametrize("kind", [GCN, SAGE, GAT, NodeMLP])
def test_requests_are_answered_exactly(graph, kind):
    net = NodeNet(kind(3, 8, width=8)).eval()
    with torch.no_grad():
        whole = net(Nodes(graph))["logits"]
        for asked in requests(graph, 5, 6, torch.Generator().manual_seed(0)):
            assert len(torch.unique(asked)) == 5
            torch.testing.assert_close(answer_nodes(net, graph, asked), whole[asked])


def test_a_net_that_passes_messages_reads_no_more_than_its_neighbourhood(graph):
    seen = []

    class Watched(GCN):
        def forward(self, x, edge_index):
            seen.append(len(x))
            return super().forward(x, edge_index)

    net = NodeNet(Watched(3, 8, width=4, layers=1)).eval()
    with torch.no_grad():
        answer_nodes(net, graph, torch.tensor([3]))
    degree = int((graph.edges[1] == 3).sum())
    assert seen == [degree + 1]


def test_times_are_told_for_every_kind(graph):
    nets = {
        "student": NodeNet(NodeMLP(3, 8, width=8)).train(),
        "teacher": NodeNet(GCN(3, 8, width=8)),
        "unknown reach": NodeNet(_Plain()),
    }
    rng = torch.Generator().manual_seed(0)
    found = serving(nets, graph, sizes=(2,), seconds=0.02, rng=rng)
    assert set(found) == {"graph", "request of 2"}
    assert set(found["graph"]) == set(nets)
    assert set(found["request of 2"]) == {"student", "teacher"}
    for times in found.values():
        assert times["student"]["ratio"] == 1.0
        assert all(0 < own["p50"] <= own["p95"] for own in times.values())
    assert nets["student"].training


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x, edge_index):
        return self.layer(x)
