"""A graph convolutional network (Kipf and Welling 2017) on sparse or dense features."""

from __future__ import annotations

from itertools import pairwise

from stillhouse.models.graph_layers import Convolution, Convolutions, check_sizes


class GCN(Convolutions):
    r"""Layers :math:`D^{-1/2} (A + I) D^{-1/2} H W + b`, ReLU and dropout between them.

    Args:
        classes: number of outputs.
        inputs: features of a node.
        width: of the hidden layers.
        layers: number of layers, >= 1.
        dropout: after each hidden layer, in [0, 1).

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
    ) -> None:
        check_sizes("a GCN", classes, inputs, width, layers, dropout)
        sizes = [inputs, *[width] * (layers - 1), classes]
        super().__init__((GCNLayer(a, b) for a, b in pairwise(sizes)), dropout)


class GCNLayer(Convolution):
    """One graph convolution without activation.

    Args:
        inputs: features in.
        outputs: features out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, "gcn")
