"""FF-G2M: reference vectors, the sheet's properties, PyG's classes, kill and resume, bad input."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Adam

import stillhouse as still
from stillhouse import catalogue
from stillhouse.batch import Batch
from stillhouse.clock import Clock
from stillhouse.data import open_data
from stillhouse.data.node_splits import node_splits
from stillhouse.errors import DataError, StillhouseError
from stillhouse.exporting import export_artifact
from stillhouse.launch import open_job, run
from stillhouse.models.gcn import GCN
from stillhouse.models.node_mlp import NodeMLP
from stillhouse.opening import open_artifact
from stillhouse.parts.graph import Graph, Nodes, tidy_edges
from stillhouse.recipe import load_recipe
from stillhouse.recipe_models import open_method
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


# ------------------------------------------------------------------------- properties
def spec(**changes: Any) -> dict[str, Any]:
    return {**FFG2M.example(0), "compare": [], **changes}


def opened(folder, **changes: Any):
    recipe = load_recipe(spec(**changes))
    job = open_job(recipe, folder)
    method = open_method(recipe)
    teacher = job.teacher() if method.wants_teacher() else None
    objective = method.objective(job, job.student(), teacher)
    if teacher is not None:
        teacher.bind(objective.wants, job.task)
    order = method.order(job)
    rows = order.epoch(0, lambda: torch.Generator())
    assert len(rows) == len(order) == 1
    return job, objective, teacher, order.read(rows[0], job.views())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_weight_of_the_labels_at_its_ends(tmp_path, weight):
    _, objective, teacher, batch = opened(tmp_path, settings={"label_weight": weight})
    terms = objective.terms(batch, teacher)
    assert set(terms) == ({"task"} if weight else {"low", "high"})
    if weight:
        assert teacher is None
        objective.eval()
        out = objective.student(batch["x"])["logits"]
        labelled = batch["target"] >= 0
        plain = nn.functional.cross_entropy(out[labelled], batch["target"][labelled])
        torch.testing.assert_close(objective.terms(batch, None)["task"], plain)


def test_no_gradient_reaches_the_teacher(tmp_path):
    _, objective, teacher, batch = opened(tmp_path)
    sum(objective.terms(batch, teacher).values()).backward()
    module = teacher.guest().module
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in objective.student.parameters())


def test_the_student_does_not_read_edges(tmp_path):
    job, objective, _, batch = opened(tmp_path)
    net = objective.student.eval()
    graph = batch["x"].graph
    other = Graph(graph.dense(), tidy_edges(torch.randint(0, graph.nodes, (2, 90)), graph.nodes))
    with torch.no_grad():
        torch.testing.assert_close(net(Nodes(other))["logits"], net(batch["x"])["logits"])
        teacher = job.teacher().guest().module
        assert not torch.equal(teacher(Nodes(other))["logits"], teacher(batch["x"])["logits"])


def test_drawn_edges_give_the_whole_mean_on_average(tmp_path):
    _, objective, teacher, batch = opened(tmp_path)
    whole = objective.eval().terms(batch, teacher)
    job, few, teacher, batch = opened(tmp_path / "few", settings={"edges": 40})
    few.load_state_dict(objective.state_dict())
    few.eval()
    draws = []
    for step in range(400):
        clock = job.clock("student")
        clock.step = step
        terms = few.terms(batch, teacher, clock)
        draws.append(torch.stack([terms["low"].detach(), terms["high"].detach()]))
    drawn = torch.stack(draws)
    assert (drawn.std(0) > 0).all()
    wanted = torch.stack([whole["low"], whole["high"]]).detach()
    near = 4 * drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - wanted).abs() < near).all()


def test_the_teacher_is_asked_once(tmp_path, monkeypatch):
    from stillhouse.teachers.live import Live

    asked = []
    answer = Live.knowledge

    def count(self, batch):
        asked.append(batch.size)
        return answer(self, batch)

    monkeypatch.setattr(Live, "knowledge", count)
    job = open_job(load_recipe(spec()), tmp_path)
    open_method(job.recipe).run(job)
    assert asked == [60]


def test_the_baseline_kd_at_temperature_one_is_glnn(tmp_path):
    settings = {"mode": "glnn", "label_weight": 0.3}
    _, ours, teacher, batch = opened(tmp_path, settings=settings)
    found = ours.eval().terms(batch, teacher)
    from stillhouse.baselines.kd import KD, KDObjective

    kd = KDObjective(ours.student, opened(tmp_path / "b")[0].task,
                     KD.Config(alpha=0.7, temperature=1.0))  # fmt: skip
    other = kd.eval().terms(batch, teacher)
    torch.testing.assert_close(found["task"], other["task"])
    torch.testing.assert_close(found["nodes"], other["logits"])


def test_presets_are_recipes(tmp_path):
    from stillhouse.methods.graphs.ffg2m import PRESETS, preset

    assert len(PRESETS) == 18
    for data, teacher in PRESETS:
        made = preset(data, teacher)
        recipe = load_recipe({"method": "ffg2m", "data": "planetoid", **made})
        assert recipe.budget.patience == 50
        assert recipe.student.options["layers"] == recipe.teacher.options["layers"]
    own = preset("cora", "gcn")
    shipped = load_recipe("ffg2m-cora-preset")
    assert own["settings"].items() <= shipped.settings.items()
    assert own["student"]["options"].items() <= shipped.student.options.items()
    assert own["teacher"]["options"].items() <= shipped.teacher.options.items()
    assert own["student"]["options"]["dropout"] == 0.6  # the student's, not the swapped one


# ------------------------------------------------------------- runs, settings, own models
def test_every_shipped_recipe_is_valid():
    from stillhouse.recipe import recipe_ids

    names = [name for name in recipe_ids() if name.startswith("ffg2m")]
    assert len(names) >= 5
    for name in names:
        assert load_recipe(name).method == "ffg2m"


@pytest.mark.parametrize("network", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("setting", ["transductive", "inductive"])
def test_it_runs_with_every_teacher_in_both_settings(tmp_path, network, setting):
    recipe = spec(
        data={"name": "generated-graph", "options": {"setting": setting, "nodes": 150}},
        teacher={
            "model": f"stillhouse:{network}", "options": {"width": 8, "dropout": 0.1},
            "train": {"steps": 40, "batch": 256, "lr": 0.05, "optimizer": "adam"},
        },
        budget={"steps": 40, "batch": 256, "lr": 0.05, "optimizer": "adam",
                "select": "latest-best"},
    )  # fmt: skip
    result = run(load_recipe(recipe), folder=tmp_path, progress=False)
    figures = result.sides["distilled"]["0"]
    assert figures["accuracy"] > 0.55  # three classes
    assert figures["speedup_request_1"] > 0
    table = result.summary["details"]["tables"][-1]
    assert {row[0] for row in table["rows"]} == {"graph", "request of 1", "request of 256"}


def test_pyg_classes_and_data_plug_in(tmp_path):
    pyg = pytest.importorskip("torch_geometric")
    from torch_geometric import nn as networks

    source = open_data("generated-graph").judging()
    graph, labels = source["train"].graph, torch.arange(60) % 3
    masks = {f"{r}_mask": torch.zeros(60, dtype=torch.bool) for r in ("train", "val", "test")}
    masks["train_mask"][:20], masks["val_mask"][20:40], masks["test_mask"][40:] = True, True, True
    data = pyg.data.Data(x=graph.dense(), edge_index=graph.edges, y=labels, **masks)
    for kind in (networks.GCN, networks.GraphSAGE):
        torch.manual_seed(0)
        teacher = kind(8, 8, num_layers=2, out_channels=3)
        optimizer = Adam(teacher.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            out = teacher(data.x, data.edge_index)
            nn.functional.cross_entropy(out[:20], labels[:20]).backward()
            optimizer.step()
        student = networks.MLP([8, 16, 3], norm=None)
        result = still.distill(
            teacher, student, data, method="ffg2m", folder=tmp_path / kind.__name__,
            steps=60, batch=64, lr=0.05, progress=False, compare=(),
        )  # fmt: skip
        figures = result.sides["distilled"]["0"]
        assert figures["accuracy"] > 0.55
        assert "speedup_graph" in figures
        # how far a class of PyG's reads is not known, so its requests are not timed
        assert "speedup_request_1" not in figures
        with torch.no_grad():
            taught = teacher.eval()(data.x, data.edge_index).softmax(-1)
            own = result.artifact.module(Nodes(graph))["logits"].softmax(-1)
        assert (taught.argmax(-1) == own.argmax(-1)).float().mean() > 0.6


def test_a_tensor_of_logits_teaches(tmp_path):
    source = open_data("generated-graph")
    graph = source["train"].graph
    logits = 3 * nn.functional.one_hot(torch.arange(60) % 3).float()

    class Told:
        provides = frozenset({"logits"})
        fingerprint = "told"

        def bind(self, wants, task):
            assert [w.field for w in wants] == ["logits"]

        def knowledge(self, batch):
            return Knowledge({"logits": logits[batch["id"]]})

        def guest(self):
            raise AssertionError

    result = still.distill(
        Told(), NodeMLP(3, graph.features, width=8), source, method="ffg2m", folder=tmp_path,
        steps=60, batch=64, lr=0.05, progress=False, compare=(),
    )  # fmt: skip
    figures = result.sides["distilled"]["0"]
    assert figures["accuracy"] > 0.6
    assert "low_error" in figures
    assert "speedup_graph" not in figures


def test_what_is_saved_answers_for_rows_and_for_graphs(tmp_path):
    result = run(load_recipe(spec()), folder=tmp_path / "run", progress=False)
    graph = open_data("generated-graph")["train"].graph
    artifact = open_artifact(tmp_path / "run")
    by_row = artifact.predict(list(graph.dense()), top=3)
    by_graph = artifact.predict([graph], top=3)
    assert [a["class"] for a in by_row] == [a["class"] for a in by_graph]
    assert by_row[0]["top"][0][1] == pytest.approx(by_graph[0]["top"][0][1], abs=1e-6)
    with torch.no_grad():
        whole = result.artifact.module(Nodes(graph))["logits"].argmax(-1)
    assert [a["class"] for a in by_row] == [f"class {c}" for c in whole.tolist()]
    np.save(tmp_path / "rows.npy", graph.dense()[:5].numpy())
    from stillhouse.launch import infer

    told = infer(tmp_path / "run", [tmp_path / "rows.npy"], tmp_path / "out.jsonl", {"top": 2})
    assert told["inputs"] == 5
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5
    exported = export_artifact(tmp_path / "run", "onnx")
    assert exported["largest_difference"] < 1e-4
    with pytest.raises(DataError, match="rows of 8"):
        artifact.predict([torch.zeros(7)])


def test_a_graph_network_as_artifact_wants_a_graph(tmp_path):
    recipe = spec(student={"model": "stillhouse:gcn", "options": {"width": 4}})
    run(load_recipe(recipe), folder=tmp_path, progress=False)
    artifact = open_artifact(tmp_path)
    graph = open_data("generated-graph")["train"].graph
    assert len(artifact.predict([graph])) == 60
    with pytest.raises(StillhouseError, match="passes messages"):
        artifact.predict(list(graph.dense()))


def test_killed_and_resumed_ends_bit_for_bit(tmp_path, kill_and_resume):
    recipe = load_recipe(
        spec(
            budget={"steps": 160, "batch": 64, "lr": 0.01, "optimizer": "adam",
                    "select": "latest-best", "patience": 150, "validate_every": 2},
            output={"checkpoint_minutes": 1e-4},
        )
    )  # fmt: skip

    def train(folder):
        job = open_job(recipe, folder)
        try:
            return open_method(recipe).run(job)
        finally:
            job.log.close()

    whole = train(tmp_path / "whole").module.state_dict()
    kills = kill_and_resume(lambda: train(tmp_path / "cut"), tmp_path / "cut")
    again = train(tmp_path / "cut").module.state_dict()
    assert kills >= 2
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_early_stopping_keeps_the_latest_best(tmp_path):
    recipe = load_recipe(
        spec(budget={"steps": 300, "batch": 64, "lr": 0.05, "optimizer": "adam",
                     "select": "latest-best", "patience": 7,
                     "validate_every": 1})
    )  # fmt: skip
    job = open_job(recipe, tmp_path)
    method = open_method(recipe)
    objective = method.objective(job, job.student(), job.teacher())
    from stillhouse.teachers.once import Once

    fit = job.fit("student", objective, method.order(job), teacher=Once(job.teacher()))
    job.log.flush()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = [
        line["scores"]["accuracy"] for line in lines
        if line["event"] == "validation" and line["stage"] == "student"
    ]  # fmt: skip
    best = max(scores)
    latest = max(n for n, score in enumerate(scores, 1) if score == best)
    assert fit.best_step == latest
    assert fit.steps == len(scores) == latest + 7 < 300
    assert "7" in fit.stopped


@pytest.mark.slow
def test_two_processes_equal_one(one_and_two_processes):
    found = one_and_two_processes("ffg2m")
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ bad input
def test_bad_input_is_told(tmp_path):
    with pytest.raises(StillhouseError, match="GCN cannot read"):
        run(
            load_recipe(spec(data={"name": "generated"}, task="classification")),
            folder=tmp_path / "a", progress=False,
        )  # fmt: skip
    with pytest.raises(StillhouseError, match="mode"):
        open_method(load_recipe(spec(settings={"mode": "lowpass"})))
    with pytest.raises(StillhouseError, match="label_weight"):
        open_method(load_recipe(spec(settings={"label_weight": 1.5})))
    with pytest.raises(StillhouseError, match="accumulate"):
        run(
            load_recipe(spec(budget={"steps": 2, "batch": 64, "accumulate": 2})),
            folder=tmp_path / "b", progress=False,
        )  # fmt: skip
    with pytest.raises(StillhouseError, match="patience"):
        load_recipe(spec(budget={"steps": 2, "patience": 3}))
    _, objective, _, batch = opened(tmp_path / "c")
    part, said = batch.select(torch.arange(5)), Knowledge({"logits": torch.zeros(5, 3)})
    with pytest.raises(DataError, match="edges of a graph"):
        objective(part, said, Clock())


def test_the_teacher_must_know_the_same_classes(tmp_path):
    source = open_data("generated-graph")
    with pytest.raises(StillhouseError, match="4 outputs"):
        still.distill(
            GCN(4, 8, width=4), NodeMLP(3, 8, width=4), source, method="ffg2m",
            folder=tmp_path, steps=2, progress=False,
        )  # fmt: skip
