from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.losses import logits as L

DIRECTIONS = L.DIRECTIONS


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.as_tensor(array).to(dtype)


def with_grad(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    return tensor(array, dtype).clone().requires_grad_(True)


def grad_of(value: Tensor, wrt: Tensor) -> Tensor:
    return torch.autograd.grad(value, wrt)[0]


def close(ours: Tensor, reference: Any, rel: float, absolute: float = 0.0) -> None:
    """`rel` is relative to the largest absolute value of the reference."""
    reference = torch.as_tensor(np.asarray(reference)).double()
    worst = (ours.detach().double() - reference).abs().max().item()
    assert worst <= absolute + rel * reference.abs().max().item(), worst


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    s = torch.randn(*shape, generator=rng, dtype=dtype) * 2
    return s, torch.randn(*shape, generator=rng, dtype=dtype) * 2


class Kept(NamedTuple):
    ids: Tensor
    logp: Tensor
    rest: Tensor
    temperature: float = 1.0
    weights: Tensor | None = None


def keep_top(teacher: Tensor, k: int, temperature: float = 1.0) -> Kept:
    full = (teacher / temperature).log_softmax(-1)
    top = full.topk(k, -1)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1.0))
    return Kept(top.indices, top.values, rest, temperature)


# ---------------------------------------------------------------------- reference vectors


@pytest.mark.parametrize("name", ["losses_tau1", "losses_tau2", "losses_tau4"])
@pytest.mark.parametrize(
    ("term", "loss"), [("bkl", L.binary_kl), ("bkn", L.binary_kl_norm), ("kd", L.kl)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dhkd_losses(golden, name, term, loss, dtype):
    g = golden("dhkd").case(name)
    tau = float(name.removeprefix("losses_tau"))
    s, t = with_grad(g["f2"], dtype), tensor(g["t"], dtype)
    value = loss(s, t, temperature=tau)
    gradient = grad_of(value, s)
    exact = dtype == torch.float64
    close(value, g[term], 1e-7 if exact else 1e-5)
    close(gradient, g[f"grad_{term}"], 1e-7 if exact else 0, 0 if exact else 1e-6)
    close(value, g[f"{term}_f32"], 1e-4)
    close(gradient, g[f"grad_{term}_f32"], 1e-4)
    if term == "bkn":
        close(value, g["bkn_closed_form"], 1e-7 if exact else 1e-5)


@pytest.mark.parametrize("term", ["bkl", "bkn"])
def test_dhkd_official_form_is_the_stable_one_inside_the_clamp(golden, term):
    g = golden("dhkd").case("losses_tau2")
    loss = {"bkl": L.binary_kl, "bkn": L.binary_kl_norm}[term]
    s = with_grad(g["f2"])
    value = loss(s, tensor(g["t"]), temperature=2.0, form="official")
    close(value, g[term], 1e-9)
    close(grad_of(value, s), g[f"grad_{term}"], 1e-9)
    single = loss(tensor(g["f2"], torch.float32), tensor(g["t"], torch.float32), form="official")
    close(single, g[f"{term}_f32"], 1e-6)


def test_dhkd_saturation(golden):
    g = golden("dhkd").case("saturation")
    difference = g["per_entry_diff"]
    for dtype in (torch.float64, torch.float32):
        d = with_grad(difference, dtype)
        rows = L.binary_kl_norm(d[:, None], torch.zeros_like(d)[:, None], reduction="none")
        assert rows.isfinite().all()
        gradient = grad_of(rows.sum(), d)
        close(rows, g["bkn_corrected"], 1e-6)
        close(gradient, g["grad_corrected"], 1e-6)
        plain = L.binary_kl(d[:, None], torch.zeros_like(d)[:, None], reduction="none")
        assert plain.isfinite().all()
        assert (grad_of(plain.sum(), d)[difference != 0] != 0).all()


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [
        (torch.float64, "bkn_official", "grad_official"),
        (torch.float32, "bkn_official_f32", "grad_official_f32"),
    ],
)
def test_dhkd_saturation_official(golden, dtype, value, gradient):
    g = golden("dhkd").case("saturation")
    d = with_grad(g["per_entry_diff"], dtype)
    rows = L.binary_kl_norm(
        d[:, None], torch.zeros_like(d)[:, None], form="official", reduction="none"
    )
    ours = grad_of(rows.sum(), d).detach().numpy()
    finite = np.isfinite(g[value])
    np.testing.assert_array_equal(np.isfinite(rows.detach().numpy()), finite)
    np.testing.assert_allclose(
        rows.detach().numpy()[finite], g[value][finite], rtol=1e-5, atol=1e-7
    )
    finite = np.isfinite(g[gradient])
    np.testing.assert_allclose(ours[finite], g[gradient][finite], rtol=1e-4, atol=1e-6)


def test_dhkd_saturation_official_binary_kl(golden):
    g = golden("dhkd").case("saturation")
    d = tensor(g["per_entry_diff"], torch.float32)[:, None]
    rows = L.binary_kl(d, torch.zeros_like(d), form="official", reduction="none").numpy()
    finite = np.isfinite(g["bkl_official_f32"])
    np.testing.assert_array_equal(np.isfinite(rows), finite)
    np.testing.assert_allclose(rows[finite], g["bkl_official_f32"][finite], rtol=1e-5, atol=1e-7)


DISTILLM = {
    "forward_kl": lambda s, t, m: L.kl(s, t, mask=m),
    "reverse_kl": lambda s, t, m: L.kl(s, t, direction="reverse", mask=m),
    "symmetric_kl": lambda s, t, m: L.kl(s, t, direction="symmetric", beta=0.1, mask=m),
    "js_distance": lambda s, t, m: L.jsd(s, t, beta=0.1, mask=m),
    "tv_distance": lambda s, t, m: L.total_variation(s, t, mask=m),
    "skewed_forward_kl": lambda s, t, m: L.kl(s, t, direction="skewed_forward", skew=0.1, mask=m),
    "skewed_reverse_kl": lambda s, t, m: L.kl(s, t, direction="skewed_reverse", skew=0.1, mask=m),
}


@pytest.mark.parametrize("term", DISTILLM)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distillm(golden, term, dtype):
    g = golden("dackl").case("distillm")
    s, t = with_grad(g["logits_s"], dtype), tensor(g["logits_t"], dtype)
    mask = torch.as_tensor(g["labels"]) != -100
    value = DISTILLM[term](s, t, mask)
    close(grad_of(value, s), g[f"grad_{term}"], 1e-5)
    # the released forward forms are cross-entropies: above ours by the teacher's entropy
    p = t.softmax(-1)
    entropy = -(p * p.log()).sum(-1)[mask].mean()
    above = {"forward_kl": 1.0, "skewed_forward_kl": 1.0, "symmetric_kl": 0.1}.get(term, 0.0)
    close(value + above * entropy, g[f"{term}_official"], 1e-5)
    if f"{term}_true" in g:
        close(value, g[f"{term}_true"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distiller_kd_ce(golden, dtype):
    g = golden("distiller").case("kd_ce")
    s, t = with_grad(g["logits_s"], dtype), tensor(g["logits_t"], dtype)
    value = L.soft_cross_entropy(s, t, from_logits=True, temperature=4.0)
    rel, absolute = (1e-6, 1e-8) if dtype == torch.float64 else (1e-4, 1e-5)
    close(value, g["loss"], rel, absolute)
    close(grad_of(value, s), g["grad_s"], rel, absolute)
    as_probabilities = L.soft_cross_entropy(s, (t / 4.0).softmax(-1), temperature=4.0)
    close(as_probabilities, g["loss"], rel, absolute)
    unscaled = L.kl(s, t, temperature=4.0, scale=False)
    close(grad_of(unscaled, s), g["grad_s"], rel, absolute)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distiller_kd_mse(golden, dtype):
    g = golden("distiller").case("kd_mse")
    s, t = with_grad(g["logits_s"], dtype), tensor(g["logits_t"], dtype)
    value = L.mse_logits(s, t, temperature=4.0)
    rel, absolute = (1e-6, 1e-8) if dtype == torch.float64 else (1e-4, 1e-5)
    close(value, g["loss"], rel, absolute)
    close(grad_of(value, s), g["grad_s"], rel, absolute)


def test_distiller_kd_tok(golden):
    g = golden("distiller").case("kd_tok")
    s, t = tensor(g["logits_s"]), tensor(g["logits_t"])
    per_token = tensor(g["temperature"])
    ce = L.soft_cross_entropy(s, t, from_logits=True, temperature=per_token)
    close(ce, g["loss_ce"], 1e-6, 1e-8)
    close(L.mse_logits(s, t, temperature=per_token), g["loss_mse"], 1e-6, 1e-8)


def test_distiller_kd_qa(golden):
    g = golden("distiller").case("kd_qa")
    total = sum(
        L.soft_cross_entropy(
            tensor(g[f"{head}_s"]), tensor(g[f"{head}_t"]), from_logits=True, temperature=4.0
        )
        for head in ("start", "end")
    )
    close(torch.as_tensor(total), g["loss"], 1e-6, 1e-8)


def test_distiller_kd_regression(golden):
    g = golden("distiller").case("kd_regression")
    s, t = tensor(g["logits_s"]), tensor(g["logits_t"])
    close(L.mse_logits(s, t), g["loss_mse"], 1e-6, 1e-8)
    assert g["loss_ce_official"] == 0
    for loss in (L.kl, L.jsd, L.total_variation, L.soft_cross_entropy, L.mse_probabilities):
        with pytest.raises(ModelError, match="mse_logits"):
            loss(s, t)


def test_dhkd_total(golden):
    g = golden("dhkd").case("total")
    for dtype, rel in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        f1, f2 = with_grad(g["f1"], dtype), with_grad(g["f2"], dtype)
        ce = nn.functional.cross_entropy(f1, torch.as_tensor(g["y"]))
        bkn = L.binary_kl_norm(f2, tensor(g["t"], dtype), temperature=2.0)
        close(ce, g["ce"], rel)
        close(bkn, g["bkn"], rel)
        total = ce + 0.1 * bkn
        close(total, g["total"], rel)
        first, second = torch.autograd.grad(total, (f1, f2))
        close(first, g["grad_f1"], rel)
        close(second, g["grad_f2"], rel)


# ----------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_give_exactly_zero(direction, dtype):
    s, _ = pair(7, 33, dtype=torch.float64)
    s = (s * 5).to(dtype)
    for share in (0.0, 0.1, 0.37, 0.5, 0.9):
        value = L.kl(s, s.clone(), direction=direction, beta=share, skew=share, temperature=3.0)
        assert value.item() == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_models_have_no_gradient(direction):
    s, _ = pair(4, 9)
    s.requires_grad_(True)
    value = L.kl(s, s.detach(), direction=direction, beta=0.3, skew=0.2)
    assert grad_of(value, s).abs().max() < 1e-15


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_against_a_slow_twin(direction):
    s, t = pair(3, 4, 6, seed=1)
    temperature, beta, skew, expected = 2.5, 0.3, 0.2, 0.0

    def divergence(a, b):
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    def mixture(a, b, share):
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    for i in range(3):
        for j in range(4):
            rows = []
            for z in (t[i, j].tolist(), s[i, j].tolist()):
                weights = [math.exp(x / temperature) for x in z]
                rows.append([w / sum(weights) for w in weights])
            p, q = rows
            m = mixture(p, q, beta)
            expected += {
                "forward": lambda p=p, q=q: divergence(p, q),
                "reverse": lambda p=p, q=q: divergence(q, p),
                "symmetric": lambda p=p, q=q: (
                    beta * divergence(p, q) + (1 - beta) * divergence(q, p)
                ),
                "js": lambda p=p, q=q, m=m: beta * divergence(p, m) + (1 - beta) * divergence(q, m),
                "skewed_forward": lambda p=p, q=q: divergence(p, mixture(p, q, skew)),
                "skewed_reverse": lambda p=p, q=q: divergence(q, mixture(q, p, skew)),
            }[direction]() / 12
    value = L.kl(s, t, temperature=temperature, direction=direction, beta=beta, skew=skew)
    assert value.item() == pytest.approx(expected * temperature**2, rel=1e-10)


def test_other_losses_against_slow_twins():
    s, t = pair(3, 5, seed=2)
    p, q = t.softmax(-1).tolist(), s.softmax(-1).tolist()
    sig = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    variation = binary = norm = squares = probabilities = 0.0
    for i in range(3):
        for k in range(5):
            variation += abs(p[i][k] - q[i][k]) / 2 / 3
            probabilities += (p[i][k] - q[i][k]) ** 2 / 15
            squares += (s[i, k].item() - t[i, k].item()) ** 2 / 15
            a, b = sig(t[i, k].item() / 2), sig(s[i, k].item() / 2)
            binary += 4 / 3 * (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)))
            d = sig((s[i, k].item() - t[i, k].item()) / 2)
            norm += 4 / 3 * (0.5 * math.log(0.5 / d) + 0.5 * math.log(0.5 / (1 - d)))
    assert L.total_variation(s, t).item() == pytest.approx(variation)
    assert L.mse_probabilities(s, t).item() == pytest.approx(probabilities)
    assert L.mse_logits(s, t).item() == pytest.approx(squares)
    assert L.binary_kl(s, t).item() == pytest.approx(binary)
    assert L.binary_kl_norm(s, t).item() == pytest.approx(norm)


SOFTMAX_LOSSES = [L.kl, L.jsd, L.total_variation, L.mse_probabilities]
ALL_LOSSES = [*SOFTMAX_LOSSES, L.binary_kl, L.binary_kl_norm, L.mse_logits]


@pytest.mark.parametrize("loss", SOFTMAX_LOSSES)
def test_softmax_losses_do_not_see_a_shift(loss):
    s, t = pair(4, 6, seed=3)
    assert loss(s + 3.0, t - 5.0).item() == pytest.approx(loss(s, t).item(), rel=1e-12)


def test_norm_sees_a_shift_of_one_side_only():
    s, t = pair(4, 6, seed=3)
    same = L.binary_kl_norm(s, t).item()
    assert L.binary_kl_norm(s + 1, t + 1).item() == pytest.approx(same, rel=1e-12)
    assert L.binary_kl_norm(t, s).item() == pytest.approx(same, rel=1e-12)
    assert L.binary_kl_norm(s + 1, t).item() != pytest.approx(same, rel=1e-3)
    assert L.binary_kl(s + 1, t + 1).item() != pytest.approx(L.binary_kl(s, t).item(), rel=1e-3)


def test_jsd_ends_and_symmetry():
    s, t = pair(5, 8, seed=4)
    assert torch.equal(L.jsd(s, t, beta=0.0), L.kl(s, t))
    assert torch.equal(L.jsd(s, t, beta=1.0), L.kl(s, t, direction="reverse"))
    tiny = 1e-5
    assert (L.jsd(s, t, beta=tiny) / tiny).item() == pytest.approx(L.kl(s, t).item(), rel=1e-3)
    assert L.jsd(s, t, beta=0.3).item() == pytest.approx(L.jsd(t, s, beta=0.7).item(), rel=1e-12)
    assert 0 < L.jsd(s * 50, t * 50).item() <= math.log(2) + 1e-12


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_masked_items_change_nothing(loss):
    s, t = pair(4, 5, 6, seed=5)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    dense = loss(s[mask], t[mask])
    spoilt_s, spoilt_t = s.clone(), t.clone()
    spoilt_s[~mask], spoilt_t[~mask] = float("nan"), float("inf")
    spoilt_s.requires_grad_(True)
    value = loss(spoilt_s, spoilt_t, mask=mask)
    gradient = grad_of(value, spoilt_s)
    assert value.item() == pytest.approx(dense.item(), rel=1e-12)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()
    each = loss(spoilt_s, spoilt_t, mask=mask, reduction="none")
    assert each.shape == (4, 5)
    assert (each[~mask] == 0).all()
    assert each.sum().item() == pytest.approx(
        loss(spoilt_s, spoilt_t, mask=mask, reduction="sum").item(), rel=1e-12
    )


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_a_mask_of_nothing_gives_zero_and_a_finite_gradient(loss):
    s, t = pair(3, 6)
    s.requires_grad_(True)
    value = loss(s, t, mask=torch.zeros(3, dtype=torch.bool))
    assert value.item() == 0
    assert torch.equal(grad_of(value, s), torch.zeros_like(s))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temperature_per_item(direction):
    s, t = pair(6, 5, seed=6)
    per_item = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.5, 3.0], dtype=torch.float64)
    for scale in (True, False):
        each = L.kl(s, t, temperature=per_item, direction=direction, reduction="none", scale=scale)
        for i, tau in enumerate(per_item.tolist()):
            alone = L.kl(s[i], t[i], temperature=tau, direction=direction, scale=scale)
            assert each[i].item() == pytest.approx(alone.item(), rel=1e-12)
    one = L.kl(s, t, temperature=torch.tensor(2.0), direction=direction)
    assert one.item() == pytest.approx(L.kl(s, t, temperature=2.0, direction=direction).item())


def test_scale_is_the_temperature_squared():
    s, t = pair(4, 6)
    scaled = L.kl(s, t, temperature=4.0)
    assert scaled.item() == pytest.approx(16 * L.kl(s, t, temperature=4.0, scale=False).item())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ruled_out_classes_contribute_nothing(direction):
    s, t = pair(4, 6, seed=7)
    padded_s = torch.cat([s, torch.full((4, 3), -math.inf)], -1).requires_grad_(True)
    padded_t = torch.cat([t, torch.full((4, 3), -math.inf)], -1)
    value = L.kl(padded_s, padded_t, direction=direction, beta=0.3)
    assert value.item() == pytest.approx(L.kl(s, t, direction=direction, beta=0.3).item())
    gradient = grad_of(value, padded_s)
    assert gradient.isfinite().all()
    assert (gradient[:, 6:] == 0).all()
    assert L.kl(padded_t, padded_t, direction=direction).item() == 0.0


def test_the_mean_forward_kl_in_one_sum_is_that_item_by_item():
    s, t = pair(7, 6, seed=3)
    s.requires_grad_(True)
    whole = L.kl(s, t, temperature=3.0)
    singly = L.kl(s, t, temperature=3.0, reduction="none").mean()
    torch.testing.assert_close(whole, singly)
    torch.testing.assert_close(grad_of(whole, s), grad_of(singly, s))
    assert L.kl(t, t, temperature=3.0).item() == 0.0
    over_rows = torch.vmap(lambda a, b: L.kl(a[None], b[None], temperature=3.0))(s.detach(), t)
    torch.testing.assert_close(over_rows.mean(), singly.detach())
    ruled_out = t.index_fill(1, torch.tensor([2]), -math.inf)
    assert L.kl(s, ruled_out).isfinite()
    assert L.kl(s, t * math.nan).isnan()


def test_js_with_disjoint_support_is_log_two():
    s = torch.tensor([[0.0, -math.inf]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[-math.inf, 0.0]], dtype=torch.float64)
    value = L.jsd(s, t)
    assert value.item() == pytest.approx(math.log(2))
    assert grad_of(value, s).isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck_kl(direction):
    s, t = pair(3, 5, seed=8)
    s.requires_grad_(True)
    t.requires_grad_(True)
    temperature = torch.tensor([1.0, 2.0, 0.7], dtype=torch.float64)

    def run(a, b):
        return L.kl(a, b, temperature=temperature, direction=direction, beta=0.3, skew=0.2)

    assert torch.autograd.gradcheck(run, (s, t))


@pytest.mark.parametrize("loss", [L.total_variation, L.binary_kl, L.binary_kl_norm, L.mse_logits])
def test_gradcheck_others(loss):
    s, t = pair(3, 5, seed=9)
    assert torch.autograd.gradcheck(loss, (s.requires_grad_(True), t.requires_grad_(True)))


def test_gradients_reach_learnt_labels():
    s, labels = pair(3, 5)
    labels.requires_grad_(True)

    def run(z):
        return L.soft_cross_entropy(s, z, from_logits=True, temperature=2.0)

    assert torch.autograd.gradcheck(run, (labels,))


def test_soft_cross_entropy_is_kl_plus_entropy():
    s, t = pair(3, 5)
    p = t.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert torch.allclose(L.soft_cross_entropy(s, p), L.kl(s, t) + entropy)
    one_hot = nn.functional.one_hot(torch.tensor([0, 3, 1]), 5).double()
    expected = nn.functional.cross_entropy(s, torch.tensor([0, 3, 1]))
    assert torch.allclose(L.soft_cross_entropy(s, one_hot), expected)
    ruled_out = s.clone()
    ruled_out[0, 1] = -math.inf
    assert L.soft_cross_entropy(ruled_out, one_hot).isfinite()


def test_label_smoothing_agrees_with_torch():
    s, _ = pair(4, 5, 6)
    target = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(0))
    for smoothing in (0.0, 0.1, 1.0):
        expected = nn.functional.cross_entropy(
            s.reshape(-1, 6), target.reshape(-1), label_smoothing=smoothing
        )
        assert torch.allclose(
            L.label_smoothing_cross_entropy(s, target, smoothing=smoothing), expected
        )
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    ignored = target.masked_fill(~mask, -100)
    expected = nn.functional.cross_entropy(s[1, 2], target[1, 2], label_smoothing=0.1)
    assert torch.allclose(L.label_smoothing_cross_entropy(s, ignored, mask=mask), expected)


# ------------------------------------------------------------- binary forms, sheet properties


def test_binary_hand_values():
    f2 = torch.tensor([[2, -1, 0.5], [0, 1, 3]], dtype=torch.float64)
    t = torch.tensor([[1, 0, 0.5], [0, 2, 1]], dtype=torch.float64)
    assert L.binary_kl_norm(f2, t, temperature=2.0).item() == pytest.approx(0.4258078, abs=5e-8)
    assert L.binary_kl(f2, t, temperature=2.0).item() == pytest.approx(0.3802128, abs=5e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norm_is_log_cosh_and_zero_only_for_equal_logits(dtype):
    s, t = pair(6, 4, dtype=dtype, seed=10)
    for tau in (1.0, 2.0, 4.0):
        expected = tau**2 / 6 * ((s - t).double() / (2 * tau)).cosh().log().sum()
        assert L.binary_kl_norm(s, t, temperature=tau).item() == pytest.approx(
            expected.item(), rel=1e-6
        )
    assert L.binary_kl_norm(s, s).item() == 0
    nearly = s.clone()
    nearly[0, 0] += 1e-3
    assert L.binary_kl_norm(nearly, s).item() > 0


def test_norm_gradient_is_a_tanh():
    s, t = pair(6, 4, seed=11)
    s.requires_grad_(True)
    gradient = grad_of(L.binary_kl_norm(s, t, temperature=3.0), s)
    assert torch.allclose(gradient, 3.0 / (2 * 6) * ((s - t) / 6.0).tanh(), atol=1e-14)
    assert not t.requires_grad


@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0])
def test_norm_of_small_differences_is_quadratic_at_any_temperature(tau):
    _, t = pair(5, 7, seed=12, dtype=torch.float32)
    d = torch.full_like(t, 1e-3)
    value = L.binary_kl_norm(d, torch.zeros_like(d), temperature=tau)
    assert value.item() == pytest.approx((d.square().sum() / (8 * 5)).item(), rel=1e-5)


# -------------------------------------------------------------------------- kept classes


def test_topk_of_all_classes_is_the_dense_kl():
    s, t = pair(3, 4, 9, seed=13)
    s.requires_grad_(True)
    dense = L.kl(s, t, temperature=2.0)
    kept = keep_top(t, 9, 2.0)._replace(rest=torch.full((3, 4), -math.inf))
    for tail in ("tail", "truncate"):
        value = L.topk_kl(s, kept, tail=tail)
        assert torch.allclose(value, dense)
        assert torch.allclose(grad_of(value, s), grad_of(L.kl(s, t, temperature=2.0), s))


def test_tail_bucket_against_a_slow_twin():
    s, t = pair(5, 12, seed=14)
    kept = keep_top(t, 3)
    p, q = t.softmax(-1), s.softmax(-1)
    expected = 0.0
    for i in range(5):
        ids = kept.ids[i].tolist()
        pairs = [(p[i, k].item(), q[i, k].item()) for k in ids]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        expected += sum(a * math.log(a / b) for a, b in pairs) / 5
    assert L.topk_kl(s, kept).item() == pytest.approx(expected, rel=1e-9)


def test_tail_of_equal_models_is_zero_and_truncation_is_not():
    _, t = pair(5, 40, seed=15)
    kept = keep_top(t, 4)
    assert abs(L.topk_kl(t, kept).item()) < 1e-12
    truncated = L.topk_kl(t, kept, tail="truncate").item()
    mass = kept.logp.exp().sum(-1).log()
    assert truncated == pytest.approx(-mass.mean().item(), rel=1e-9)


def test_tail_keeps_the_direction_of_the_gradient():
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(32, 2000, generator=rng).requires_grad_(True)
    t = torch.randn(32, 2000, generator=rng) * 3
    exact = grad_of(L.kl(s, t), s).flatten()
    cosines = {
        tail: torch.cosine_similarity(
            grad_of(L.topk_kl(s, keep_top(t, 16), tail=tail), s).flatten(), exact, 0
        ).item()
        for tail in ("tail", "truncate")
    }
    assert cosines["tail"] > 0.95
    assert cosines["tail"] > cosines["truncate"]


def test_samples_estimate_the_kl_without_bias():
    s, t = pair(2, 6, seed=16)
    log_p = t.log_softmax(-1)
    rng = torch.Generator().manual_seed(0)
    ids = torch.multinomial(log_p.exp(), 200_000, replacement=True, generator=rng)
    drawn = Kept(ids, log_p.gather(-1, ids), torch.zeros(2))
    assert L.topk_kl(s, drawn, tail="sample").item() == pytest.approx(L.kl(s, t).item(), rel=2e-2)
    counts = torch.stack([torch.bincount(row, minlength=6) for row in ids]).double()
    every = torch.arange(6).expand(2, 6)
    weighted = Kept(every, log_p, torch.zeros(2), 1.0, counts / 200_000)
    assert torch.allclose(L.topk_kl(s, weighted, tail="sample"), L.topk_kl(s, drawn, tail="sample"))


def test_topk_padding_mask_and_gradcheck():
    s, t = pair(3, 8, seed=17)
    kept = keep_top(t, 3)
    padded = Kept(
        torch.cat([kept.ids, torch.zeros(3, 2, dtype=torch.long)], -1),
        torch.cat([kept.logp, torch.full((3, 2), -math.inf)], -1),
        kept.rest,
    )
    for tail in ("tail", "truncate"):
        assert torch.allclose(L.topk_kl(s, padded, tail=tail), L.topk_kl(s, kept, tail=tail))
    mask = torch.tensor([True, False, True])
    holed = kept._replace(logp=kept.logp.clone(), rest=kept.rest.clone())
    holed.logp[1], holed.rest[1] = math.nan, math.nan
    some = Kept(kept.ids[mask], kept.logp[mask], kept.rest[mask])
    assert torch.allclose(L.topk_kl(s, holed, mask=mask), L.topk_kl(s[mask], some))
    assert torch.autograd.gradcheck(lambda z: L.topk_kl(z, padded), (s.requires_grad_(True),))


# ------------------------------------------------------------------------------ bad input


def test_bad_input_is_told():
    s, t = pair(3, 5)
    with pytest.raises(ModelError, match=r"\(3, 5\).*\(3, 4\)"):
        L.kl(s, t[:, :4])
    with pytest.raises(ModelError, match=r"\(3, 5\).*\(3, 4\)"):
        L.binary_kl_norm(s, t[:, :4])
    with pytest.raises(RecipeError, match="did you mean 'forward'"):
        L.kl(s, t, direction="foward")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="temperature must be above 0"):
        L.kl(s, t, temperature=0.0)
    with pytest.raises(RecipeError, match="beta"):
        L.jsd(s, t, beta=1.5)
    with pytest.raises(RecipeError, match="skew"):
        L.kl(s, t, skew=1.0, direction="skewed_forward")
    with pytest.raises(RecipeError, match="unknown reduction"):
        L.kl(s, t, reduction="average")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="'official'"):
        L.binary_kl(s, t, form="oficial")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="tail policy"):
        L.topk_kl(s, keep_top(t, 2), tail="drop")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="leading dimensions"):
        L.topk_kl(s, keep_top(t[:2], 2))
    with pytest.raises(ModelError, match="mask"):
        L.kl(s, t, mask=torch.ones(3, 1))
    with pytest.raises(ModelError, match="targets of shape"):
        L.label_smoothing_cross_entropy(s, torch.zeros(2, dtype=torch.long))


# ----------------------------------------------------------------------------- sorted heads


def test_sorted_heads_differ_by_what_stands_at_their_ranks():
    student = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher = torch.tensor([[0.1, 0.6, 0.05, 0.25]]).log()
    # .6 .25 .1 .05 and .5 .3 .2 0
    for k, expected in ((1, 0.1), (2, 0.15), (3, 0.25), (4, 0.3), (9, 0.3)):
        found = L.sorted_distance(student, teacher, k=k)
        torch.testing.assert_close(found, torch.tensor(expected))


def test_equal_sorted_heads_are_no_distance_whatever_the_ids():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved, others_moved = logits[:, torch.randperm(9)], other.flip(-1)
    assert L.sorted_distance(moved, logits, k=4).item() < 1e-15
    torch.testing.assert_close(
        L.sorted_distance(moved, others_moved, k=4), L.sorted_distance(logits, other, k=4)
    )


def test_sorted_heads_take_a_mask_and_give_the_student_a_gradient():
    student = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(4, 8, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    found = L.sorted_distance(student, teacher, k=3, mask=mask)
    torch.testing.assert_close(found, L.sorted_distance(student[mask], teacher[mask], k=3))
    (slope,) = torch.autograd.grad(found, student)
    assert (slope[~mask] == 0).all()
    assert (slope[mask].abs().sum(-1) > 0).all()
    assert torch.autograd.gradcheck(
        lambda x: L.sorted_distance(x, teacher, k=3), student.detach().requires_grad_()
    )
    with pytest.raises(ModelError, match="all but the classes"):
        L.sorted_distance(student[:2], teacher, k=3)
    with pytest.raises(RecipeError, match="at least 1"):
        L.sorted_distance(student, teacher, k=0)
