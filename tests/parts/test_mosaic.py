"""Mosaics: assembled, cut, and back."""

from __future__ import annotations

import pytest
import torch

from stillhouse.errors import DataError
from stillhouse.parts.distilled_set import Decode, DistilledSet, MeanStd
from stillhouse.parts.matrices import ZCA
from stillhouse.parts.mosaic import mosaic, tile_sides


@pytest.mark.parametrize("name", ["mosaic_init", "mosaic_init_odd"])
def test_real_images_are_put_together_as_released(golden, name):
    case = {k: torch.from_numpy(v) for k, v in golden("ncfm").case(name).items()}
    count = len(case["mosaic"]) // len(case["real"])
    factor = round((case["real"].shape[1] / count) ** 0.5)
    found = torch.cat([mosaic(images, factor) for images in case["real"]])
    assert torch.equal(found, case["mosaic"])


@pytest.mark.parametrize("name", ["decode_single", "decode_single_odd", "decode_multi"])
def test_mosaics_are_cut_as_released(golden, name):
    case = {k: torch.from_numpy(v) for k, v in golden("ncfm").case(name).items()}
    decode = Decode(2, kind="multi" if "multi" in name else "single")
    x = case["x"].double().requires_grad_()
    out = decode(x)
    torch.testing.assert_close(out.detach(), case["out"], rtol=1e-10, atol=1e-12)
    assert torch.equal(case["labels"][decode.sources(len(x))], case["out_labels"])
    (case["cotangent"].double() * out).sum().backward()
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=1e-10, atol=1e-12)


def test_whole_tiles_come_back_in_order():
    """Where the factor divides the side, cutting gives the shrunk images, all of tile 0 first."""
    images = torch.rand(8, 1, 1, 1).expand(8, 3, 6, 6)
    assert torch.equal(Decode(2, "nearest")(mosaic(images, 2)), images)
    assert torch.equal(mosaic(images, 1), images)
    assert torch.equal(Decode(1)(images), images)
    nine = torch.rand(9, 1, 1, 1).expand(9, 1, 6, 6)
    assert torch.equal(Decode(3, "nearest")(mosaic(nine, 3)), nine)


def test_odd_sides_are_padded():
    decode = Decode(2, "nearest", pad=0.5)
    out = decode(torch.zeros(1, 1, 33, 33))
    assert out.shape == (4, 1, 33, 33)
    assert out[0].max() == 0
    assert (out[3] == 0.5).any()
    assert tile_sides(33, 2) == [17, 16]
    assert tile_sides(11, 3) == [4, 4, 3]
    per_channel = Decode(2, "nearest", pad=(1.0, 2.0))(torch.zeros(1, 2, 3, 3))
    assert per_channel[3].amax((1, 2)).tolist() == [1.0, 2.0]


def test_normalised_images_are_cut_like_raw_ones():
    space = MeanStd((0.1, 0.5), (0.2, 0.4))
    raw = torch.rand(2, 2, 5, 5, dtype=torch.float64)
    for kind in ("single", "multi"):
        decode = Decode(2, kind=kind)
        found = decode.normalised(space)(space.transform(raw))
        torch.testing.assert_close(found, space.transform(decode(raw)))
    with pytest.raises(DataError, match="whitened"):
        Decode(2).normalised(ZCA.fit(torch.rand(9, 1, 2, 2)))


def test_as_many_are_cut_as_the_bound_allows():
    decode = Decode(3, kind="bound", bound=16)
    # Three images: one in nine tiles, one in four, and one whole: 14 of the 16.
    assert decode.sources(3).tolist() == [0] * 9 + [1] * 4 + [2]
    out = decode(torch.rand(3, 1, 6, 6))
    assert len(out) == 14
    assert Decode(2, kind="bound", bound=2).sources(3).tolist() == [0, 1, 2]
    assert len(Decode(2, kind="bound", bound=1000)(torch.rand(3, 1, 4, 4))) == 12


def test_a_set_keeps_its_way_of_cutting(tmp_path):
    decode = Decode(2, kind="bound", bound=9, pad=(0.1, 0.2, 0.3))
    images, labels = torch.rand(4, 3, 5, 5), torch.tensor([0, 0, 1, 1])
    logits = torch.randn(7, 2)
    made = DistilledSet(images, labels, ("a", "b"), label_logits=logits, decode=decode)
    assert made.training_count == 7
    made.save(tmp_path)
    again = DistilledSet.load(tmp_path)
    assert again.decode == decode
    for ours, theirs in zip(made.training_images(), again.training_images(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(made.training_images()[2], logits)
    per_stored = made.replace(label_logits=torch.randn(4, 2))
    assert len(per_stored.training_images()[2]) == 7
    with pytest.raises(DataError, match=r"\(4, 2\) or \(7, 2\)"):
        made.replace(label_logits=torch.randn(5, 2))


def test_what_cannot_be_put_together_or_cut_is_told():
    with pytest.raises(DataError, match="no whole number"):
        mosaic(torch.rand(5, 1, 4, 4), 2)
    with pytest.raises(DataError, match="no 5x5 tiles"):
        mosaic(torch.rand(25, 1, 4, 4), 5)
    with pytest.raises(DataError, match="at least 1"):
        Decode(0)
    with pytest.raises(DataError, match="single, multi or bound"):
        Decode(2, kind="both")
