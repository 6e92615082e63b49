"""A batch of one row through layers with BatchNorm, which needs two to know a spread."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def rows_through(layers: nn.Sequential, rows: Tensor) -> Tensor:
    """Rows through layers one after another; a single row may be among the batches of a training.

    A last batch of one row, or a process's share of one, has no variance, and torch's BatchNorm
    refuses it. It is normalised by the running statistics then, which stay as they are; gradients
    flow as in training. Everything else is as the layers have it.

    Args:
        layers: BatchNorm1d among them on rows.
        rows: (B, D).
    """
    out = rows
    for layer in layers:
        one = len(out) == 1 and layer.training
        if one and isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None:
            held = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            out = F.batch_norm(out, *held, training=False, eps=layer.eps)
        else:
            out = layer(out)
    return out
