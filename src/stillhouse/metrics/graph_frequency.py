"""How far a student of nodes is from its teacher in the low and the high part of the spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from stillhouse.losses.graph import differences
from stillhouse.parts.graph import passing


def frequency_errors(
    student_logits: Tensor, teacher_logits: Tensor, edges: Tensor
) -> dict[str, float]:
    """Errors of what neighbours share and of how they differ (FF-G2M's "drowning").

    Args:
        student_logits: (N, classes).
        teacher_logits: (N, classes).
        edges: (2, E) without loops.

    Returns:
        `low_error`: mean over nodes of the divergence between the probabilities averaged over a
        node and its neighbours, teacher from student, in nats. `high_error`: mean over edges and
        classes of the difference between the two sides' logit distances |z_u - z_v|; 0 without
        edges.
    """
    nodes = len(student_logits)
    mean = passing(edges, nodes, "sage")
    p, q = (mean.product(z.double().softmax(-1)) for z in (teacher_logits, student_logits))
    tiny = torch.finfo(torch.float64).tiny
    low = (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1).mean()
    if edges.shape[1] == 0:
        return {"low_error": float(low), "high_error": 0.0}
    apart = differences(teacher_logits, edges) - differences(student_logits, edges)
    return {"low_error": float(low), "high_error": float(apart.abs().mean())}
