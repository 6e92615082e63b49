from __future__ import annotations

import pytest
import torch

from stillhouse.errors import TrainingError
from stillhouse.parts.carry import carry


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)

    def piece(rows):
        def terms():
            y = torch.tanh(x[rows] @ w)
            return {"a": y.square().sum(), "b": 0.1 * (y.sum(1) ** 3).sum()}

        return terms

    return x, w, piece


def test_equals_the_one_graph():
    x, w, piece = problem()
    whole = piece(slice(0, 6))()
    expected = torch.autograd.grad(3.0 * (whole["a"] + whole["b"]), [x, w])
    pieces = [piece(slice(i, i + 2)) for i in range(0, 6, 2)]
    terms = carry(pieces, [x, w])
    torch.testing.assert_close(terms["a"], whole["a"])
    torch.testing.assert_close(terms["b"], whole["b"])
    found = torch.autograd.grad(3.0 * sum(terms.values()), [x, w])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_inputs_may_be_inner_nodes_and_grow_gradients_beyond():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    inner = leaf * 3
    terms = carry([lambda i=i: {"t": inner[i] ** 2} for i in range(2)], [inner])
    terms["t"].backward()
    assert leaf.grad.tolist() == [2 * 3 * 3, 2 * 6 * 3]


def test_pieces_are_consumed_one_at_a_time_and_called_once():
    x = torch.ones(1, requires_grad=True)
    log = []

    def pieces():
        for i in range(3):
            log.append(f"made {i}")
            yield lambda i=i: (log.append(f"called {i}"), {"t": (x * i).sum()})[1]

    assert carry(pieces(), [x])["t"].item() == 3
    assert log == [f"{word} {i}" for i in range(3) for word in ("made", "called")]


def test_terms_may_be_missing_in_some_pieces_and_constants_pass():
    x = torch.tensor([2.0], requires_grad=True)
    pieces = [
        lambda: {"first": torch.tensor(5.0)},
        lambda: {"second": (x**2).sum(), "first": torch.tensor(1.0)},
    ]
    terms = carry(pieces, [x])
    assert list(terms) == ["first", "second"]
    sum(terms.values()).backward()
    assert [t.item() for t in terms.values()] == [6.0, 4.0]
    assert x.grad.item() == 4.0


def test_without_gradients_only_values_are_made():
    x, w, piece = problem()
    with torch.no_grad():
        terms = carry([piece(slice(0, 3)), piece(slice(3, 6))], [x, w])
    assert not any(t.requires_grad for t in terms.values())
    frozen = carry([lambda: {"t": torch.ones(())}], [torch.ones(2)])
    assert not frozen["t"].requires_grad


def test_an_input_of_no_piece_gets_no_gradient():
    x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    carry([lambda: {"t": x.sum()}], [x, y])["t"].backward()
    assert y.grad is None


def test_what_cannot_be_carried_is_told():
    x = torch.ones(1, requires_grad=True)
    with pytest.raises(TrainingError, match="no terms"):
        carry([], [x])
    with pytest.raises(TrainingError, match="no term depends"):
        carry([lambda: {"t": torch.ones(())}], [x])
    term = carry([lambda: {"t": (x**2).sum()}], [x])["t"]
    (slope,) = torch.autograd.grad(term, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(slope.sum(), x)
