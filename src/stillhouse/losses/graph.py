r"""Divergences over the edges of a graph: between neighbours, and of their differences.

`edges` is (2, E) int64; in `edge_kl` row 0 holds the student's end u and row 1 the teacher's end
v. Student first, then teacher. "mean" is over the edges, so a node counts as often as it has
neighbours. Without edges every loss is 0, with a gradient of 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.losses.chunked import wide
from stillhouse.losses.logits import Direction, Reduction, kl


def edge_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    edges: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""What the teacher says of a node's neighbours, asked of the student at the node.

    With :math:`p_v = \sigma(h_v / T)` and :math:`q_u = \sigma(z_u / T)`,

    .. math::
        \frac{1}{|E|} \sum_{(u, v) \in E} KL(p_v \| q_u)

    (FF-G2M, Wu et al. 2023: the low-frequency loss is this over edges and loops.)

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes).
        edges: (2, E), loops among them where a node is its own neighbour.
        temperature: > 0, of both; no factor of its square.
        direction: see `kl`.
        mask: (E,) edges that count.
        reduction: over edges.

    Returns:
        A scalar, or (E,) for "none".
    """
    return _over(
        student_logits[edges[0]],
        teacher_logits[edges[1]],
        temperature,
        direction,
        mask,
        reduction,
    )


def edge_difference_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    edges: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""By which classes two neighbours differ for the teacher, asked of the student.

    With :math:`D_{uv}(z) = |z_u - z_v|` of the raw logits, by class,

    .. math::
        \frac{1}{|E|} \sum_{(u, v) \in E}
            KL\big(\sigma(D_{uv}(h) / T) \,\|\, \sigma(D_{uv}(z) / T)\big)

    (FF-G2M, Wu et al. 2023: the high-frequency loss.) Where two logits are equal the gradient
    of their distance is 0.

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes).
        edges: (2, E) without loops.
        temperature: > 0, of both; no factor of its square.
        direction: see `kl`.
        mask: (E,) edges that count.
        reduction: over edges.

    Returns:
        A scalar, or (E,) for "none".
    """
    return _over(
        differences(student_logits, edges),
        differences(teacher_logits, edges),
        temperature,
        direction,
        mask,
        reduction,
    )


def differences(logits: Tensor, edges: Tensor) -> Tensor:
    """(E, classes): by how much the two ends of each edge differ, class by class."""
    # Gathers whose gradient is a sum by index: half the time of indexing with a tensor.
    ends = logits.index_select(0, edges[0]), logits.index_select(0, edges[1])
    return (ends[0] - ends[1]).abs()


def _over(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    direction: Direction,
    mask: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    if len(student) == 0:
        nothing = student.sum() * 0.0
        return student.sum(-1) if reduction == "none" else nothing
    return kl(
        student,
        teacher,
        temperature=temperature,
        direction=direction,
        mask=mask,
        reduction=reduction,
        scale=False,
    )


class NeighbourTargets(NamedTuple):
    """What a fixed teacher says of the neighbours of each node, added up.

    Attributes:
        mass: (N, classes), the sum of the teacher's probabilities over the neighbours.
        entropy: the sum over edges of the teacher's negative entropy, in nats.
        edges: their number.
    """

    mass: Tensor
    entropy: Tensor
    edges: int


def neighbour_targets(
    teacher_logits: Tensor, edges: Tensor, *, temperature: float = 1.0
) -> NeighbourTargets:
    """The sums that `neighbour_kl` needs of a teacher, made once.

    Args:
        teacher_logits: (N, classes).
        edges: (2, E), as for `edge_kl`.
        temperature: > 0.
    """
    log_p = torch.log_softmax(wide(teacher_logits) / temperature, dim=-1)
    p = log_p.exp()
    mass = torch.zeros_like(p).index_add_(0, edges[0], p.index_select(0, edges[1]))
    negative = torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
    return NeighbourTargets(mass, negative.index_select(0, edges[1]).sum(), edges.shape[1])


def neighbour_kl(
    student_logits: Tensor, targets: NeighbourTargets, *, temperature: float = 1.0
) -> Tensor:
    """`edge_kl` of a fixed teacher, without a row for every edge.

    The cross-entropy is linear in the teacher's side, so the neighbours of a node are added up
    beforehand: the memory and time of a step are those of the nodes.

    Args:
        student_logits: (N, classes).
        targets: see `neighbour_targets`, of the same temperature.
        temperature: > 0.

    Returns:
        The mean over edges.
    """
    if targets.edges == 0:
        return student_logits.sum() * 0.0
    log_q = torch.log_softmax(wide(student_logits) / temperature, dim=-1)
    return (targets.entropy - (targets.mass * log_q).sum()) / targets.edges
