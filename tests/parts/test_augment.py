from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import RecipeError
from stillhouse.parts import augment
from stillhouse.parts.augment import DSA, FAMILIES, FULL

SINGLE = {
    "dsa_brightness": (augment.brightness, ["u"], {}),
    "dsa_saturation": (augment.saturation, ["u"], {}),
    "dsa_contrast": (augment.contrast, ["u"], {}),
    "dsa_crop": (augment.crop, ["row_shift", "col_shift"], {}),
    "dsa_cutout": (augment.cutout, ["row_offset", "col_offset"], {}),
    "dsa_flip": (augment.flip, ["flipped"], {}),
    "dsa_scale": (augment.scale, ["sx", "sy"], {"align_corners": True}),
    "dsa_rotate": (augment.rotate, ["angle_deg"], {"align_corners": True}),
    "dsa_scale_ac0": (augment.scale, ["sx", "sy"], {"align_corners": False}),
    "dsa_rotate_ac0": (augment.rotate, ["angle_deg"], {"align_corners": False}),
}


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_single_operation_reproduces_the_released_one(golden, name):
    case = {k: torch.from_numpy(v) for k, v in golden("dd_common").case(name).items()}
    operation, parameters, settings = SINGLE[name]
    x = case["x"].requires_grad_()
    y = operation(x, *(case[p] for p in parameters), **settings)
    (case["cotangent"] * y).sum().backward()
    torch.testing.assert_close(y.detach(), case["y"], rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "align_corners"), [("siamese", True), ("siamese_ac0", False)])
def test_siamese_calls_reproduce_the_released_stream(golden, name, align_corners):
    case = golden("dd_common").case(name)
    dsa = DSA(FULL, siamese=True, align_corners=align_corners)
    for q, seed in enumerate(case["seeds"].tolist()):
        for side in ("real", "syn"):
            y = dsa(torch.from_numpy(case[f"x_{side}"]), seed)
            np.testing.assert_allclose(y.numpy(), case[f"y_{side}"][q], rtol=0, atol=2e-6)
        drawn = augment._Draws(seed, siamese=True).family(6)
        assert drawn == case["family"][q]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_siamese_transform_does_not_depend_on_the_batch(family):
    dsa = DSA(family, siamese=True)
    torch.manual_seed(5)
    a, b = torch.randn(3, 3, 9, 8), torch.randn(40, 3, 9, 8)
    before = torch.get_rng_state()
    alone = dsa(a, 17)
    assert torch.equal(dsa(torch.cat([a, b]), 17)[:3], alone)
    assert torch.equal(dsa(a[:1], 17), alone[:1]), "a batch of one, where in-place code fails"
    assert torch.equal(dsa(a, 17), alone)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["color", "crop", "cutout", "scale", "rotate"])
def test_without_siamese_parameters_differ_per_sample(family):
    x = torch.randn(1, 3, 16, 16).expand(32, -1, -1, -1)
    own = DSA(family)(x, 3)
    shared = DSA(family, siamese=True)(x, 3)
    assert len(own.unique(dim=0)) > 4
    assert len(shared.unique(dim=0)) == 1


def test_flip_without_siamese_mirrors_about_half_of_the_samples():
    x = torch.arange(4.0).expand(400, 1, 4, 4)
    flipped = (DSA("flip")(x, 0)[:, 0, 0, 0] == 3.0).float().mean()
    assert 0.4 < flipped < 0.6


def test_one_family_per_call_and_all_families_occur():
    x = torch.randn(2, 3, 8, 8)
    drawn = [augment._Draws(seed, siamese=False).family(6) for seed in range(100)]
    assert set(drawn) == set(range(6))
    for seed in range(30):
        name = list(FAMILIES)[drawn[seed]]
        draws = augment._Draws(seed, siamese=False)
        draws.family(6)
        assert torch.equal(DSA()(x, seed), FAMILIES[name](x, draws, False).contiguous())


def test_mode_all_applies_every_family_in_order_with_consecutive_seeds():
    x = torch.randn(2, 3, 8, 8)
    once = DSA("flip_cutout", siamese=True, mode="all")(x, 21)
    # mode "one" spends seed 21 on the family, so its first draw is that of seed 22
    step = DSA("cutout", siamese=True)(DSA("flip", siamese=True)(x, 20), 21)
    assert torch.equal(once, step)


def test_a_generator_serves_as_seed_and_moves_on():
    x = torch.randn(2, 3, 16, 16)
    for siamese in (False, True):
        dsa = DSA("crop", siamese=siamese)
        generator = torch.Generator().manual_seed(1)
        first, second = dsa(x, generator), dsa(x, generator)
        again = dsa(x, torch.Generator().manual_seed(1))
        assert torch.equal(first, again)
        assert not torch.equal(first, second)


def test_gradient_of_cutout_and_brightness():
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    y = DSA("cutout", siamese=True)(x, 3)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0).float())
    assert 0 < int((x.grad == 0).sum()) <= x.numel() // 2
    x.grad = None
    augment.brightness(x, torch.rand(4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_crop_reads_zero_outside_and_cutout_is_clipped_at_the_border():
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    shifted = augment.crop(x, torch.tensor([1]), torch.tensor([-1]))
    assert shifted[0, 0].tolist() == [[0, 4, 5], [0, 7, 8], [0, 0, 0]]
    holes = augment.cutout(torch.ones(1, 1, 8, 8), torch.tensor([0]), torch.tensor([8]))
    assert int((holes == 0).sum()) == 2 * 2
    odd = augment.cutout(torch.ones(1, 1, 5, 5), torch.tensor([2]), torch.tensor([2]))
    assert odd[0, 0, 1:4, 1:4].abs().sum() == 0
    assert odd.sum() == 16


def test_even_holes_may_be_centred_on_the_side_itself():
    rows = [int(augment._Draws(s, siamese=True).integers(0, 8, 1)) for s in range(200)]
    assert set(rows) == set(range(9))


def test_saturation_leaves_one_channel_images_and_a_scale_above_one_shrinks():
    grey = torch.randn(2, 1, 8, 8)
    assert torch.equal(augment.saturation(grey, torch.rand(2)), grey)
    disc = torch.ones(1, 1, 16, 16)
    shrunk = augment.scale(disc, torch.tensor([1.2]), torch.tensor([1.2]))
    assert shrunk.sum() < disc.sum()


def test_images_of_other_kinds_pass():
    for dtype in (torch.float64, torch.float32):
        y = DSA(siamese=True)(torch.randn(2, 1, 7, 11, dtype=dtype), 4)
        assert y.dtype == dtype
        assert y.shape == (2, 1, 7, 11)
    x = torch.randn(2, 3, 8, 8)
    assert DSA("none")(x, 0) is x


def test_bad_strategies_are_told():
    with pytest.raises(RecipeError, match="did you mean 'cutout'"):
        DSA("color_cutuot")
    with pytest.raises(RecipeError, match="twice"):
        DSA("flip_flip")
    with pytest.raises(RecipeError, match="mode"):
        DSA(mode="both")


def test_pieces_of_a_batch_are_augmented_as_in_the_whole():
    x = torch.randn(10, 3, 8, 8)
    for strategy in ("color", "crop", "cutout", "flip", "scale", "rotate"):
        dsa = DSA(strategy)
        whole = dsa(x, 5)
        assert torch.equal(dsa(x[3:7], 5, rows=slice(3, 7), of=10), whole[3:7])
        some = torch.tensor([8, 0])
        assert torch.equal(dsa(x[some], 5, rows=some, of=10), whole[some])


LAYERED = {
    "flip": (augment.flip, ["flipped"], {}),
    "brightness": (augment.brightness, ["u"], {}),
    "saturation": (augment.saturation, ["u"], {}),
    "contrast": (augment.contrast, ["u"], {}),
    "crop": (augment.crop, ["row_shift", "col_shift"], {}),
    "cutout": (augment.cutout, ["row_offset", "col_offset"], {}),
    "scale": (augment.scale, ["sx", "sy"], {}),
    "rotate": (augment.rotate, ["angle_deg"], {}),
    "translate": (augment.translate, ["col_shift"], {}),
}


@pytest.mark.parametrize("name", sorted(LAYERED))
def test_operations_on_a_batch_reproduce_the_released_ones(golden, name):
    vectors = golden("ncfm")
    common = vectors.case("aug_flip_batch")  # its input is that of all
    x = torch.from_numpy(common["x"])
    case = {k: torch.from_numpy(v) for k, v in vectors.case(f"aug_{name}_batch").items()}
    operation, parameters, settings = LAYERED[name]
    whole = {"row_shift", "col_shift", "row_offset", "col_offset"}
    given = [case[p].long() if p in whole else case[p] for p in parameters]
    x = x.clone().requires_grad_()
    y = operation(x, *(g.expand(len(x)) for g in given), **settings)
    torch.testing.assert_close(y.detach(), case["y"], rtol=0, atol=2e-6)
    if "grad_x" in case:
        named = {**common, **vectors.case(f"aug_{name}_batch")}
        weights = next(named[k] for k in ("cotangent", "c") if k in named)
        (torch.from_numpy(weights) * y).sum().backward()
        torch.testing.assert_close(x.grad, case["grad_x"], rtol=0, atol=2e-6)


class Scripted:
    """Draws from a list, each for the whole batch."""

    def __init__(self, values) -> None:
        self.values = list(values)

    def family(self, count: int) -> int:
        return int(self.values.pop(0))

    def uniform(self, rows: int) -> torch.Tensor:
        return torch.full((rows,), self.values.pop(0))

    def integers(self, low: int, high: int, rows: int) -> torch.Tensor:
        value = int(self.values.pop(0))
        assert low <= value <= high
        return torch.full((rows,), value)


def test_the_layered_call_reproduces_the_released_pipeline(golden):
    case = golden("ncfm").case("aug_pipeline")
    dsa = DSA(FULL, siamese=True, mode="layered")
    draws = Scripted(case["draws"].tolist())
    y = dsa.apply(torch.from_numpy(case["x"]), draws)
    assert not draws.values
    np.testing.assert_allclose(y.numpy(), case["y"], rtol=0, atol=2e-6)


def test_layered_applies_colour_and_cutout_always_and_one_of_the_rest():
    x = torch.rand(2, 3, 16, 16) + 1.0
    dsa = DSA("color_crop_cutout", siamese=True, mode="layered")
    for seed in range(10):
        y = dsa(x, seed)
        assert (y == 0).any()
        assert not torch.equal(y, x)
        assert torch.equal(dsa(x[:1], seed), y[:1])
    single = DSA("flip", siamese=True, mode="layered")
    seen = {bool(torch.equal(single(x, seed), x)) for seed in range(20)}
    assert seen == {True, False}
    own = DSA("color", mode="layered")(torch.ones(8, 3, 4, 4), 3)
    assert len(own[:, 0, 0, 0].unique()) > 1, "each sample its own parameters when not siamese"
    with pytest.raises(RecipeError, match="layered"):
        DSA("color", mode="both")
