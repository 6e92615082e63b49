r"""FF-G2M: low- and high-frequency knowledge of a graph network for an MLP (Wu et al. 2023).

A GNN teacher with logits :math:`h` and an MLP student with logits :math:`z` see one graph: N nodes,
directed edges A in both directions without loops, and A+ = A with a loop at every node. V_L are
the labelled nodes. Low frequencies are what neighbours share, high ones how they differ:

.. math::
    L_{label} &= \text{mean}_{i \in V_L} CE(z_i, y_i) \\
    L_{LFD} &= \frac{1}{|A^+|} \sum_{(u,v) \in A^+} KL(\sigma(h_v) \| \sigma(z_u)) \\
    L_{HFD} &= \frac{1}{|A|} \sum_{(u,v) \in A}
        KL(\sigma(|h_u - h_v| / \tau) \| \sigma(|z_u - z_v| / \tau)) \\
    L &= \lambda L_{label} + (1 - \lambda) (L_{LFD} + L_{HFD})

Differences are taken class by class of the raw logits; the temperature :math:`\tau` has no factor
of its square, and none applies to the low part. Means are over edges, so well-connected nodes weigh
more. The graph is needed in training only.

The low part is computed by nodes, not by edges: cross-entropy is linear in the teacher's side, so
its probabilities are added up over the neighbours beforehand.

Where the released code (LirongWu/FF-G2M) differs: its parameter files name the two dropout rates
the other way round (`PRESETS` has them by role), its GraphSAGE runs on a graph that holds loops
already (`stillhouse:sage` with `self_loops: true`), and the student's best weights are not kept;
here they are. The losses are equal, so there is no setting "official" for them.

GLNN (Zhang et al. 2022), the baseline, is the setting `mode: glnn`: each node matched with itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.artifact import Artifact
from stillhouse.batch import Batch, Whole
from stillhouse.clock import Clock
from stillhouse.errors import DataError
from stillhouse.losses.graph import (
    NeighbourTargets,
    edge_difference_kl,
    edge_kl,
    neighbour_kl,
    neighbour_targets,
)
from stillhouse.losses.logits import kl
from stillhouse.method import Card, Claim, MethodConfig, StudentTraining, Variant
from stillhouse.metrics.graph_frequency import frequency_errors
from stillhouse.net import Net
from stillhouse.objective import Objective
from stillhouse.parts.graph import Graph, Nodes, with_loops
from stillhouse.stages.serving_nodes import serving
from stillhouse.task import Task
from stillhouse.teacher import Knowledge, Want
from stillhouse.teachers.once import Once


class Preset(NamedTuple):
    """What the release runs for a data set and a teacher.

    Attributes:
        layers: of both networks.
        width: of both.
        temperature: of the differences.
        label_weight: of the labels.
        student_dropout: of the MLP.
        teacher_dropout: of the GNN.
    """

    layers: int
    width: int
    temperature: float
    label_weight: float
    student_dropout: float
    teacher_dropout: float


# [code: param/best_parameters.json], the two dropouts by the network that really gets them.
PRESETS: dict[tuple[str, str], Preset] = {
    ("cora", "gcn"): Preset(3, 512, 1.5, 0.4, 0.6, 0.5),
    ("cora", "gat"): Preset(3, 1024, 1.2, 0.5, 0.3, 0.6),
    ("cora", "sage"): Preset(3, 512, 1.3, 0.5, 0.4, 0.3),
    ("citeseer", "gcn"): Preset(2, 256, 1.5, 0.1, 0.5, 0.5),
    ("citeseer", "gat"): Preset(2, 2048, 1.0, 0.1, 0.4, 0.5),
    ("citeseer", "sage"): Preset(2, 1024, 1.2, 0.1, 0.5, 0.5),
    ("pubmed", "gcn"): Preset(2, 1024, 1.5, 0.0, 0.3, 0.6),
    ("pubmed", "gat"): Preset(2, 2048, 1.2, 0.0, 0.3, 0.5),
    ("pubmed", "sage"): Preset(2, 2048, 1.3, 0.0, 0.6, 0.3),
    ("coauthor-cs", "gcn"): Preset(2, 1024, 1.5, 0.3, 0.5, 0.6),
    ("coauthor-cs", "gat"): Preset(2, 128, 1.1, 0.3, 0.4, 0.5),
    ("coauthor-cs", "sage"): Preset(2, 256, 1.4, 0.5, 0.6, 0.3),
    ("coauthor-phy", "gcn"): Preset(2, 2048, 1.2, 0.2, 0.3, 0.4),
    ("coauthor-phy", "gat"): Preset(2, 256, 1.4, 0.3, 0.3, 0.4),
    ("coauthor-phy", "sage"): Preset(2, 1024, 1.1, 0.5, 0.5, 0.6),
    ("amazon-photo", "gcn"): Preset(3, 2048, 1.3, 0.1, 0.5, 0.6),
    ("amazon-photo", "gat"): Preset(3, 256, 1.4, 0.3, 0.3, 0.3),
    ("amazon-photo", "sage"): Preset(3, 1024, 1.5, 0.2, 0.4, 0.4),
}


def preset(data: str, teacher: str) -> dict[str, Any]:
    """The sections of a recipe that a row of `PRESETS` stands for.

    Args:
        data: "cora", "citeseer" ...
        teacher: "gcn", "gat" or "sage".

    Returns:
        `settings`, `teacher`, `student` and `budget`, to be put into a recipe.

    Raises:
        KeyError: no such row.
    """
    row = PRESETS[data, teacher]
    size = {"layers": row.layers, "width": row.width}
    lr = 0.001 if data == "amazon-photo" else 0.01
    budget = {
        "epochs": 500,
        "batch": 1 << 16,
        "optimizer": "adam",
        "weight_decay": 5e-4,
        "schedule": "constant",
        "select": "latest-best",
        "patience": 50,
    }
    return {
        "settings": {"temperature": row.temperature, "label_weight": row.label_weight},
        "teacher": {
            "model": f"stillhouse:{teacher}",
            "options": {**size, "dropout": row.teacher_dropout},
            "train": {**budget, "lr": 0.01},
        },
        "student": {
            "model": "stillhouse:node_mlp",
            "options": {**size, "dropout": row.student_dropout},
        },
        "budget": {**budget, "lr": lr},
    }


Mode = Literal["full", "mlp", "glnn", "lfd", "hfd"]


class FFG2MObjective(Objective):
    """Labels, and what the teacher says of each node's neighbours and of its edges.

    Args:
        student: net with logits (N, K) of all nodes of the batch's graph.
        task: whose loss the labels use.
        config: see `FFG2M.Config`.
    """

    batchwide = True

    def __init__(self, student: Net, task: Task, config: FFG2M.Config) -> None:
        super().__init__(student)
        self._loss = task.loss
        self.config = config
        self.wants = () if config.mode == "mlp" or config.label_weight == 1 else (Want("logits"),)
        # The teacher and the graph are constant; by identity, so that others are noticed.
        self._targets: tuple[Tensor, Graph, NeighbourTargets] | None = None

    def forward(self, batch: Batch, knowledge: Knowledge, clock: Clock) -> dict[str, Tensor]:
        """The terms `task`, and by mode `low`, `high` or `nodes`."""
        config, view = self.config, batch.view("x")
        graph = whole_graph(view)
        out = self.student(view)
        logits: Tensor = out["logits"]
        weight = 1.0 if config.mode == "mlp" else config.label_weight
        terms: dict[str, Tensor] = {}
        if weight > 0:
            terms = {name: weight * value for name, value in self._loss(out, batch).items()}
        if weight == 1:
            return terms
        teacher = knowledge.tensor("logits").to(logits.dtype)
        if config.mode in {"full", "lfd"}:
            terms["low"] = (1 - weight) * self._low(logits, teacher, graph, clock)
        if config.mode in {"full", "hfd"}:
            terms["high"] = (1 - weight) * self._high(logits, teacher, graph, clock)
        if config.mode == "glnn":
            # The factor of its square keeps the gradient's size: else a temperature would only
            # weaken this term beside the labels.
            tempered = kl(logits, teacher, temperature=config.node_temperature)
            terms["nodes"] = (1 - weight) * tempered
        return terms

    def _low(self, logits: Tensor, teacher: Tensor, graph: Graph, clock: Clock) -> Tensor:
        most = self.config.edges
        if most is not None and graph.edges.shape[1] + graph.nodes > most:
            whole = with_loops(graph.edges, graph.nodes)
            return edge_kl(logits, teacher, drawn(whole, most, clock, "low"))
        if (
            self._targets is None
            or self._targets[0] is not teacher
            or self._targets[1] is not graph
        ):
            targets = neighbour_targets(teacher, with_loops(graph.edges, graph.nodes))
            self._targets = (teacher, graph, targets)
        return neighbour_kl(logits, self._targets[2])

    def _high(self, logits: Tensor, teacher: Tensor, graph: Graph, clock: Clock) -> Tensor:
        most, edges = self.config.edges, graph.edges
        if most is not None and edges.shape[1] > most:
            edges = drawn(edges, most, clock, "high")
        return edge_difference_kl(logits, teacher, edges, temperature=self.config.temperature)


def whole_graph(view: Any) -> Graph:
    """The graph of a view that asks about all its nodes, in order.

    Raises:
        DataError: it is none, or asks about some.
    """
    if not isinstance(view, Nodes):
        raise DataError(
            f"a graph is needed, and the data gives {type(view).__name__}: use the task "
            "node-classification and its data"
        )
    if view.index is not None:
        raise DataError(
            f"the loss is over the edges of a graph of {view.graph.nodes} nodes; {len(view)} of "
            "them were read"
        )
    return view.graph


def drawn(edges: Tensor, count: int, clock: Clock, stream: str) -> Tensor:
    """Some edges at random, with repetition: the mean over them is that over all, on average.

    Args:
        edges: (2, E).
        count: how many.
        clock: of the step; all processes draw the same.
        stream: name of the draw.
    """
    chosen = torch.randint(edges.shape[1], (count,), generator=clock.rng(stream))
    return edges[:, chosen.to(edges.device)]


class FFG2M(StudentTraining):
    """Distils a graph network into an MLP by what neighbours share and how they differ.

    Made for transductive and inductive node classification; the student reads features alone.
    """

    card = Card(
        id="ffg2m",
        title="Extracting Low-/High-Frequency Knowledge from Graph Neural Networks and Injecting "
        "it into MLPs: An Effective GNN-to-MLP Distillation Framework",
        summary="An MLP learns from a GNN what neighbours share and how they differ.",
        paper="AAAI 2023; arXiv 2305.10758",
        year=2023,
        authors=("Lirong Wu", "Haitao Lin", "Yufei Huang", "Tianyu Fan", "Stan Z. Li"),
        links=("https://arxiv.org/abs/2305.10758", "https://github.com/LirongWu/FF-G2M"),
        room="graphs",
        task="node-classification",
        needs=("logits",),
        yields="model",
        stages=(("teacher?", "train"), ("student", "train")),
    )

    class Config(MethodConfig):
        """Settings of `ffg2m`."""

        temperature: float = Field(
            1.5,
            gt=0,
            description="softens the differences between neighbours (tau)",
            json_schema_extra={"source": "code: src/train.py; by data set in PRESETS"},
        )
        label_weight: float = Field(
            0.1,
            ge=0,
            le=1,
            description="weight of the labels (lambda); the teacher has the rest",
            json_schema_extra={"source": "code: src/train.py; by data set in PRESETS"},
        )
        mode: Mode = Field(
            "full",
            description="full; low (lfd) or high (hfd) frequencies alone; each node with itself "
            "(glnn); labels alone (mlp)",
            json_schema_extra={"source": "code: src/train_and_eval.py, ablation modes 0 to 4"},
        )
        node_temperature: float = Field(
            1.0,
            gt=0,
            description="of mode glnn: softens both distributions of a node; the term is "
            "multiplied by its square",
            json_schema_extra={"source": "code: 1; the square: Hinton et al. 2015, section 2"},
        )
        edges: int | None = Field(
            None,
            ge=1,
            description="most edges of a step and term; of larger graphs so many are drawn anew "
            "in each step; none: all",
            json_schema_extra={"source": "chosen here, for graphs beyond a million edges"},
        )

    variants: ClassVar[dict[str, Variant]] = {
        "glnn": Variant(set={"mode": "glnn"}, about="GLNN: each node is matched with itself"),
        "glnn-tempered": Variant(
            set={"mode": "glnn", "node_temperature": 2.0}, about="GLNN at temperature 2"
        ),
        "lfd": Variant(set={"mode": "lfd"}, about="low frequencies alone"),
        "hfd": Variant(set={"mode": "hfd"}, about="high frequencies alone"),
        "mlp": Variant(set={"mode": "mlp"}, about="labels alone, the release's plain MLP"),
    }
    claims: ClassVar[list[Claim]] = [
        Claim("beats the MLP alone", "accuracy", "ffg2m", "supervised"),
        Claim("beats its own GNN teacher", "accuracy", "ffg2m", "teacher"),
        Claim("beats GLNN", "accuracy", "ffg2m", "ffg2m/glnn"),
        Claim("beats GLNN with a temperature", "accuracy", "ffg2m", "ffg2m/glnn-tempered"),
        Claim("low frequencies alone help the MLP", "accuracy", "ffg2m/lfd", "supervised"),
        Claim("high frequencies alone help the MLP", "accuracy", "ffg2m/hfd", "supervised"),
        Claim("both help more than the low ones", "accuracy", "ffg2m", "ffg2m/lfd"),
        Claim("both help more than the high ones", "accuracy", "ffg2m", "ffg2m/hfd"),
        Claim(
            "GLNN leaves the high frequencies behind", "high_error", "ffg2m", "ffg2m/glnn", "lower"
        ),
    ]

    def objective(self, job: Any, student: Any, teacher: Any) -> Objective:
        """Labels, low and high frequencies."""
        return FFG2MObjective(student, job.task, self.config)

    def wants_teacher(self) -> bool:
        """Not for labels alone."""
        return bool(self.config.mode != "mlp" and self.config.label_weight < 1)

    def order(self, job: Any) -> Whole:
        """The whole graph in every step."""
        return Whole(job.splits["train"], collate=job.task.collate)

    def run(self, job: Any) -> Artifact:
        """Teacher; its logits once, since the graph is always the same; then the student."""
        teacher = Once(job.teacher()) if self.wants_teacher() else None
        objective = self.objective(job, job.student(), teacher)
        job.fit("student", objective, self.order(job), teacher=teacher)
        artifact: Artifact = job.model_artifact(objective.export())
        return artifact

    def judge(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """Accuracy on the test nodes; how far teacher and student are apart by frequency.

        With a network as teacher also how many times as fast the student answers, for a whole
        graph and for requests of one node: medians of ratios in one process.
        """
        figures = super().judge(job, artifact)
        if not self.wants_teacher():
            return figures
        figures.update(self._frequencies(job, artifact))
        for kind, times in self._serving(job, artifact).items():
            if "teacher" in times:
                name = "graph" if kind == "graph" else kind.replace("request of ", "request_")
                figures[f"speedup_{name}"] = times["teacher"]["ratio"]
        return figures

    def _frequencies(self, job: Any, artifact: Artifact) -> dict[str, float]:
        """On the graph that training saw."""
        teacher = job.teacher()
        teacher.bind((Want("logits"),), job.task)
        order = self.order(job)
        batch = order.read(order.epoch(0, lambda: torch.Generator())[0], job.views()).to(job.device)
        view = batch.view("x")
        student = artifact.module.eval()
        with torch.inference_mode():
            own = student(view)["logits"].float()
        said = teacher.knowledge(batch).tensor("logits").float()
        return frequency_errors(own, said, view.graph.edges)

    def _serving(self, job: Any, artifact: Artifact) -> dict[str, dict[str, dict[str, float]]]:
        """Student first; in the whole graph, hidden nodes included."""
        net = getattr(job.models, "teacher_net", None)
        nets = {"student": artifact.module, **({} if net is None else {"teacher": net})}
        split = "test" if "test" in job.splits else "train"
        graph = job.splits[split].graph.to(job.device)
        return serving(nets, graph, rng=job.rng("requests"), seconds=1.0)

    def details(self, job: Any, artifact: Artifact) -> dict[str, Any]:
        """How fast student and teacher answer."""
        if not self.wants_teacher():
            return {}
        rows = [
            [kind, name, *(f"{own[key]:.3f}" for key in ("p50", "p95")), f"{own['ratio']:.1f}"]
            for kind, times in self._serving(job, artifact).items()
            for name, own in times.items()
        ]
        table = {
            "title": "Serving: milliseconds, and times the student's (median of ratios). A request "
            "of a network that passes messages fetches its neighbourhood",
            "columns": ["answers for", "model", "median", "p95", "ratio"],
            "rows": rows,
        }
        return {"tables": [table]}

    @classmethod
    def example(cls, seed: int = 0) -> dict[str, Any]:
        """A tiny GCN and a tiny MLP on a generated graph."""
        return {
            "method": "ffg2m",
            "data": {"name": "generated-graph"},
            "teacher": {
                "model": "stillhouse:gcn",
                "options": {"width": 8},
                "train": {"steps": 4, "batch": 64, "lr": 0.05, "optimizer": "adam"},
            },
            "student": {"model": "stillhouse:node_mlp", "options": {"width": 8}},
            "budget": {"steps": 6, "batch": 64, "lr": 0.05, "optimizer": "adam"},
            "seed": seed,
        }
