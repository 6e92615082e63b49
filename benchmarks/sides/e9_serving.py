"""E9: one process that answers for nodes by our MLP, our GCN and PyG's GCN, in turns.

Argument: "cora", "citeseer", or the number of nodes of a random graph.
"""

import json
import sys
from statistics import median

import torch
from torch_geometric import nn as networks
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import k_hop_subgraph

from stillhouse.data import open_data
from stillhouse.metrics.cost import percentile, timings
from stillhouse.models.gcn import GCN
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.parts.graph import Graph, Nodes, passing, tidy_edges
from stillhouse.stages.serving_nodes import answer_nodes, requests
from stillhouse.tasks.node_classification import NodeNet

LAYERS, WIDTH, CLASSES, SECONDS = 2, 256, 7, 2.0

torch.manual_seed(0)
torch.set_grad_enabled(False)
what = sys.argv[1]
if what.isdigit():
    nodes = int(what)
    drawn = torch.randint(0, nodes, (2, 5 * nodes))
    graph = Graph(torch.randn(nodes, 128), tidy_edges(drawn, nodes))
else:
    graph = open_data("planetoid", options={"graph": what})["train"].graph
edges, dense = graph.edges, graph.dense()

size = {"classes": CLASSES, "inputs": graph.features, "width": WIDTH, "layers": LAYERS}
mlp, gcn = NodeNet(NodeMLP(**size)).eval(), NodeNet(GCN(**size)).eval()
theirs = networks.GCN(graph.features, WIDTH, LAYERS, CLASSES, normalize=False).eval()
for own, other in zip(gcn.module.layers, theirs.convs):
    other.lin.weight.copy_(own.linear.weight)
    other.bias.copy_(own.bias)
# As a server would: normalised once, for the whole graph, so that requests are exact.
loops, weight = gcn_norm(edges, None, graph.nodes, add_self_loops=True)
passing(edges, graph.nodes, "gcn")


def by_pyg(asked):
    """PyG's way to answer a request: its k-hop subgraph, then the network on it."""
    found, part, places, kept = k_hop_subgraph(
        asked, LAYERS, loops, relabel_nodes=True, num_nodes=graph.nodes
    )
    return theirs(dense[found], part, weight[kept])[places]


whole = Nodes(graph)
reference = gcn(whole)["logits"]
apart = float((theirs(dense, loops, weight) - reference).abs().max())
for asked in requests(graph, 8, 3, torch.Generator().manual_seed(1)):
    for answer in (by_pyg(asked), answer_nodes(gcn, graph, asked)):
        apart = max(apart, float((answer - reference[asked]).abs().max()))
assert apart < 1e-3 * float(reference.abs().max()), apart


def contest(calls):
    """Medians of the ratios to the student, and milliseconds."""
    taken = timings(list(calls.values()), "cpu", seconds=SECONDS, most=2000)
    first = taken[0]
    return {
        name: {
            "ratio": median(a / b for a, b in zip(own, first)),
            "p50": percentile(own, 0.5),
            "p95": percentile(own, 0.95),
        }
        for name, own in zip(calls, taken)
    }


def served(count):
    """Requests of `count` nodes, each contestant the same ones."""
    asked = requests(graph, count, 64, torch.Generator().manual_seed(0))
    turn = dict.fromkeys(("mlp", "gcn", "pyg"), 0)

    def take(name):
        turn[name] += 1
        return asked[turn[name] % len(asked)]

    return {
        "mlp": lambda: answer_nodes(mlp, graph, take("mlp")),
        "gcn": lambda: answer_nodes(gcn, graph, take("gcn")),
        "pyg": lambda: by_pyg(take("pyg")),
    }


found = {
    "graph": contest(
        {
            "mlp": lambda: mlp(whole),
            "mlp, dense": lambda: mlp.module(dense),
            "gcn": lambda: gcn(whole),
            "pyg": lambda: theirs(dense, loops, weight),
        }
    ),
    "request of 1": contest(served(1)),
    "request of 256": contest(served(256)),
}
reach = [len(graph.neighbourhood(n, LAYERS)[0].edges[0]) for n in requests(
    graph, 1, 32, torch.Generator().manual_seed(2))]  # fmt: skip
print(json.dumps({"times": found, "apart": apart, "edges of a request": median(reach)}))
