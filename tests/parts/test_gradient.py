from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import RecipeError
from stillhouse.losses.logits import binary_kl_norm
from stillhouse.parts.gradient import Project, Sum, cosine, inner
from stillhouse.parts.heads import ExtraHead


def tensor(array: np.ndarray) -> Tensor:
    return torch.as_tensor(array).double()


def given(*lists):
    """`grads` of a step whose gradients are known."""

    def grads(*sets):
        assert len(sets) == len(lists)
        return lists

    return grads


def step_grads(terms: dict[str, Tensor], params: list[Tensor]):
    """`grads` of a step with these terms, as a loop would offer it."""

    def grads(*sets):
        found = []
        for names in sets:
            chosen = [v for k, v in terms.items() if names is None or k in names]
            total = torch.stack(chosen).sum()
            found.append(torch.autograd.grad(total, params, allow_unused=True, retain_graph=True))
        return found

    return grads


def entries(values: np.ndarray, has: np.ndarray) -> list[Tensor | None]:
    return [tensor(v) if h else None for v, h in zip(values, has, strict=True)]


@pytest.mark.parametrize("case", ["align0", "align1", "align2"])
@pytest.mark.parametrize("scope", ["all", "shared"])
def test_projection_vectors(golden, case, scope):
    g = golden("dhkd").case(case)
    keep, turn = entries(g["g0"], g["has0"]), entries(g["g1"], g["has1"])
    params = [torch.zeros(()) for _ in keep]
    merged = Project(("task",), ("logits",), scope)(given(keep, turn), params)
    ours = torch.stack([torch.zeros(()).double() if m is None else m for m in merged])
    assert (ours - tensor(g[f"merged_{scope}"])).abs().max() <= 1e-12


def test_sheet_example():
    g0 = [torch.tensor([1.0, 0.0]), torch.tensor([1.0]), None]
    g1 = [torch.tensor([-1.0, 1.0]), None, torch.tensor([2.0])]
    project = Project(("task",), ("logits",))
    merged = project(given(g0, g1), [torch.zeros(2), torch.zeros(1), torch.zeros(1)])
    assert torch.cat(merged).tolist() == [0.5, 1.0, 1.5, 2.0]
    turned = [
        m - torch.zeros_like(m) if k is None else m - k for m, k in zip(merged, g0, strict=True)
    ]
    assert torch.dot(torch.cat(turned), torch.tensor([1.0, 0.0, 1.0, 0.0])) == 0
    assert torch.dot(turned[0], g0[0]) == -0.5


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_after_a_conflict(scope):
    rng = torch.Generator().manual_seed(0)
    backbone, head = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (6, 4))
    g0: list[Tensor | None] = [backbone, head, None]
    g1: list[Tensor | None] = [-backbone + 0.1, None, torch.ones(3).double()]
    product = torch.dot(g1[0], backbone)
    assert product < 0
    merged = Project(("a",), ("b",), scope)(given(g0, g1), [torch.zeros(1)] * 3)
    left = torch.dot(merged[0] - backbone, backbone)
    if scope == "shared":
        assert abs(left) < 1e-12
        assert torch.equal(merged[1], head)
    else:
        square = backbone.dot(backbone) + head.dot(head)
        assert left.item() == pytest.approx((product / square * head.dot(head)).item())
        assert torch.allclose(merged[1], head * (1 - product / square))
    assert torch.equal(merged[2], g1[2])


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_without_conflict_the_sum_is_bit_for_bit_that_of_one_backward(scope):
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    x = torch.randn(8, 5)
    out = net(x)
    terms = {"task": out.square().mean(), "logits": (out * 1.01).square().mean()}
    params = list(net.parameters())
    grads = step_grads(terms, params)
    merged = Project(("task",), ("logits",), scope)(grads, params)
    for ours, a, b in zip(merged, *grads(("task",), ("logits",)), strict=True):
        assert torch.equal(ours, a + b)
    (whole,) = grads(None)
    for ours, theirs in zip(Sum()(grads, params), whole, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(merged, whole, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_unreached_parameters_stay_unreached():
    g0 = [torch.ones(2), None, None]
    g1 = [None, torch.ones(2), None]
    merged = Project(("a",), ("b",))(given(g0, g1), [torch.zeros(2)] * 3)
    assert torch.equal(merged[0], g0[0])
    assert torch.equal(merged[1], g1[1])
    assert merged[2] is None


def test_a_vanished_keep_gradient_is_no_conflict():
    merged = Project(("a",), ("b",))(given([torch.zeros(3)], [-torch.ones(3)]), [torch.zeros(3)])
    assert torch.equal(merged[0], -torch.ones(3))


def test_inner_and_cosine():
    left = [torch.tensor([[3.0, 0.0]]), None, torch.tensor([5.0])]
    right = [torch.tensor([[4.0, 3.0]]), torch.tensor([2.0]), None]
    assert inner(left, right) == 12
    assert inner(left, left) == 34
    assert cosine(left, right).item() == pytest.approx(0.8)
    assert inner([None], [torch.ones(1)]) is None
    assert cosine([None], [torch.ones(1)]) is None
    assert cosine([torch.zeros(2)], [torch.ones(2)]) == 0
    low = [torch.full((70000,), 1.0, dtype=torch.bfloat16)]
    assert inner(low, low) == 70000


def test_bad_settings():
    with pytest.raises(RecipeError, match="both sides"):
        Project((), ("logits",))
    with pytest.raises(RecipeError, match="'backbone'"):
        Project(("task",), ("logits",), "backbone")  # type: ignore[arg-type]


# ------------------------------------------------------------- whole steps of the sheet


class TwoHeads(nn.Module):
    """The small student of the vectors: Linear-ReLU features, fc, and an auxiliary head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 6)
        self.fc = nn.Linear(6, 8)
        self.fc2 = ExtraHead(self.fc, kind, dropout=0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.backbone(x))
        return self.fc(features), self.fc2(features)

    def key(self, name: str) -> str:
        """The vectors' name of a parameter or buffer."""
        if self.fc2.kind == "linear":
            name = name.replace("fc2.net.", "fc2.")
        return name.replace(".", "_")


@pytest.mark.parametrize("case", ["step_linear_conflict", "step_nonlinear"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_whole_aligned_steps(golden, case, dtype, tolerance):
    g = golden("dhkd").case(case)
    linear = case == "step_linear_conflict"
    net = TwoHeads("linear" if linear else "nonlinear").to(dtype)
    alpha = 1.0 if linear else 0.5
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if "num_batches" not in name:
                value.copy_(torch.as_tensor(g[f"before_{net.key(name)}"]))
    x, y = torch.as_tensor(g["x"]).to(dtype), torch.as_tensor(g["y"])
    t = torch.as_tensor(g["teacher_logits"]).to(dtype)
    params = list(net.parameters())
    optimiser = torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def near(ours: Tensor, name: str) -> None:
        reference = tensor(g[name])
        scale = max(1.0, reference.abs().max().item())
        assert (ours.detach().double() - reference).abs().max() <= tolerance * scale, name

    for step in (1, 2, 3):
        f1, f2 = net(x)
        ce = nn.functional.cross_entropy(f1, y)
        bkn = binary_kl_norm(f2, t, temperature=2.0)
        near(ce, f"ce_{step}")
        near(bkn, f"bkn_{step}")
        grads = step_grads({"task": ce, "logits": alpha * bkn}, params)
        merged = Project(("task",), ("logits",))(grads, params)
        if step == 1:
            near(f1, "f1")
            near(f2, "f2")
            keep, turn = grads(("task",), ("logits",))
            near(inner(keep, turn), "inner_product")
            near(inner(keep, keep), "norm_g0_sq")
            plain = Sum()(grads, params)
            for (name, _), a, b in zip(net.named_parameters(), plain, merged, strict=True):
                near(a, f"grad_plain_{net.key(name)}")
                near(b, f"grad_aligned_{net.key(name)}")
        for parameter, gradient in zip(params, merged, strict=True):
            parameter.grad = gradient
        optimiser.step()
    for name, value in net.state_dict().items():
        if "num_batches" not in name:
            near(value, f"after3_{net.key(name)}")
