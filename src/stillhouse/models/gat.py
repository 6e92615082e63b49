"""A graph attention network (Velickovic et al. 2018) on sparse or dense features."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models.graph_layers import check_sizes
from stillhouse.parts.graph import with_loops
from stillhouse.parts.sparse import SparseMatrix, linear


class GAT(nn.Module):
    """Attention layers, `heads` in the hidden ones (joined) and one in the last.

    Args:
        classes: number of outputs.
        inputs: features of a node.
        width: of the hidden layers, over all heads.
        layers: number of layers, >= 1.
        dropout: of the features that enter a layer, in [0, 1).
        attention_dropout: of the attention weights, in [0, 1).
        heads: of the hidden layers; they divide `width`.

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
        attention_dropout: float = 0.3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        check_sizes("a GAT", classes, inputs, width, layers, dropout)
        if heads < 1 or width % heads or not 0.0 <= attention_dropout < 1.0:
            raise ModelError(
                f"a GAT needs heads that divide its width and attention_dropout in [0, 1), got "
                f"heads={heads}, width={width}, attention_dropout={attention_dropout}"
            )
        sizes = [inputs, *[width] * (layers - 1)]
        hidden = [GATLayer(a, width // heads, heads, attention_dropout) for a in sizes[:-1]]
        self.layers = nn.ModuleList([*hidden, GATLayer(sizes[-1], classes, 1, attention_dropout)])
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
        edges = with_loops(edge_index, x.shape[0])
        for number, layer in enumerate(self.layers):
            if number:
                x = torch.relu(x)  # type: ignore[arg-type]
            x = layer(dropped(x, self.dropout, self.training), edges)
        assert isinstance(x, Tensor)
        return x


def dropped(x: Tensor | SparseMatrix, rate: float, training: bool) -> Tensor | SparseMatrix:
    """Dropout of dense or sparse rows; what is 0 already stays 0."""
    if isinstance(x, Tensor):
        return F.dropout(x, rate, training)
    if not training or rate == 0.0:
        return x
    return x.with_values(F.dropout(x.values, rate))


class GATLayer(nn.Module):
    """One attention layer without activation, its heads side by side.

    Per head, for an edge from u to v, `LeakyReLU(a_source . W x_u + a_target . W x_v)` with slope
    0.2, softmax over the edges into v, and the sum of `W x_u` so weighted.

    Args:
        inputs: features in.
        outputs: features out of each head.
        heads: their number.
        attention_dropout: of the weights after the softmax.
    """

    def __init__(
        self, inputs: int, outputs: int, heads: int = 1, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.outputs, self.attention_dropout = heads, outputs, attention_dropout
        self.linear = nn.Linear(inputs, heads * outputs, bias=False)
        self.source = nn.Parameter(torch.empty(heads, outputs))
        self.target = nn.Parameter(torch.empty(heads, outputs))
        self.bias = nn.Parameter(torch.zeros(heads * outputs))
        for weight in (self.linear.weight, self.source, self.target):
            nn.init.xavier_normal_(weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, x: Tensor | SparseMatrix, edges: Tensor) -> Tensor:
        """(N, heads * outputs).

        Args:
            x: (N, inputs).
            edges: (2, E) from source to target, loops among them.
        """
        source, target = edges[0], edges[1]
        h = linear(self.linear, x).view(-1, self.heads, self.outputs)
        by_source, by_target = (h * self.source).sum(-1), (h * self.target).sum(-1)
        score = F.leaky_relu(
            by_source.index_select(0, source) + by_target.index_select(0, target), 0.2
        )
        weight = softmax_by(score, target, len(h))
        weight = F.dropout(weight, self.attention_dropout, self.training)
        passed = h.index_select(0, source) * weight.unsqueeze(-1)
        out = torch.zeros_like(h).index_add(0, target, passed)
        return out.flatten(1) + self.bias


def softmax_by(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """Softmax over the rows of each group.

    Args:
        score: (E, heads).
        group: (E,) int64 in [0, groups).
        groups: their number.

    Returns:
        (E, heads), adding up to 1 within each group.
    """
    index = group.unsqueeze(-1).expand_as(score)
    # The largest of a group only keeps exp in range: its gradient cancels.
    top = torch.full((groups, score.shape[1]), -torch.inf, dtype=score.dtype, device=score.device)
    top = top.scatter_reduce(0, index, score.detach(), "amax")
    raised = (score - top.index_select(0, group)).exp()
    total = torch.zeros(groups, score.shape[1], dtype=score.dtype, device=score.device)
    total = total.index_add(0, group, raised)
    return raised / total.index_select(0, group)
