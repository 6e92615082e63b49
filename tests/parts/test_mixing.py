"""Mixing two heads, and searching the mix on stored logits."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError, RecipeError
from stillhouse.parts.mixing import ALPHAS, BETAS, mix_probabilities, right_rows, search_mix


def logits(rows: int = 60, classes: int = 5, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, classes, generator=rng) for _ in range(2))
    return first, second, torch.randint(classes, (rows,), generator=rng)


def test_hand_values():
    """Property 1 of the sheet of dho."""
    ce, kd = torch.tensor([[2.0, 1, 0]]), torch.tensor([[0, 1, 0.5]])
    found = mix_probabilities(ce, kd, alpha=0.5, beta=0.5)
    assert found[0].tolist() == pytest.approx([0.377636, 0.454985, 0.167380], abs=1e-6)
    assert found.argmax().item() == 1


def test_the_ends_of_the_mix_are_the_heads():
    """Property 2."""
    first, second, _ = logits()
    assert torch.equal(mix_probabilities(first, second, alpha=1.0, beta=0.5), first.softmax(-1))
    assert torch.equal(mix_probabilities(first, second, alpha=0.0, beta=1.0), second.softmax(-1))
    total = mix_probabilities(first, second, alpha=0.3, beta=4.0).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_small_beta_sharpens_the_second_head_alone():
    first, second, _ = logits()
    sharp = mix_probabilities(first, second, alpha=0.0, beta=0.5)
    assert (sharp.max(-1).values > second.softmax(-1).max(-1).values).all()
    assert torch.equal(mix_probabilities(first, second, alpha=1.0, beta=0.1), first.softmax(-1))


def test_probabilities_are_mixed_and_not_logits():
    first, second = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert mix_probabilities(first, second, alpha=0.4, beta=1.0).argmax().item() == 0
    assert mix_probabilities(first, second, alpha=0.2, beta=1.0).argmax().item() == 1
    assert (0.2 * first + 0.8 * second).argmax().item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_brute_force(seed):
    """Property 6: the highest accuracy; the first wins a tie, beta being the outer loop."""
    first, second, target = logits(seed=seed)
    best, brute = -1.0, (0.0, 0.0)
    for beta in BETAS:
        for alpha in ALPHAS:
            mixed = mix_probabilities(first, second, alpha=alpha, beta=beta)
            accuracy = (mixed.argmax(-1) == target).double().mean().item()
            if accuracy > best:
                best, brute = accuracy, (alpha, beta)
    found = search_mix(first, second, target)
    assert (found.alpha, found.beta) == brute
    assert found.accuracy == best
    assert found.counts.max().item() == round(best * len(target))


def test_where_nothing_is_right_the_start_comes_back():
    first = torch.tensor([[5.0, 0, 0]] * 4)
    found = search_mix(first, first, torch.tensor([1, 2, 1, 2]))
    assert (found.accuracy, found.alpha, found.beta) == (0.0, 0.0, 1.0)


def test_the_official_search(golden):
    vectors = golden("dho")
    cases = [name for name in vectors.cases() if name.startswith("search")]
    assert len(cases) >= 3
    for name in cases:
        g = vectors.case(name)
        first, second, target = (torch.as_tensor(g[k]) for k in ("ce", "kd", "y"))
        found = search_mix(first, second, target)
        told = (100 * found.accuracy, found.alpha, found.beta)
        assert told == pytest.approx(g["best"].tolist(), abs=1e-12), name
        exact = right_rows(first.double(), second.double(), target)
        assert torch.equal(exact, torch.as_tensor(g["count_table"])), name
        assert (found.counts - exact).abs().max() <= 1
        mixed = mix_probabilities(first, second, alpha=0.7, beta=0.5)
        reference = torch.as_tensor(g["mixed"])
        torch.testing.assert_close(mixed.double(), reference, rtol=0, atol=1e-6)
        fixed = 100 * (mixed.argmax(-1) == target).double().mean().item()
        assert fixed == pytest.approx(float(g["acc_fixed"]), abs=1e-9)


def test_what_does_not_fit_is_told():
    first, second, target = logits()
    with pytest.raises(ModelError, match=r"\(60, 5\) and \(60, 4\)"):
        mix_probabilities(first, second[:, :4], alpha=0.5, beta=1.0)
    with pytest.raises(ModelError, match="do not fit"):
        search_mix(first, second, target[:3])
    with pytest.raises(RecipeError, match="alpha lies in"):
        search_mix(first, second, target, alphas=(1.5,))
    with pytest.raises(RecipeError, match="one point"):
        search_mix(first, second, target, betas=())
