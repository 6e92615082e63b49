"""E6, ours: any divergence of `losses.logits` under `losses.chunked`."""

import torch
from e6_case import CHUNK, Case
from torch import nn

from stillhouse.losses.chunked import chunked
from stillhouse.losses.logits import jsd, kl, topk_kl, total_variation
from stillhouse.teacher import TopK

case = Case()
head = nn.Linear(1, 1, bias=False)
head.weight = nn.Parameter(case.student_weight)
case.student_weight = head.weight


def divergence(logits, states):
    """Per item; the teacher is projected chunk by chunk as well."""
    with torch.no_grad():
        teacher = states @ case.teacher_weight.T
    if case.form == "jsd":
        return jsd(logits, teacher, beta=case.beta, reduction="none")
    if case.form == "total-variation":
        return total_variation(logits, teacher, reduction="none")
    return kl(logits, teacher, direction=case.form, reduction="none")


def stored(logits, ids, log_probs, rest):
    """Per item, from the 64 classes and the rest that a store has kept."""
    return topk_kl(logits, TopK(ids, log_probs, rest, 1.0), reduction="none")


def loss():
    """The mean over the valid tokens."""
    if case.form != "topk-tail":
        return chunked(
            divergence, case.student, head, case.teacher, chunk_size=CHUNK, mask=case.mask
        )
    return chunked(stored, case.student, head, *kept, chunk_size=CHUNK, mask=case.mask)


if case.form == "topk-tail":
    pieces = []
    for states in case.teacher.split(CHUNK):
        log_p = (states @ case.teacher_weight.T).log_softmax(-1)
        top = log_p.topk(64)
        rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1)
        pieces.append((top.indices, top.values, rest))
    kept = [torch.cat(entries) for entries in zip(*pieces)]
case.measure(loss)
