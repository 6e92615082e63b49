from __future__ import annotations

import numpy as np
import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.parts.degrade import downscale, imresize, upscale


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_reduction_matches_bit_for_bit(golden) -> None:
    case = golden("imdn").case("bicubic")
    scale = int(case["scale"])
    lr = downscale(case["hr"], scale)
    assert lr.dtype == np.uint8
    np.testing.assert_array_equal(lr, case["lr_of_crop"])
    # The data set's file was made from the whole photograph: equal away from the crop's border.
    np.testing.assert_array_equal(lr[2:-2, 2:-2], case["lr_dataset"][2:-2, 2:-2])
    exact = downscale(case["hr"], scale, rounded=False)[::3, ::3]
    np.testing.assert_allclose(exact, case["lr_of_crop_no_intermediate_rounding"], atol=1e-3)


def test_enlargement_matches(golden) -> None:
    case = golden("imdn").case("bicubic_up")
    made = upscale(case["lr"], int(case["scale"]))
    assert made.dtype == np.float64
    np.testing.assert_allclose(made, case["up"], atol=1e-6)


def test_tensors_and_arrays_agree() -> None:
    image = photograph(17, 12)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    for rounded in (True, False):
        array = imresize(image, 0.5, rounded=rounded)
        tensor = imresize(planes, 0.5, rounded=rounded)
        np.testing.assert_array_equal(array, tensor.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(imresize(image[:, :, 0], 0.5), imresize(image, 0.5)[:, :, 0])
    batch = torch.stack([planes, planes.flip(-1)])
    assert torch.equal(imresize(batch, 0.5)[0], imresize(planes, 0.5))


def test_vertical_pass_comes_first_and_is_rounded() -> None:
    image = photograph(32, 32)
    ours = imresize(image, 0.5)
    other = imresize(image.transpose(1, 0, 2), 0.5).transpose(1, 0, 2)
    assert 0 < np.abs(ours.astype(int) - other.astype(int)).max() <= 2
    vertical = imresize(image, size=(16, 32))
    np.testing.assert_array_equal(ours, imresize(vertical, size=(16, 16)))


def test_the_smaller_scale_goes_first() -> None:
    image = photograph(30, 30)
    both = imresize(image, size=(20, 10))
    np.testing.assert_array_equal(both, imresize(imresize(image, size=(30, 10)), size=(20, 10)))


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0])
def test_constant_images_stay_constant(scale: float) -> None:
    image = np.full((13, 11, 3), 77, dtype=np.uint8)
    made = imresize(image, scale)
    assert made.shape[:2] == (int(np.ceil(13 * scale - 1e-9)), int(np.ceil(11 * scale - 1e-9)))
    assert (made == 77).all()


def test_straight_lines_are_kept_inside() -> None:
    line = torch.arange(40.0).expand(1, 40, 40).double()
    halves = imresize(line, 0.5)[0, 10]
    expected = 2 * torch.arange(20.0).double() + 0.5
    torch.testing.assert_close(halves[4:-4], expected[4:-4])


def test_floating_images_keep_type_and_take_gradients() -> None:
    image = torch.rand(2, 3, 12, 10, requires_grad=True)
    made = imresize(image, 0.5)
    assert made.dtype == torch.float32
    made.sum().backward()
    # Every output pixel is a weighted mean; all weight together is the output's size.
    assert float(image.grad.sum()) == pytest.approx(made.numel(), rel=1e-5)


def test_no_antialiasing_is_interpolation() -> None:
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    ours = imresize(image, 1 / 3, antialias=False)
    # With an odd factor the output pixels lie on input pixels.
    torch.testing.assert_close(ours, image[..., 1::3, 1::3])
    assert not torch.allclose(imresize(image, 1 / 3), ours)


def test_identity_returns_equal_values() -> None:
    image = photograph(9, 8)
    np.testing.assert_array_equal(imresize(image, 1.0), image)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: imresize(photograph(4, 4)), "either a scale or a size"),
        (lambda: imresize(photograph(4, 4), 0.5, size=(2, 2)), "either a scale or a size"),
        (lambda: imresize(photograph(4, 4), -1.0), "must be positive"),
        (lambda: imresize(photograph(4, 4), size=(0, 4)), "0x4"),
        (lambda: imresize(np.zeros((2, 2, 2, 3), np.uint8), 0.5), r"\(H, W\) or \(H, W, C\)"),
        (lambda: imresize(torch.zeros(3, 4, 4, dtype=torch.int64), 0.5), "uint8 or floating"),
        (lambda: imresize(torch.zeros(3, 0, 4), 0.5), "H, W >= 1"),
    ],
)
def test_bad_calls_are_told(call, words: str) -> None:
    with pytest.raises(DataError, match=words):
        call()
