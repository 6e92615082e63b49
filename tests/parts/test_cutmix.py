from __future__ import annotations

import pytest
import torch

from stillhouse.errors import RecipeError
from stillhouse.parts.cutmix import CutMix, box_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_box_is_the_released_one(golden):
    rows = torch.from_numpy(golden("ncfm").case("cutmix_box")["rows"])
    for lam, c1, c2, b1, b2, e1, e2, share in rows.tolist():
        box = box_of(8, 8, lam, int(c1), int(c2))
        assert (box.top, box.left, box.bottom, box.right) == (b1, b2, e1, e2)
        assert box.share == share


def test_the_box_comes_from_the_partner_and_the_rest_stays():
    cutmix = CutMix(probability=1.0)
    x = torch.arange(6.0)[:, None, None, None].expand(6, 2, 8, 10)
    for seed in range(20):
        mix = cutmix.draw(6, (8, 10), generator(seed))
        mixed = mix.images(x)
        theirs = mixed == mix.partner[:, None, None, None]
        own = mixed == x
        assert (own | theirs).all()
        changed = (~own).any(1).float().mean((1, 2))
        moved = mix.partner != torch.arange(6)
        torch.testing.assert_close(
            changed[moved], torch.full_like(changed, 1 - mix.box.share)[moved]
        )
        assert torch.equal(mixed[~moved], x[~moved])
        assert sorted(mix.partner.tolist()) == list(range(6))


def test_a_part_of_the_batch_is_mixed_like_the_whole():
    x = torch.rand(6, 1, 8, 8)
    mix = CutMix(1.0).draw(6, (8, 8), generator(3))
    whole = mix.images(x)
    part = type(mix)(mix.box, mix.partner[2:5]).images(x[2:5], x)
    assert torch.equal(part, whole[2:5])


def test_it_is_a_function_of_the_generator_and_mixes_its_share():
    cutmix = CutMix(0.5)
    draws = [cutmix.draw(4, (8, 8), generator(seed)) for seed in range(400)]
    assert 150 < sum(d is not None for d in draws) < 250
    before = torch.get_rng_state()
    again = cutmix.draw(4, (8, 8), generator(1))
    first = draws[1]
    assert (again is None) == (first is None)
    assert torch.equal(torch.get_rng_state(), before)
    assert CutMix(0.0).draw(4, (8, 8), generator()) is None
    shares = [CutMix(1.0, beta=50.0).draw(4, (32, 32), generator(s)).box.share for s in range(50)]
    # A narrow Beta cuts half the area; only the border takes some of it back.
    assert min(shares) > 0.35


def test_settings_out_of_range_are_told():
    for probability, beta in ((1.5, 1.0), (-0.1, 1.0), (0.5, 0.0)):
        with pytest.raises(RecipeError, match="CutMix"):
            CutMix(probability, beta)
