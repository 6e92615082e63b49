"""E6, is it exact: identical models, the dense gradient, padded vocabularies, all divergences."""

import json

import torch
from torch import nn

from stillhouse.losses.chunked import chunked
from stillhouse.losses.logits import jsd, kl, mse_logits, topk_kl, total_variation
from stillhouse.teacher import TopK

CLASSES, WIDTH, TOKENS, PADDING = 32_000, 64, 96, 256
rng = torch.Generator().manual_seed(0)
states = torch.randn(TOKENS, WIDTH, generator=rng)
other = states + 0.5 * torch.randn(TOKENS, WIDTH, generator=rng)
weight = torch.randn(CLASSES, WIDTH, generator=rng) / WIDTH**0.5 * 3
teacher = states @ weight.T


def kept(logits, tail):
    """The 64 likeliest classes and the rest."""
    log_p = logits.log_softmax(-1)
    top = log_p.topk(64)
    rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    return TopK(top.indices, top.values, rest if tail else torch.full_like(rest, -torch.inf), 1.0)


forms = {
    "forward": lambda s, t: kl(s, t, reduction="none"),
    "reverse": lambda s, t: kl(s, t, direction="reverse", reduction="none"),
    "symmetric": lambda s, t: kl(s, t, direction="symmetric", reduction="none"),
    "skewed forward": lambda s, t: kl(s, t, direction="skewed_forward", reduction="none"),
    "skewed reverse": lambda s, t: kl(s, t, direction="skewed_reverse", reduction="none"),
    "JSD(0.5)": lambda s, t: jsd(s, t, beta=0.5, reduction="none"),
    "JSD(0.1)": lambda s, t: jsd(s, t, beta=0.1, reduction="none"),
    "total variation": lambda s, t: total_variation(s, t, reduction="none"),
    "mean squared logits": lambda s, t: mse_logits(s, t, reduction="none"),
    "top 64 with tail": lambda s, t: topk_kl(s, kept(t, True), reduction="none"),
}


def value(form, x, matrix, target, size, pad=0):
    """The chunked (or, with size None, dense) loss and the gradients of states and matrix."""
    x, matrix = x.clone().requires_grad_(), nn.Parameter(matrix.clone())
    head = nn.Linear(WIDTH, len(matrix), bias=False)
    head.weight = matrix

    def loss(logits, goal):
        return form(logits[:, : logits.shape[1] - pad], goal)

    if size is None:
        out = loss(head(x), target).mean()
    else:
        out = chunked(loss, x, head, target, chunk_size=size)
    out.backward()
    return out.item(), x.grad, matrix.grad


rows, worst = [], {"identical": 0.0, "gradient": 0.0, "padded": 0.0}
for name, form in forms.items():
    same = abs(value(form, states, weight, teacher, 32)[0])
    dense, ours = value(form, other, weight, teacher, None), value(form, other, weight, teacher, 32)
    gap = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(dense[1:], ours[1:]))
    wide = torch.cat([weight, torch.randn(PADDING, WIDTH, generator=rng)])
    padded = value(form, other, wide, teacher, 32, PADDING)
    shift = abs(padded[0] - ours[0]) + (padded[2][CLASSES:]).abs().max().item()
    rows.append({"divergence": name, "identical": same, "gradient": gap, "padded": shift})
    worst["identical"] = max(worst["identical"], same)
    worst["gradient"] = max(worst["gradient"], gap)
    worst["padded"] = max(worst["padded"], shift)
print(json.dumps({**worst, "rows": rows}))
