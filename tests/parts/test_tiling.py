from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillhouse.errors import DataError, ModelError
from stillhouse.models.imdn import IMDN, IMDN_AS, load_published
from stillhouse.parts.tiling import (
    adaptive_crops,
    any_size,
    crop_geometry,
    padded,
    tile_starts,
    tiled,
)


def same(image: Tensor) -> Tensor:
    return image


def grown(image: Tensor) -> Tensor:
    return image.repeat_interleave(3, -1).repeat_interleave(3, -2)


class EvenSides(nn.Module):
    """An identity that refuses sides that are no multiples of 4, and remembers its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-1] % 4 == 0
        assert image.shape[-2] % 4 == 0
        self.shapes.append(tuple(image.shape))
        return image


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand(batch, 3, height, width, generator=generator)


# Adaptive cropping -------------------------------------------------------------------------


def test_geometry_matches(golden) -> None:
    vectors = golden("imdn")
    for case in vectors.json["acs_geometry"]:
        rows, columns = crop_geometry(case["H"]), crop_geometry(case["W"])
        assert (rows.half, rows.size) == (case["h_half"], case["h_size"])
        assert (columns.half, columns.size) == (case["w_half"], case["w_size"])
        assert list(rows.far) == case["bottom_rows"]
        assert list(columns.far) == case["right_cols"]
        assert (rows.applicable and columns.applicable) == case["applicable"]
    vectors.count("acs_geometry")


@pytest.mark.parametrize(
    ("length", "half", "size", "far"),
    [(101, 50, 80, (29, 80)), (97, 48, 80, None), (60, 30, 60, None), (130, 65, 96, None)],
)
def test_geometry_of_the_sheet(length: int, half: int, size: int, far) -> None:
    crop = crop_geometry(length)
    assert (crop.half, crop.size) == (half, size)
    assert crop.far[1] - crop.far[0] == length - half
    if far is not None:
        assert crop.far == far


def test_rule_applies_from_sixty_pixels_on() -> None:
    assert [n for n in range(33, 300) if not crop_geometry(n).applicable] == list(range(33, 60))


def test_quadrants_come_from_their_corner(golden) -> None:
    expected = golden("imdn").case("acs_source")["quadrant"]
    height, width = expected.shape

    def numbered(crops: Tensor) -> Tensor:
        numbers = torch.arange(1, 5).view(4, 1, 1, 1).to(crops)
        return numbers.expand(4, 1, *crops.shape[-2:])

    made = adaptive_crops(numbered, torch.zeros(1, 3, height, width))
    np.testing.assert_array_equal(made[0, 0].numpy(), expected)


def test_adaptive_cropping_matches(golden) -> None:
    vectors = golden("imdn")

    def weights(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {k[2:]: torch.from_numpy(v).float() for k, v in case.items() if k[:2] == "w."}

    body = {
        k: v
        for k, v in weights(vectors.case("net_x2")).items()
        if not k.startswith(("fea_conv", "upsampler"))
    }
    net = load_published({**body, **weights(vectors.case("as"))})
    case = vectors.case("acs0")
    with torch.no_grad():
        made = adaptive_crops(net, torch.from_numpy(case["x_u8"]).float() / 255)
    np.testing.assert_allclose(made[:, :1], case["y_red"], atol=1e-5)


@pytest.mark.parametrize("height", [60, 61, 64, 65, 97, 101, 130])
@pytest.mark.parametrize("width", [60, 67, 101])
def test_identity_returns_the_input(height: int, width: int) -> None:
    image = picture(height, width, batch=2)
    assert torch.equal(adaptive_crops(EvenSides(), image), image)


@pytest.mark.parametrize("height", [1, 2, 3, 5, 33, 50, 59])
@pytest.mark.parametrize("width", [1, 7, 59, 61, 120])
def test_short_sides_are_padded_by_reflection(height: int, width: int) -> None:
    image = picture(height, width)
    assert torch.equal(adaptive_crops(EvenSides(), image), image)


def test_divisible_images_go_through_whole() -> None:
    net = EvenSides()
    adaptive_crops(net, picture(64, 100))
    assert net.shapes == [(1, 3, 64, 100)]


def test_crops_are_one_batch_of_four() -> None:
    net = EvenSides()
    adaptive_crops(net, picture(101, 97, batch=2))
    assert net.shapes == [(8, 3, 80, 80)]


@pytest.mark.parametrize(("height", "width"), [(64, 65), (101, 97), (67, 130), (50, 77)])
def test_any_size_goes_through_the_any_scale_network(height: int, width: int) -> None:
    net = IMDN_AS(16, 1).eval()
    with torch.no_grad():
        assert adaptive_crops(net, picture(height, width)).shape == (1, 3, height, width)


def test_networks_that_change_the_size_are_refused() -> None:
    with pytest.raises(ModelError, match=r"keeps the size; got \(4, 3, 80, 80\)"):
        adaptive_crops(grown, picture(101, 97))


# Padding -----------------------------------------------------------------------------------


def test_padding_is_a_reflection() -> None:
    seen: list[Tensor] = []

    def watch(image: Tensor) -> Tensor:
        seen.append(image)
        return image

    image = picture(6, 5)
    made = padded(watch, image, modulus=4)
    assert torch.equal(made, image)
    assert torch.equal(seen[0], nn.functional.pad(image, (0, 3, 0, 2), mode="reflect"))
    padded(watch, image, modulus=4, least=17)
    assert seen[1].shape[-2:] == (20, 20)


def test_padded_results_are_cropped_at_scale() -> None:
    image = picture(7, 9)
    assert torch.equal(padded(grown, image, modulus=4), grown(image))


# Tiles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 100, 257])
def test_tiles_cover_with_enough_context(length: int) -> None:
    tile, overlap = 32, 5
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - tile)
    assert all(a + tile - b >= 2 * overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(20, 20), (33, 70), (100, 31), (64, 65)])
@pytest.mark.parametrize("model", [same, grown])
def test_tiling_an_identity_changes_nothing(model, height: int, width: int, batch: int) -> None:
    image = picture(height, width, batch=2)
    assert torch.equal(tiled(model, image, tile=32, overlap=4, batch=batch), model(image))


def test_tiles_equal_the_whole_when_the_context_reaches() -> None:
    torch.manual_seed(0)
    net = IMDN(16, 1, 2, attention="none").double().eval()
    image = picture(50, 61).double()
    with torch.no_grad():
        # Radius: 1 (head) + 4 (block) + 1 (LR_conv) + 1 (tail).
        torch.testing.assert_close(tiled(net, image, tile=24, overlap=7), net(image))
        assert not torch.allclose(tiled(net, image, tile=24, overlap=2), net(image))


def test_tiles_compose_with_adaptive_cropping() -> None:
    image = picture(150, 203)
    net = EvenSides()
    made = tiled(lambda part: adaptive_crops(net, part), image, tile=70, overlap=8)
    assert torch.equal(made, image)


def test_no_tiles_when_told_so() -> None:
    net = EvenSides()
    tiled(net, picture(600, 8), tile=0)
    assert net.shapes == [(1, 3, 600, 8)]


def test_bad_tiles_and_scales_are_told() -> None:
    with pytest.raises(DataError, match="must be more than 32"):
        tiled(same, picture(40, 40), tile=32, overlap=16)
    with pytest.raises(ModelError, match="enlarged by 3; 2 was expected"):
        tiled(grown, picture(40, 40), tile=32, overlap=4, scale=2)
    with pytest.raises(ModelError, match="31x32 of 32x32"):
        tiled(lambda x: x[..., 1:, :], picture(40, 40), tile=32, overlap=4)
    with pytest.raises(DataError, match=r"\(B, C, H, W\)"):
        tiled(same, torch.zeros(3, 8, 8))


# Any size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (101, 97), (50, 33), (150, 203)])
def test_any_size_meets_the_networks_needs(height: int, width: int) -> None:
    image = picture(height, width)
    net = EvenSides()
    assert torch.equal(any_size(net, image, multiple=4, scale=1, tile=80, overlap=8), image)
    assert max(max(shape[-2:]) for shape in net.shapes) <= 80


def test_networks_that_enlarge_are_padded_at_any_size() -> None:
    def strict(part: Tensor) -> Tensor:
        return grown(EvenSides()(part))

    image = picture(33, 45)
    assert torch.equal(any_size(strict, image, multiple=4, scale=3), grown(image))
    assert torch.equal(
        any_size(strict, image, multiple=4, scale=3, tile=20, overlap=4), grown(image)
    )
