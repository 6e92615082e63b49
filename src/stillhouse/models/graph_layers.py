"""What networks of graph convolutions share: layers one after another over the same edges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.parts.graph import Passing, passing
from stillhouse.parts.sparse import SparseMatrix, linear


class Convolutions(nn.Module):
    """Graph convolutions with ReLU and dropout between them.

    Args:
        layers: each takes (features, edge_index) and gives features.
        dropout: after each hidden layer, in [0, 1).

    Attributes:
        sparse: it takes features as a sparse matrix.
        reads_edges: it takes edges.
        hops: how far away what it reads lies.
    """

    sparse: ClassVar[bool] = True
    reads_edges: ClassVar[bool] = True

    def __init__(self, layers: Iterable[nn.Module], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout
        self.hops = len(self.layers)

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


class Convolution(nn.Module):
    """One graph convolution without activation: sums over the neighbours, and a linear layer.

    Args:
        inputs: features in.
        outputs: features out.
        kind: of passing, see `parts.graph.passing`.
    """

    def __init__(self, inputs: int, outputs: int, kind: Passing) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.kind: Passing = kind

    def forward(self, x: Tensor | SparseMatrix, edge_index: Tensor) -> Tensor:
        """(N, outputs)."""
        matrix = passing(edge_index, x.shape[0], self.kind)
        if isinstance(x, Tensor) and self.linear.in_features < self.linear.out_features:
            return linear(self.linear, matrix.product(x)) + self.bias
        return matrix.product(linear(self.linear, x)) + self.bias


def check_sizes(
    what: str, classes: int, inputs: int, width: int, layers: int, dropout: float
) -> None:
    """Refuse sizes that make no network of nodes.

    Raises:
        ModelError: names all of them.
    """
    if min(classes, inputs, width, layers) < 1 or not 0.0 <= dropout < 1.0:
        raise ModelError(
            f"{what} needs numbers >= 1 and dropout in [0, 1), got classes={classes}, "
            f"inputs={inputs}, width={width}, layers={layers}, dropout={dropout}"
        )
