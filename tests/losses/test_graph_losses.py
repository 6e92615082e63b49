"""Divergences over edges: the released values, the node form, relabelling, graphs without edges."""

from __future__ import annotations

import pytest
import torch

from stillhouse.losses.graph import (
    edge_difference_kl,
    edge_kl,
    neighbour_kl,
    neighbour_targets,
)
from stillhouse.losses.logits import kl
from stillhouse.parts.graph import tidy_edges, with_loops

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def graph(seed: int, nodes: int = 9, count: int = 15, classes: int = 4):
    rng = torch.Generator().manual_seed(seed)
    edges = tidy_edges(torch.randint(0, nodes, (2, count), generator=rng), nodes)
    z, h = (torch.randn(nodes, classes, generator=rng).double() for _ in range(2))
    return z, h, edges


def test_the_sheets_three_nodes():
    h = torch.tensor([[2.0, 0], [0, 1], [0, 0]]).double()
    z = torch.tensor([[1.0, 0], [0, 0], [0, 2]]).double()
    edges = tidy_edges(torch.tensor([[0, 1], [1, 2]]), 3)
    assert edges.shape == (2, 4)
    low = edge_kl(z, h, with_loops(edges, 3))
    high = edge_difference_kl(z, h, edges, temperature=1.5)
    assert low.item() == pytest.approx(0.212056, abs=1e-6)
    assert high.item() == pytest.approx(0.022877, abs=1e-6)
    assert kl(z, h, scale=False).item() == pytest.approx(0.203952, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_node_form_equals_the_edge_form(seed, temperature):
    z, h, edges = graph(seed)
    z.requires_grad_(True)
    loops = with_loops(edges, len(z))
    by_edge = edge_kl(z, h, loops, temperature=temperature)
    targets = neighbour_targets(h, loops, temperature=temperature)
    by_node = neighbour_kl(z, targets, temperature=temperature)
    torch.testing.assert_close(by_node, by_edge, **CLOSE)
    slopes = [torch.autograd.grad(term, z, retain_graph=True)[0] for term in (by_edge, by_node)]
    torch.testing.assert_close(*slopes, **CLOSE)
    single = neighbour_kl(z.float(), neighbour_targets(h.float(), loops, temperature=temperature),
                          temperature=temperature)  # fmt: skip
    assert single.item() == pytest.approx(by_edge.item(), abs=1e-6)


def test_the_teacher_speaks_at_the_other_end():
    z, h, _ = graph(0)
    one = torch.tensor([[2], [5]])
    expected = kl(z[2:3], h[5:6], scale=False)
    torch.testing.assert_close(edge_kl(z, h, one), expected)
    turned = edge_kl(z, h, one.flip(0))
    assert not torch.isclose(turned, expected)


def test_a_student_that_agrees():
    _, h, edges = graph(1)
    assert edge_difference_kl(h, h, edges).item() == pytest.approx(0, abs=1e-12)
    assert edge_kl(h, h, with_loops(edges, len(h))) > 1e-3
    same = h[:1].expand_as(h)
    assert edge_kl(same, same, with_loops(edges, len(h))).item() == pytest.approx(0, abs=1e-12)


def test_constants_added_to_the_logits_of_a_node():
    z, h, edges = graph(2)
    loops = with_loops(edges, len(z))
    shift = torch.randn(len(z), 1, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(edge_kl(z + shift, h, loops), edge_kl(z, h, loops), **CLOSE)
    torch.testing.assert_close(
        edge_difference_kl(z + 3.0, h, edges), edge_difference_kl(z, h, edges), **CLOSE
    )
    moved = edge_difference_kl(z + shift, h, edges)
    assert not torch.isclose(moved, edge_difference_kl(z, h, edges))


def test_neither_order_nor_doubling_of_edges_nor_names_of_nodes_matter():
    z, h, edges = graph(4)
    loops = with_loops(edges, len(z))
    values = (edge_kl(z, h, loops), edge_difference_kl(z, h, edges))
    mixed = torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(0))
    again = (
        edge_kl(z, h, with_loops(edges.flip(0)[:, mixed], len(z))),
        edge_difference_kl(z, h, edges[:, mixed].repeat(1, 2)),
    )
    torch.testing.assert_close(again, values, **CLOSE)
    names = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    place = torch.argsort(names)  # node n is called place[n]
    renamed = place[edges]
    torch.testing.assert_close(edge_difference_kl(z[names], h[names], renamed), values[1], **CLOSE)
    torch.testing.assert_close(
        edge_kl(z[names], h[names], with_loops(renamed, len(z))), values[0], **CLOSE
    )


def test_without_edges(golden):
    case = {k: torch.from_numpy(v) for k, v in golden("ffg2m").case("no_edges").items()}
    z, h = case["Z"].requires_grad_(True), case["H"]
    none = torch.zeros(2, 0, dtype=torch.int64)
    loops = with_loops(none, len(z))
    low, high = edge_kl(z, h, loops), edge_difference_kl(z, h, none, temperature=1.5)
    torch.testing.assert_close(low, case["L_LFD"], rtol=0, atol=1e-12)
    torch.testing.assert_close(high, case["L_HFD"], rtol=0, atol=1e-12)
    torch.testing.assert_close(low, kl(z, h, scale=False), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(high, z)
    assert torch.equal(slope, torch.zeros_like(z))
    assert neighbour_kl(z, neighbour_targets(h, none)) == 0
    assert edge_kl(z, h, none, reduction="none").shape == (0,)


def test_masked_and_single_edges():
    z, h, edges = graph(5)
    each = edge_difference_kl(z, h, edges, reduction="none")
    assert each.shape == (edges.shape[1],)
    mask = torch.arange(edges.shape[1]) % 2 == 0
    torch.testing.assert_close(edge_difference_kl(z, h, edges, mask=mask), each[mask].mean())
