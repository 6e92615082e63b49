from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.metrics.super_resolution import (
    Fidelity,
    compare,
    luma,
    modcrop,
    psnr,
    shave,
    ssim,
    to_grey_levels,
)


def test_figures_match(golden) -> None:
    case = golden("imdn").case("metric")
    sr = torch.from_numpy(case["sr"])
    hr = torch.from_numpy(case["hr"]).permute(2, 0, 1)
    scale = int(case["scale"])
    published = compare(sr, hr, scale)
    assert published["psnr_y"] == pytest.approx(float(case["psnr_y_float"]), abs=1e-4)
    assert published["ssim_y"] == pytest.approx(float(case["ssim_y_float"]), abs=1e-5)
    assert published["psnr_rgb"] == pytest.approx(float(case["psnr_rgb"]), abs=1e-4)
    script = compare(sr, hr, scale, quantize_y=True)
    assert script["psnr_y"] == pytest.approx(float(case["psnr_y"]), abs=1e-4)
    assert script["ssim_y"] == pytest.approx(float(case["ssim_y"]), abs=1e-5)
    whole = compare(sr, hr, scale, quantize_y=True, border=0)
    assert whole["psnr_y"] == pytest.approx(float(case["psnr_y_uncropped"]), abs=1e-4)


def test_luma_matches(golden) -> None:
    case = golden("imdn").case("metric")
    scale = int(case["scale"])
    sr = shave(to_grey_levels(torch.from_numpy(case["sr"])), scale)
    hr = modcrop(torch.from_numpy(case["hr"]).permute(2, 0, 1), scale)
    hr = shave(to_grey_levels(hr), scale)
    np.testing.assert_array_equal(luma(sr, quantize=True)[0].numpy(), case["y_sr"])
    np.testing.assert_array_equal(luma(hr, quantize=True)[0].numpy(), case["y_hr"])


def test_luma_of_black_white_and_red() -> None:
    colours = torch.tensor([[0.0, 0.0, 0.0], [255.0, 255.0, 255.0], [255.0, 0.0, 0.0]])
    y = luma(colours.view(3, 3, 1, 1)).flatten()
    torch.testing.assert_close(y, torch.tensor([16.0, 235.0, 81.481], dtype=torch.float64))


def test_psnr_of_a_known_error() -> None:
    image = torch.full((3, 4, 4), 100.0)
    assert psnr(image, image + 5) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(image, image) == math.inf


def test_ssim_by_its_formula() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (11, 11))
    y = rng.uniform(0, 255, (11, 11))
    reach = np.arange(11) - 5
    weight = np.exp(-(reach[:, None] ** 2 + reach[None, :] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
    cov = (weight * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    made = ssim(torch.from_numpy(x)[None], torch.from_numpy(y)[None])
    assert made == pytest.approx(expected, rel=1e-9)
    assert ssim(torch.from_numpy(x)[None], torch.from_numpy(x)[None]) == pytest.approx(1.0)


def test_what_lies_beyond_the_range_is_clamped_and_rounded() -> None:
    image = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.7])
    assert to_grey_levels(image).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_grey_levels(torch.tensor([3], dtype=torch.uint8)).tolist() == [3.0]


def test_border_is_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(3, 24, 24, generator=generator)
    sr = hr.clone()
    sr[:, :2] = 0
    sr[:, :, -2:] = 1
    assert compare(sr, hr, 2)["psnr_y"] == math.inf
    assert compare(sr, hr, 2, border=0)["psnr_y"] < 30


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compare(torch.zeros(3, 20, 20), torch.zeros(3, 24, 20), 2), "cannot be compared"),
        (lambda: compare(torch.zeros(3, 12, 12), torch.zeros(3, 12, 12), 2), "at least 11 px"),
        (lambda: compare(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), 2), "nothing left"),
        (lambda: luma(torch.zeros(1, 4, 4)), r"\(\.\.\., 3, H, W\)"),
        (lambda: psnr(torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)), r"\(3, 4, 4\) and \(3, 4, 5\)"),
        (lambda: modcrop(torch.zeros(3, 2, 9), 3), "2x9 is smaller than 3"),
    ],
)
def test_images_that_do_not_fit_are_told(call, words: str) -> None:
    with pytest.raises(DataError, match=words):
        call()


def test_fidelity_is_the_mean_over_images_and_adds_over_processes() -> None:
    generator = torch.Generator().manual_seed(1)
    true = [torch.rand(3, 30, side, generator=generator) for side in (20, 24, 28)]
    made = [(t + 0.05 * torch.randn(t.shape, generator=generator)).clamp(0, 1) for t in true]
    whole = Fidelity(2)
    whole.update({"image": made}, {"target": true})
    figures = whole.compute()
    own = [compare(m, t, 2) for m, t in zip(made, true, strict=True)]
    for name in ("psnr_y", "ssim_y", "psnr_rgb"):
        assert figures[name] == pytest.approx(np.mean([o[name] for o in own]))

    first, second = Fidelity(2), Fidelity(2)
    first.update({"image": made[:1]}, {"target": true[:1]})
    second.update({"image": torch.stack([made[1]])}, {"target": torch.stack([true[1]])})
    second.update({"image": made[2:]}, {"target": true[2:]})
    first.take(first.totals() + second.totals())
    assert first.compute() == pytest.approx(figures)


def test_fidelity_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no image was judged"):
        Fidelity(2).compute()
