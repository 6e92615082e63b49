"""Nodes as rows: models of both kinds, batches of some nodes, what is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.batch import Batch, Shuffled, Whole, read_block
from stillhouse.clock import Views
from stillhouse.data import open_data
from stillhouse.errors import ModelError
from stillhouse.launch import open_job, run
from stillhouse.metrics.cost import macs, measure
from stillhouse.models.gcn import GCN
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.parts.graph import Nodes, passing
from stillhouse.parts.sparse import SparseMatrix
from stillhouse.recipe import load_recipe
from stillhouse.tasks import open_task
from stillhouse.tasks.node_classification import NodeNet, reads_edges


class PlainGNN(nn.Module):
    def forward(self, x, edge_index, edge_weight=None):
        return x[:, :3]


@pytest.fixture
def task():
    return open_task("node-classification", open_data("generated-graph"))


def test_who_reads_edges():
    assert reads_edges(GCN(2, 3))
    assert reads_edges(PlainGNN())
    assert not reads_edges(NodeMLP(2, 3))
    assert not reads_edges(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("make", [lambda: GCN(3, 8, width=4), lambda: NodeMLP(3, 8, width=4),
                                  PlainGNN, lambda: nn.Linear(8, 3)])  # fmt: skip
def test_some_nodes_are_answered_as_among_all(task, make):
    net = task.net(make()).eval()
    whole = Nodes(task.splits["train"].graph)
    with torch.no_grad():
        full = net(whole)["logits"]
        for asked in ([4], [9, 2, 4], list(range(50, 3, -1))):
            rows = torch.tensor(asked)
            torch.testing.assert_close(net(whole.select(rows))["logits"], full[rows])
        torch.testing.assert_close(net(whole.narrow(7, 12))["logits"], full[7:12])


def test_a_batch_of_nodes_is_selected_cut_and_split_like_any_other(task):
    order = Whole(task.splits["train"])
    batch = order.read(order.epoch(0, torch.Generator)[0], Views(0))
    assert (batch.size, len(order)) == (60, 1)
    assert batch["x"].index is None
    part = batch.select(torch.tensor([5, 1]))
    assert part["x"].numbers.tolist() == part["id"].tolist() == [5, 1]
    assert [piece["x"].numbers.tolist() for piece in batch.narrow(3, 7).split(2)] == [
        [3, 4],
        [5, 6],
    ]
    assert [len(piece["x"]) for piece in batch.cut([10, 50])] == [10, 50]
    assert batch.to("cpu") is batch


def test_every_process_reads_the_whole_graph(task):
    order = Whole(task.splits["train"])
    rows = order.epoch(0, torch.Generator)[0]
    for rank in (0, 1):
        batch = read_block(order, rows, Views(0), rank, 2)
        assert (batch.size, batch.of) == (60, 60)
        assert batch["rows"] == slice(0, 60)
    part = read_block(Shuffled(task.splits["train"], 64), rows, Views(0), 1, 2)
    assert part["x"].numbers.tolist() == list(range(30, 60))


def test_a_batch_without_labels_has_no_loss(task):
    logits = torch.zeros(2, 3, requires_grad=True)
    batch = Batch(target=torch.tensor([-100, -100]))
    loss = task.loss({"logits": logits}, batch)["task"]
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))
    one = task.loss({"logits": logits}, Batch(target=torch.tensor([-100, 1])))["task"]
    torch.testing.assert_close(one, torch.tensor(3.0).log())


def test_size_and_speed_are_measured(task):
    found = measure({"mlp": (task.net(NodeMLP(3, 8, width=4)), task.example_view())}, seconds=0.02)
    assert found["mlp"]["macs"] == 8 * 4 + 4 * 3
    assert set(found["mlp"]["latency_ms"]) == {"1", "32"}


def test_products_with_a_sparse_matrix_are_counted():
    matrix = SparseMatrix.of(torch.eye(6)[:, :4])

    class Times(nn.Module):
        def forward(self, dense):
            return matrix.product(dense)

    assert macs(Times(), torch.ones(4, 5)) == 4 * 5


def test_supervised_training_of_both_kinds(tmp_path):
    for name in ("gcn", "node_mlp"):
        recipe = load_recipe(
            {
                "method": "supervised", "task": "node-classification", "data": "generated-graph",
                "student": {"model": f"stillhouse:{name}", "options": {"width": 8, "dropout": 0.0}},
                "budget": {"steps": 60, "batch": 16, "lr": 0.05, "optimizer": "adam"},
            }
        )  # fmt: skip
        result = run(recipe, folder=tmp_path / name, progress=False)
        assert result.sides["distilled"]["0"]["accuracy"] > 0.6


def test_a_model_of_another_width_is_told(tmp_path):
    recipe = load_recipe(
        {
            "method": "supervised", "task": "node-classification", "data": "generated-graph",
            "student": {"model": "stillhouse:gcn", "options": {"inputs": 5}},
        }
    )  # fmt: skip
    job = open_job(recipe, tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        job.task.check(job.student(), None)


def test_matrices_are_remembered_by_the_tensor_of_edges():
    edges = open_data("generated-graph")["train"].graph.edges
    first = passing(edges, 60, "gcn")
    assert passing(edges, 60, "gcn") is first
    other = edges.clone()
    assert passing(other, 60, "gcn") is not first
    other[0, 0] = (other[0, 0] + 1) % 60
    changed = passing(other, 60, "gcn")
    assert not torch.equal(changed.dense(), first.dense())


def test_what_is_made_while_judging_serves_a_training():
    graph = open_data("generated-graph")["train"].graph
    net = NodeNet(nn.Linear(8, 3))
    with torch.inference_mode():
        net(Nodes(graph, torch.tensor([1, 2])))
        GCN(3, 8)(graph.sparse(), graph.edges)
    net(Nodes(graph))["logits"].sum().backward()
    GCN(3, 8)(graph.sparse(), graph.edges).sum().backward()
