from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.losses.relations import rkd_angle, rkd_distance


def vectors(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


def test_distances_written_out():
    s, t = vectors(5, 3), vectors(5, 7, 1)

    def relative(x):
        d = [[math.dist(a.tolist(), b.tolist()) for b in x] for a in x]
        mean = sum(map(sum, d)) / 20
        return [[v / mean for v in row] for row in d]

    a, b = relative(s), relative(t)
    total = 0.0
    for i in range(5):
        for j in range(5):
            e = abs(a[i][j] - b[i][j])
            total += 0.5 * e * e if e < 1 else e - 0.5
    assert rkd_distance(s, t).item() == pytest.approx(total / 25, rel=1e-12)


def test_angles_written_out():
    s, t = vectors(4, 3), vectors(4, 6, 1)

    def cosine(x, i, j, k):
        if i in (j, k):
            return torch.zeros(()).double()
        return F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0)

    total = 0.0
    for i in range(4):
        for j in range(4):
            for k in range(4):
                e = abs(float(cosine(s, i, j, k) - cosine(t, i, j, k)))
                total += 0.5 * e * e if e < 1 else e - 0.5
    assert rkd_angle(s, t).item() == pytest.approx(total / 64, rel=1e-9)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_relations_do_not_see_place_turn_or_size(loss):
    t = vectors(6, 4)
    turn = torch.linalg.qr(vectors(4, 4, 3)).Q
    assert loss(2.5 * t @ turn + 7, t).item() < 1e-20
    assert loss(vectors(6, 4, 5), t).item() > 1e-3
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    s = vectors(6, 2, 8)
    torch.testing.assert_close(loss(s[order], t[order]), loss(s, t))


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_equal_vectors_send_a_finite_gradient(loss):
    s = torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]).requires_grad_()
    loss(s, torch.randn(4, 5)).backward()
    assert torch.isfinite(s.grad).all()
    with pytest.raises(ModelError, match="batch of 1"):
        loss(s[:1], torch.randn(1, 5))
    with pytest.raises(ModelError, match="vectors"):
        loss(s, torch.randn(3, 5))
