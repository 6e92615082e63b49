"""GraphSAGE with the gcn aggregator (Hamilton, Ying, Leskovec 2017) on sparse or dense features."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.models.gcn import check_sizes
from stillhouse.parts.graph import passing
from stillhouse.parts.sparse import SparseMatrix, linear


class SAGE(nn.Module):
    """Layers W (sum of the neighbours and itself) / (deg + 1) + b, ReLU and dropout between.

    Args:
        classes: number of outputs.
        inputs: features of a node.
        width: of the hidden layers.
        layers: number of layers, >= 1.
        dropout: after each hidden layer, in [0, 1).
        self_loops: as released code of FF-G2M and GLNN runs it, on a graph that holds loops
            already, so that a node counts itself twice.

    Attributes:
        sparse: it takes features as a sparse matrix.
        reads_edges: it takes edges.
        hops: how far away what it reads lies.

    Raises:
        ModelError: a number out of range.
    """

    sparse: ClassVar[bool] = True
    reads_edges: ClassVar[bool] = True

    def __init__(
        self,
        classes: int,
        inputs: int,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.5,
        self_loops: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("a GraphSAGE", classes, inputs, width, layers, dropout)
        sizes = [inputs, *[width] * (layers - 1), classes]
        self.layers = nn.ModuleList(SAGELayer(a, b, self_loops) for a, b in pairwise(sizes))
        self.dropout = dropout
        self.hops = layers

    def forward(self, x: Tensor | SparseMatrix, edge_index: Tensor) -> Tensor:
        """Class scores of every node.

        Args:
            x: (N, inputs).
            edge_index: (2, E) from source to target, without loops.

        Returns:
            Logits (N, classes).
        """
        for number, layer in enumerate(self.layers):
            if number:
                x = F.dropout(torch.relu(x), self.dropout, self.training)  # type: ignore[arg-type]
            x = layer(x, edge_index)
        assert isinstance(x, Tensor)
        return x


class SAGELayer(nn.Module):
    """One layer of the gcn aggregator, without activation.

    Args:
        inputs: features in.
        outputs: features out.
        self_loops: a node counts itself twice.
    """

    def __init__(self, inputs: int, outputs: int, self_loops: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.self_loops = self_loops

    def forward(self, x: Tensor | SparseMatrix, edge_index: Tensor) -> Tensor:
        """(N, outputs)."""
        matrix = passing(edge_index, x.shape[0], "sage-loops" if self.self_loops else "sage")
        if isinstance(x, Tensor) and self.linear.in_features < self.linear.out_features:
            return linear(self.linear, matrix.product(x)) + self.bias
        return matrix.product(linear(self.linear, x)) + self.bias
