"""What it costs to answer for nodes: a whole graph at once, and request by request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor, nn

from stillhouse.metrics.cost import percentile, timings
from stillhouse.parts.graph import Graph, Nodes, passing

Call = Callable[[], Any]


def requests(graph: Graph, size: int, count: int, rng: Generator) -> list[Tensor]:
    """Random requests for nodes.

    Args:
        graph: whose nodes are asked about.
        size: nodes of a request.
        count: requests.
        rng: the chance.

    Returns:
        Each (size,) int64, without repetition.
    """
    size = min(size, graph.nodes)
    return [torch.randperm(graph.nodes, generator=rng)[:size] for _ in range(count)]


def answer_nodes(net: nn.Module, graph: Graph, nodes: Tensor) -> Tensor:
    """Logits of some nodes as a server answers: with their neighbourhood, where the net needs it.

    Args:
        net: a `NodeNet`. One that passes messages says by its module's attribute `hops` how far it
            reads.
        graph: at the server.
        nodes: (B,) asked about.

    Returns:
        (B, classes).
    """
    module = net.module
    if not getattr(net, "passes", False):
        found: Tensor = net(Nodes(graph, nodes))["logits"]
        return found
    part, places = graph.neighbourhood(nodes, int(module.hops))  # type: ignore[arg-type, union-attr]
    logits: Tensor = net(Nodes(part, places))["logits"]
    return logits


def serving(
    nets: Mapping[str, nn.Module],
    graph: Graph,
    *,
    sizes: tuple[int, ...] = (1, 256),
    seconds: float = 1.0,
    rng: Generator,
) -> dict[str, dict[str, dict[str, float]]]:
    """Times of several nets side by side, in one process, in turns.

    A request's time holds all a server does after it knows the node numbers: fetching the
    neighbourhood where the net passes messages, gathering features, the forward pass. The graph,
    its features and (for whole-graph passes) its normalised edges lie ready in memory.

    Args:
        nets: name to `NodeNet`; those that pass messages tell `hops`, else only their pass over
            the whole graph is timed.
        graph: what is served.
        sizes: nodes of a request.
        seconds: of measuring, for each kind.
        rng: which nodes are asked about.

    Returns:
        Kind ("graph", "request of 1" ...) to name to {"p50", "p95", "ratio"}: milliseconds, and
        the median over rounds of the net's time over that of the first net.
    """
    modes = {name: net.training for name, net in nets.items()}
    for net in nets.values():
        net.eval()
    found: dict[str, dict[str, dict[str, float]]] = {}
    try:
        with torch.no_grad():
            whole = Nodes(graph)
            calls = {name: _whole(net, whole) for name, net in nets.items()}
            found["graph"] = _timed(calls, graph, seconds)
            for size in sizes:
                asked = requests(graph, size, 64, rng)
                calls = {
                    name: _by_request(net, graph, asked)
                    for name, net in nets.items()
                    if not getattr(net, "passes", False) or hasattr(net.module, "hops")
                }
                found[f"request of {size}"] = _timed(calls, graph, seconds)
    finally:
        for name, net in nets.items():
            net.train(modes[name])
    return found


def _whole(net: nn.Module, view: Nodes) -> Call:
    return lambda: net(view)


def _by_request(net: nn.Module, graph: Graph, asked: list[Tensor]) -> Call:
    place = iter(range(1 << 62))
    return lambda: answer_nodes(net, graph, asked[next(place) % len(asked)])


def _timed(calls: Mapping[str, Call], graph: Graph, seconds: float) -> dict[str, dict[str, float]]:
    passing(graph.edges, graph.nodes, "loops")  # the server's index of neighbours
    measured = dict(zip(calls, timings(list(calls.values()), graph.device, seconds=seconds)))
    first = next(iter(measured.values()), [])
    return {
        name: {
            "p50": percentile(own, 0.5),
            "p95": percentile(own, 0.95),
            "ratio": median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in measured.items()
    }
