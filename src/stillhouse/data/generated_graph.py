"""A generated graph: for examples and contract tests, never for a measurement."""

from __future__ import annotations

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.data_set import DataSet
from stillhouse.data.node_splits import Setting, node_splits
from stillhouse.data.options import DataOptions
from stillhouse.parts.graph import Graph, tidy_edges


class GeneratedGraphOptions(DataOptions):
    """Options of the generated graph."""

    nodes: int = Field(60, ge=24, description="number of nodes")
    classes: int = Field(3, ge=2, description="number of classes")
    features: int = Field(8, ge=1, description="features of a node")
    degree: float = Field(4.0, gt=0, description="mean number of edges drawn at a node")
    mixed: float = Field(0.2, ge=0, le=1, description="share of edges between any two nodes")
    setting: Setting = Field("transductive", description="transductive or inductive")
    hidden: float = Field(0.4, gt=0, lt=1, description="share of test nodes that is hidden")


class GeneratedGraph(DataSet[GeneratedGraphOptions]):
    """Classes whose nodes are mostly linked to their own, with noisy features."""

    name = "generated-graph"
    title = "a simulated graph whose neighbours mostly share a class, for examples and tests"
    tasks = ("node-classification",)
    licence = "CC0"
    source = "made on opening"
    edition = "simulated"
    Options = GeneratedGraphOptions

    def open(self, options: GeneratedGraphOptions, seed: int) -> Splits:
        """A third of the nodes is trained on, a third validates, a third is tested."""
        rng = generator("generated", "graph")
        nodes, classes = options.nodes, options.classes
        labels = torch.arange(nodes) % classes
        centres = torch.randn(classes, options.features, generator=rng)
        x = centres[labels] + torch.randn(nodes, options.features, generator=rng)
        count = round(nodes * options.degree)
        ends = torch.randint(0, nodes, (2, count), generator=rng)
        mixed = torch.rand(count, generator=rng) < options.mixed
        own = (ends[1] - labels[ends[1]] + labels[ends[0]]).clamp(max=nodes - 1)
        ends[1] = torch.where(mixed, ends[1], own)
        third = nodes // 3
        numbers = torch.arange(nodes)
        train, val, test = numbers[:third], numbers[third : 2 * third], numbers[2 * third :]
        return node_splits(
            Graph(x, tidy_edges(ends, nodes)),
            labels,
            train,
            val,
            test,
            classes=[f"class {c}" for c in range(classes)],
            setting=options.setting,
            hidden=options.hidden,
            seed=seed,
            name="generated graph",
            edition="generated graph (simulated)",
        )
