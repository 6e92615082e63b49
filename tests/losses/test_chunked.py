from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses import logits as L


def vocabulary(bias: bool = True) -> tuple[nn.Linear, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 50, bias=bias).double(), nn.Linear(8, 50).double()
    return student, teacher, torch.randn(3, 7, 6).double(), torch.randn(3, 7, 8).double()


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 21, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("head_kind", ["linear", "linear without bias", "module", "hooked"])
def test_chunked_equals_dense(chunk_size, reduction, head_kind):
    head, teacher, hidden, states = vocabulary(bias=head_kind != "linear without bias")
    if head_kind == "module":
        head = nn.Sequential(head, nn.Softplus())
    if head_kind == "hooked":
        head.register_forward_hook(lambda m, args, out: 30 * torch.tanh(out / 30))
    hidden.requires_grad_(True)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    inputs = [hidden, *head.parameters()]
    with torch.no_grad():
        target = teacher(states)
    dense = L.kl(head(hidden), target, temperature=2.0, mask=mask, reduction=reduction)
    expected = torch.autograd.grad(3.0 * dense, inputs)

    def loss(logits, row):
        with torch.no_grad():
            projected = teacher(row)
        return L.kl(logits, projected, temperature=2.0, reduction="none")

    value = L.chunked(
        loss, hidden, head, states, chunk_size=chunk_size, mask=mask, reduction=reduction
    )
    assert value.item() == pytest.approx(dense.item(), rel=1e-12)
    for ours, theirs in zip(torch.autograd.grad(3.0 * value, inputs), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert L.chunked(
            loss, hidden, head, states, mask=mask, reduction=reduction
        ).item() == pytest.approx(dense.item(), rel=1e-12)


def test_chunked_in_float32_is_within_1e_5():
    head, _, hidden, _ = vocabulary()
    head, hidden = head.float(), hidden.float().requires_grad_(True)
    target = torch.randn(3, 7, 50)
    inputs = [hidden, *head.parameters()]
    expected = torch.autograd.grad(L.jsd(head(hidden), target), inputs)

    def loss(logits, row):
        return L.jsd(logits, row, reduction="none")

    value = L.chunked(loss, hidden, head, target, chunk_size=4)
    for ours, theirs in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_chunked_gives_gradients_to_rows_and_named_parameters():
    head, _, hidden, _ = vocabulary()
    cap = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    labels = torch.randn(3, 7, 50, dtype=torch.float64, requires_grad=True)

    def project(x):
        return cap * torch.tanh(head(x) / cap)

    def loss(logits, row):
        return L.soft_cross_entropy(logits, row, from_logits=True, reduction="none")

    inputs = [labels, cap, *head.parameters()]
    expected = torch.autograd.grad(
        L.soft_cross_entropy(project(hidden), labels, from_logits=True), inputs
    )
    value = L.chunked(
        loss, hidden, project, labels, chunk_size=4, parameters=[cap, *head.parameters()]
    )
    for ours, theirs in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)
    with pytest.raises(ModelError, match="would get no gradient"):
        L.chunked(loss, hidden, project, labels, parameters=[cap])
    with pytest.raises(ModelError, match="would get no gradient"):
        L.chunked(lambda z, row: loss(z * cap, row), hidden, head, labels)


def test_chunked_weights_and_empty_masks():
    head, _, hidden, _ = vocabulary()
    hidden.requires_grad_(True)
    target = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))

    def loss(logits, row):
        return nn.functional.cross_entropy(logits, row, reduction="none")

    weights = torch.rand(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = loss(head(hidden).reshape(-1, 50), target.reshape(-1)).reshape(3, 7)
    expected = (each * weights).sum() / weights.sum()
    assert torch.allclose(L.chunked(loss, hidden, head, target, mask=weights), expected)
    nothing = L.chunked(loss, hidden, head, target, mask=torch.zeros(3, 7, dtype=torch.bool))
    assert nothing.item() == 0
    for gradient in torch.autograd.grad(nothing, [hidden, *head.parameters()]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_chunked_accumulates_to_one_big_batch_and_can_go_backward_twice():
    head, _, hidden, _ = vocabulary()
    target = torch.randn(3, 7, 50).double()

    def loss(logits, row):
        return L.kl(logits, row, reduction="none")

    whole = torch.autograd.grad(L.chunked(loss, hidden, head, target), head.weight)[0]
    parts = [
        L.chunked(loss, hidden[i], head, target[i], chunk_size=2, reduction="sum") / 21
        for i in range(3)
    ]
    summed = sum(torch.autograd.grad(part, head.weight)[0] for part in parts)
    assert torch.allclose(torch.as_tensor(summed), whole, rtol=1e-10, atol=1e-14)
    value = L.chunked(loss, hidden, head, target)
    first = torch.autograd.grad(value, head.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(2 * value, head.weight)[0] / 2)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("known", [True, False])
def test_chunked_goes_backward_as_often_as_the_graph_is_kept(factor, known, monkeypatch):
    if not known:  # a version of torch that does not say so: copies, always
        monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    head, _, hidden, _ = vocabulary()
    target = torch.randn(3, 7, 50).double()
    expected = torch.autograd.grad(factor * L.kl(head(hidden), target), head.weight)[0]
    value = factor * L.chunked(
        lambda z, row: L.kl(z, row, reduction="none"), hidden, head, target, chunk_size=4
    )
    value.backward(retain_graph=True)
    head.weight.grad.mul_(0)  # must not reach what the second pass reads
    value.backward(retain_graph=True)
    assert torch.allclose(head.weight.grad, expected, rtol=1e-10, atol=1e-14)
    value.backward()
    assert torch.allclose(head.weight.grad, 2 * expected, rtol=1e-10, atol=1e-14)
    if known:
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_chunked_gives_the_leaf_its_sum_without_a_copy():
    head, _, hidden, _ = vocabulary()
    value = 0.5 * L.chunked(
        lambda z, row: L.kl(z, row, reduction="none"), hidden, head, torch.randn(3, 7, 50).double()
    )
    node = value.grad_fn.next_functions[0][0]
    (place,) = [g.data_ptr() for g in node.grads if g is not None and g.shape == head.weight.shape]
    del node
    value.backward()
    assert head.weight.grad.data_ptr() == place


def test_chunked_bfloat16_sums_wide():
    head, _, hidden, _ = vocabulary()
    low_head, low = head.to(torch.bfloat16), hidden.to(torch.bfloat16).requires_grad_(True)
    target = torch.randn(3, 7, 50)

    def loss(logits, row):
        return L.kl(logits, row, reduction="none")

    value = L.chunked(loss, low, low_head, target, chunk_size=1)
    gradient = torch.autograd.grad(value, low_head.weight)[0]
    assert gradient.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    wide_head = nn.Linear(6, 50)
    wide_head.load_state_dict(low_head.state_dict())
    exact = torch.autograd.grad(L.kl(wide_head(low.detach().float()), target), wide_head.weight)[0]
    assert (gradient.float() - exact).abs().max() < 0.01 * exact.abs().max()


def test_bad_input_is_told():
    t = torch.randn(3, 5, dtype=torch.float64)
    head = nn.Linear(4, 5).double()
    hidden = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(ModelError, match="one value per item"):
        L.chunked(lambda z, row: L.kl(z, row), hidden, head, t)
    with pytest.raises(ModelError, match=r"rows\[0\]"):
        L.chunked(lambda z, row: L.kl(z, row, reduction="none"), hidden, head, t[:2])
    with pytest.raises(RecipeError, match="chunk_size"):
        L.chunked(lambda z: z.sum(-1), hidden, head, chunk_size=0)
    with pytest.raises(RecipeError, match="'mean' or 'sum'"):
        L.chunked(lambda z: z.sum(-1), hidden, head, reduction="none")  # type: ignore[arg-type]
