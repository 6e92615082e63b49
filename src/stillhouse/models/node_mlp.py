"""A multilayer perceptron on the features of nodes, sparse or dense."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.models.graph_layers import check_sizes
from stillhouse.parts.sparse import SparseMatrix, linear


class NodeMLP(nn.Module):
    """Linear layers with ReLU and dropout between them; it reads no edges.

    Args:
        classes: number of outputs.
        inputs: features of a node.
        width: of the hidden layers.
        layers: number of linear layers, >= 1.
        dropout: after each hidden layer, in [0, 1).

    Attributes:
        sparse: it takes features as a sparse matrix.
        reads_edges: it takes none.

    Raises:
        ModelError: a number out of range.
    """

    sparse: ClassVar[bool] = True
    reads_edges: ClassVar[bool] = False

    def __init__(
        self,
        classes: int,
        inputs: int,
        width: int = 256,
        layers: int = 2,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes("an MLP of nodes", classes, inputs, width, layers, dropout)
        sizes = [inputs, *[width] * (layers - 1), classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = dropout

    def forward(self, x: Tensor | SparseMatrix) -> Tensor:
        """Class scores.

        Args:
            x: (B, inputs).

        Returns:
            Logits (B, classes).
        """
        for number, layer in enumerate(self.layers):
            if number:
                x = F.dropout(torch.relu(x), self.dropout, self.training)  # type: ignore[arg-type]
            assert isinstance(layer, nn.Linear)
            x = linear(layer, x)
        assert isinstance(x, Tensor)
        return x
