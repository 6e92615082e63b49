"""Running means: exact and exponential, keys that are absent, proposals, the sheets' users."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError, RecipeError
from stillhouse.objective import Objective
from stillhouse.parts.running import RunningMean, sums_by_key


def rows(count: int = 30, keys: int = 4, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=rng, dtype=torch.float64)
    return values, torch.randint(keys, (count,), generator=rng)


def bank(momentum: float | None = None, **more: object) -> RunningMean:
    return RunningMean(4, (3,), momentum, dtype=torch.float64, **more)


def test_the_exact_mean_does_not_see_how_rows_are_cut():
    values, keys = rows()
    expected = torch.stack([values[keys == k].mean(0) for k in range(4)])
    for cut in ([30], [9, 4, 17], [1] * 30):
        kept = bank()
        for part in torch.split(torch.arange(30), cut):
            kept.take(*sums_by_key(values[part], keys[part], 4))
        torch.testing.assert_close(kept.value, expected, rtol=1e-12, atol=1e-12)
        assert kept.weight.tolist() == torch.bincount(keys, minlength=4).tolist()
    assert kept.present.all()


def test_a_batch_moves_its_keys_only_and_the_first_is_copied():
    values, keys = rows()
    keys[keys == 2] = 1
    kept = bank(0.9)
    kept.take(*sums_by_key(values, keys, 4))
    first = kept.value.clone()
    assert kept.present.tolist() == [True, True, False, True]
    torch.testing.assert_close(first[0], values[keys == 0].mean(0))
    assert not first[2].any()
    more, late = rows(seed=1)
    late[:] = 2
    late[:5] = 0
    kept.take(*sums_by_key(more, late, 4))
    torch.testing.assert_close(kept.value[0], 0.9 * first[0] + 0.1 * more[:5].mean(0))
    torch.testing.assert_close(kept.value[2], more[5:].mean(0))
    assert torch.equal(kept.value[[1, 3]], first[[1, 3]])


def test_a_given_start_is_moved_and_not_replaced():
    values, keys = rows()
    kept = bank(0.9, initial=0.0)
    assert kept.present.all()
    kept.take(*sums_by_key(values, keys, 4))
    torch.testing.assert_close(kept.value[1], 0.1 * values[keys == 1].mean(0))
    filled = bank(0.9)
    filled.fill(torch.full((3,), 2.0))
    filled.take(*sums_by_key(values, keys, 4))
    torch.testing.assert_close(filled.value[1], 1.8 + 0.1 * values[keys == 1].mean(0))


def test_weights_may_be_fractions():
    values, keys = rows()
    weight = torch.rand(30, dtype=torch.float64)
    sums = sums_by_key(values * weight[:, None], keys, 4)[0]
    counts = sums_by_key(weight, keys, 4)[0]
    kept = bank()
    kept.take(sums, counts)
    own = keys == 3
    expected = (values[own] * weight[own, None]).sum(0) / weight[own].sum()
    torch.testing.assert_close(kept.value[3], expected)


def test_the_proposal_is_returned_committed_at_the_end_and_dropped_with_the_step():
    values, keys = rows()
    kept = bank(0.5)
    kept.take(*sums_by_key(values, keys, 4))
    before = kept.value.clone()
    made = sums_by_key(values + 1, keys, 4)
    kept.begin_slot(0)  # of a forward: what `prepare` proposes stays, also after a refused step
    told = kept.propose(*made)
    again = kept.propose(*made)
    assert torch.equal(kept.value, before)
    assert torch.equal(told, again)
    kept.settle(False)
    assert torch.equal(kept.value, before)
    kept.propose(*made)
    kept.settle(True)
    assert torch.equal(kept.value, told)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_micro_batches_count_as_the_one_batch_they_are(momentum):
    values, keys = rows()
    one, four = bank(momentum), bank(momentum)
    for kept in (one, four):
        kept.take(*sums_by_key(values.flip(0), keys, 4))
    one.take(*sums_by_key(values, keys, 4))
    for slot, part in enumerate(torch.split(torch.arange(30), 8)):
        four.begin_slot(slot)
        four.propose(*sums_by_key(values[part], keys[part], 4))
        four.propose(*sums_by_key(values[part] * 7, keys[part], 4))  # a second forward
    four.settle(True)
    torch.testing.assert_close(one.value, four.value)


@pytest.mark.parametrize(("straight", "factor"), [(False, 0.1), (True, 1.0)])
def test_the_gradient_reaches_the_rows_of_the_batch(straight, factor):
    values, keys = rows()
    keys[keys == 2] = 0
    kept = bank(0.9)
    kept.fill(1.0)
    values.requires_grad_(True)
    told = kept.propose(*sums_by_key(values, keys, 4), straight=straight)
    (grad,) = torch.autograd.grad(told[1].sum() + told[2].sum(), values)
    own = keys == 1
    expected = (own.double() * factor / own.sum())[:, None].expand_as(grad)
    torch.testing.assert_close(grad, expected)
    assert not kept.value.requires_grad


def test_it_is_found_and_saved_as_a_part_of_an_objective():
    class Made(Objective):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))
            self.prototypes = RunningMean(2, (2,))

    made = Made()
    assert made.prototypes in list(made.parts())
    assert {"prototypes.value", "prototypes.weight", "prototypes.given"} <= set(made.state_dict())
    other = Made()
    made.prototypes.take(torch.ones(2, 2), torch.ones(2))
    other.load_state_dict(made.state_dict())
    assert other.prototypes.present.all()
    assert torch.equal(other.prototypes.value, torch.ones(2, 2))


def test_scalars_per_key():
    kept = RunningMean(3, (), 0.9, initial=1 / 3)
    kept.take(torch.tensor([0.65, 0.0, 1.0]), torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(kept.value, torch.tensor([0.365, 1 / 3, 0.35]))


def test_rows_of_no_key_are_left_out():
    values, keys = rows(6)
    keys[0], keys[1] = -100, 4
    sums, counts = sums_by_key(values, keys, 4)
    assert counts.sum() == 4
    torch.testing.assert_close(sums.sum(0), values[2:].sum(0))


def test_bad_input_is_told():
    with pytest.raises(RecipeError, match="momentum"):
        RunningMean(2, (), 1.5)
    with pytest.raises(RecipeError, match="key"):
        RunningMean(0)
    with pytest.raises(ModelError, match=r"\(2, 3\)"):
        RunningMean(2, (3,)).propose(torch.zeros(2, 2), torch.zeros(2))


# ---- other users' numbers --------------------------------------------------------------------


@pytest.mark.parametrize("side", ["s", "t"])
def test_prototypes_of_prokd(golden, side):
    vectors = golden("prokd")
    batch, g = vectors.case("prototypes"), vectors.case("ema")
    proto = torch.as_tensor(batch[f"proto_{side}"])
    present = torch.as_tensor(batch[f"present_{side}"])
    kept = RunningMean(5, (6,), 0.99, dtype=torch.float64)
    kept.value.copy_(torch.as_tensor(g[f"before_{side}"]))
    kept.weight.copy_(torch.as_tensor(g[f"init_before_{side}"]).double())
    kept.take(proto * 3, present.double() * 3)
    after = torch.as_tensor(g[f"init_after_{side}"])
    assert torch.equal(kept.present, after)
    torch.testing.assert_close(kept.value[after], torch.as_tensor(g[f"after_{side}"])[after])


@pytest.mark.parametrize("case", ["kd_a", "kd_b"])
def test_the_centre_of_dcglr(golden, case):
    g = golden("dcglr").case(case)
    outputs = next(torch.as_tensor(v) for k, v in g.items() if k.startswith("teacher"))
    centre = RunningMean(1, tuple(g["center"].shape[1:]), 0.9, initial=0.0, dtype=torch.float64)
    centre.fill(torch.as_tensor(g["center"]).double())
    flat = outputs.reshape(-1, outputs.shape[-1]).double()
    centre.take(flat.sum(0, keepdim=True), torch.tensor([float(len(flat))]))
    after = torch.as_tensor(g["center_after"]).double()
    torch.testing.assert_close(centre.value, after, rtol=1e-6, atol=1e-8)


def test_the_thresholds_of_freematch(golden):
    g = golden("llkd").case("freematch")
    overall = RunningMean(1, (), 0.999, dtype=torch.float64)
    model = RunningMean(1, (4,), 0.999, dtype=torch.float64)
    for step, logits in enumerate(torch.as_tensor(g["logits"])):
        p = logits.softmax(-1)
        rows = torch.tensor([float(len(p))], dtype=torch.float64)
        overall.take(p.max(-1).values.sum().reshape(1), rows)
        model.take(p.sum(0, keepdim=True), rows)
        torch.testing.assert_close(overall.value[0], torch.as_tensor(g["time_p"][step]))
        torch.testing.assert_close(model.value[0], torch.as_tensor(g["p_model"][step]))
