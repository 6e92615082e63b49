"""GraphSAGE with the gcn aggregator (Hamilton, Ying, Leskovec 2017) on sparse or dense features."""

from __future__ import annotations

from itertools import pairwise

from stillhouse.models.graph_layers import Convolution, Convolutions, check_sizes


class SAGE(Convolutions):
    """Layers W (sum of the neighbours and itself) / (deg + 1) + b, ReLU and dropout between.

    Args:
        classes: number of outputs.
        inputs: features of a node.
        width: of the hidden layers.
        layers: number of layers, >= 1.
        dropout: after each hidden layer, in [0, 1).
        self_loops: as released code of FF-G2M and GLNN runs it, on a graph that holds loops
            already, so that a node counts itself twice.

    Raises:
        ModelError: a number out of range.
    """

    def __init__(
        self,
        classes: int,
        inputs: int,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.5,
        self_loops: bool = False,
    ) -> None:
        check_sizes("a GraphSAGE", classes, inputs, width, layers, dropout)
        sizes = [inputs, *[width] * (layers - 1), classes]
        super().__init__((SAGELayer(a, b, self_loops) for a, b in pairwise(sizes)), dropout)


class SAGELayer(Convolution):
    """One layer of the gcn aggregator, without activation.

    Args:
        inputs: features in.
        outputs: features out.
        self_loops: a node counts itself twice.
    """

    def __init__(self, inputs: int, outputs: int, self_loops: bool = False) -> None:
        super().__init__(inputs, outputs, "sage-loops" if self_loops else "sage")
