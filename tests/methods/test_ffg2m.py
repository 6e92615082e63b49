"""FF-G2M: reference vectors, the sheet's properties, PyG's classes, kill and resume, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Adam

from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.data.node_splits import node_splits
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.parts.graph import Graph, Nodes
from stillhouse.tasks import open_task
from stillhouse.teacher import Knowledge

FFG2M: Any = catalogue.load("ffg2m")
MODES = ("full", "mlp", "glnn", "lfd", "hfd")


class Given(nn.Module):
    """Logits that do not depend on what comes in: the student of a reference case."""

    sparse, reads_edges = True, False

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x):
        return self.logits


def objective_of(module, graph, labels, labelled, classes, **settings):
    """The method's objective around a module, and the batch of a graph."""
    seen = torch.full((graph.nodes,), -100)
    seen[labelled] = labels[labelled]
    rest = torch.tensor([n for n in range(graph.nodes) if n not in set(labelled.tolist())])
    splits = node_splits(
        graph, labels, labelled, rest[:1], rest[1:], classes=[str(c) for c in range(classes)]
    )
    task = open_task("node-classification", splits)
    method = FFG2M(FFG2M.Config(**settings))
    job = type("Job", (), {"task": task})()
    objective = method.objective(job, task.net(module), None)
    return objective, Batch(id=torch.arange(graph.nodes), x=Nodes(graph), target=seen)


def terms_of(objective, batch, teacher) -> dict[str, torch.Tensor]:
    return objective(batch, Knowledge({"logits": teacher}), Clock())


def case_of(golden, name):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in golden("ffg2m").case(name).items()}


@pytest.mark.parametrize(("name", "tau", "lam"), [("loss_a", 1.5, 0.3), ("loss_b", 1.0, 0.0)])
def test_the_losses_of_every_mode_are_the_released_ones(golden, name, tau, lam):
    case = case_of(golden, name)
    nodes, classes = case["H"].shape
    graph = Graph(torch.ones(nodes, 1).double(), case["edges"])
    found = {}
    for number, mode in enumerate(MODES):
        objective, batch = objective_of(
            Given(case["Z"]), graph, case["y"], case["labelled"], classes,
            temperature=tau, label_weight=lam, mode=mode,
        )  # fmt: skip
        terms = terms_of(objective, batch, case["H"])
        total = sum(terms.values())
        total.backward()
        slope = objective.student.module.logits.grad
        assert total.item() == pytest.approx(case["totals"][number].item(), abs=1e-10)
        torch.testing.assert_close(slope, case[f"grad_mode{number}"], rtol=1e-9, atol=1e-10)
        found.update({f"{mode}/{key}": value.item() for key, value in terms.items()})
    rest = 1 - lam
    assert found["full/low"] == pytest.approx(rest * case["L_LFD"].item(), abs=1e-10)
    assert found["full/high"] == pytest.approx(rest * case["L_HFD"].item(), abs=1e-10)
    assert found["glnn/nodes"] == pytest.approx(rest * case["KL_node"].item(), abs=1e-10)
    assert found["mlp/task"] == pytest.approx(case["L_label"].item(), abs=1e-10)
    # equal logits at two nodes: the distance has no slope there
    assert torch.equal(case["Z"][0], case["Z"][1])
    assert ("full/task" in found) == (lam > 0)


@pytest.mark.parametrize("name", ["loss_a", "loss_b"])
def test_each_terms_gradient_is_the_released_one(golden, name):
    from stillhouse.losses.graph import edge_difference_kl, edge_kl
    from stillhouse.losses.logits import kl

    case = case_of(golden, name)
    tau = 1.5 if name == "loss_a" else 1.0
    z = case["Z"].requires_grad_(True)
    terms = {
        "L_label": nn.functional.cross_entropy(z[case["labelled"]], case["y"][case["labelled"]]),
        "L_LFD": edge_kl(z, case["H"], case["edges_loop"]),
        "L_HFD": edge_difference_kl(z, case["H"], case["edges"], temperature=tau),
        "KL_node": kl(z, case["H"], scale=False),
    }
    for key, term in terms.items():
        assert term.item() == pytest.approx(case[key].item(), abs=1e-10)
        (slope,) = torch.autograd.grad(term, z)
        torch.testing.assert_close(slope, case[f"grad_{key}"], rtol=1e-9, atol=1e-10)


def test_the_sheets_example(golden):
    case = case_of(golden, "sheet_example")
    graph = Graph(torch.ones(3, 1).double(), case["edges"])
    settings = {"temperature": 1.5, "label_weight": 0.0}
    labels = torch.tensor([0, 1, 0])
    for mode, key, wanted in (
        ("full", "low", "L_LFD"), ("full", "high", "L_HFD"), ("glnn", "nodes", "KL_node")
    ):  # fmt: skip
        objective, batch = objective_of(
            Given(case["Z"]), graph, labels, torch.tensor([0]), 2, mode=mode, **settings
        )
        assert terms_of(objective, batch, case["H"])[key].item() == pytest.approx(
            case[wanted].item(), abs=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_steps_end_where_the_release_ends(golden, dtype):
    case = case_of(golden, "student_steps")
    features, hidden = case["X"].shape[1], len(case["b0"])
    classes = len(case["b1"])
    mlp = NodeMLP(classes, features, width=hidden, layers=2, dropout=0.0).to(dtype)
    with torch.no_grad():
        for number in (0, 1):
            mlp.layers[number].weight.copy_(case[f"w{number}"])
            mlp.layers[number].bias.copy_(case[f"b{number}"])
    graph = Graph(case["X"].to(dtype), case["edges"])
    objective, batch = objective_of(
        mlp, graph, case["y"], case["labelled"], classes, temperature=1.5, label_weight=0.4
    )
    optimizer = Adam(objective.parameters(), lr=0.01, weight_decay=5e-4)
    near = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    teacher = case["H"].to(dtype)
    for row in case["losses"]:
        optimizer.zero_grad()
        terms = terms_of(objective, batch, teacher)
        found = torch.stack([terms[key] for key in ("task", "low", "high")])
        torch.testing.assert_close(found.detach(), row.to(dtype), **near)
        found.sum().backward()
        optimizer.step()
    for number in (0, 1):
        torch.testing.assert_close(
            mlp.layers[number].weight.detach(), case[f"w{number}_after"].to(dtype), **near
        )
    with torch.no_grad():
        torch.testing.assert_close(mlp(graph.dense()), case["logits_after"].to(dtype), **near)
