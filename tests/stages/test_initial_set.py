from __future__ import annotations

import pytest
import torch

from stillhouse.batch import Subset, TensorSource
from stillhouse.errors import DataError
from stillhouse.parts.distilled_set import Decode, MeanStd
from stillhouse.stages.initial_set import RealImages, initial_images, set_of


def source(rows: int = 30, classes: int = 3) -> TensorSource:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(rows, 3, 4, 4, generator=generator) * 255).to(torch.uint8)
    return TensorSource({"x": images, "target": torch.arange(rows) % classes})


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NORMAL = MeanStd((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("hold_bytes", [0, 1 << 20])
def test_images_are_drawn_by_class_in_network_input_space(hold_bytes):
    data = source()
    real = RealImages(data, 3, NORMAL, hold_bytes=hold_bytes)
    drawn = real.draw(1, 6, rng())
    everything = NORMAL.transform(data.views["x"].float() / 255)
    own = everything[data.views["target"] == 1]
    matches = (drawn[:, None] - own[None]).abs().flatten(2).amax(2) < 1e-6
    assert matches.sum(1).tolist() == [1] * 6
    assert matches.sum(0).max() == 1, "without replacement"
    assert torch.equal(drawn, real.draw(1, 6, rng()))
    assert len(real.draw(1, 99, rng())) == 10, "a smaller class gives all it has"


def test_held_and_read_images_are_the_same():
    held = RealImages(source(), 3, NORMAL)
    read = RealImages(source(), 3, NORMAL, hold_bytes=0)
    rows = torch.tensor([5, 2, 29])
    torch.testing.assert_close(held.take(rows), read.take(rows))


def test_sources_that_do_not_tell_their_labels_are_read():
    class Lazy:
        fingerprint = "lazy"

        def __init__(self) -> None:
            self.inner = source()

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, item):
            return self.inner[item]

    assert [len(r) for r in RealImages(Lazy(), 3, None).rows] == [10, 10, 10]
    part = Subset(source(), torch.tensor([0, 1, 2, 3]))
    assert [r.tolist() for r in RealImages(part, 3, None).rows] == [[0, 3], [1], [2]]


def test_real_initialisation_takes_different_images_of_each_class():
    real = RealImages(source(), 3, None)
    images = initial_images(real, 4, "real", rng())
    assert images.shape == (12, 3, 4, 4)
    assert len(images.flatten(1).unique(dim=0)) == 12
    for c in range(3):
        own = real.take(real.rows[c]).flatten(1)
        for image in images[4 * c : 4 * c + 4].flatten(1):
            assert (own == image).all(1).any()
    assert torch.equal(images, initial_images(real, 4, "real", rng()))


def test_smart_initialisation_spreads_more_than_chance_and_noise_is_normal():
    real = RealImages(source(90), 3, None)

    def spread(images):
        return torch.cdist(images[:5].flatten(1), images[:5].flatten(1)).sum()

    smart = spread(initial_images(real, 5, "smart", rng()))
    chance = torch.stack([spread(initial_images(real, 5, "real", rng(s))) for s in range(8)])
    assert smart > chance.mean()
    noise = initial_images(real, 50, "noise", rng())
    assert noise.shape == (150, 3, 4, 4)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


def test_sets_are_class_major_with_their_preprocessing():
    real = RealImages(source(), 3, NORMAL)
    made = set_of(initial_images(real, 2, "real", rng()), 2, ["a", "b", "c"], NORMAL)
    assert made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.preprocessing == NORMAL


def test_what_is_missing_is_told():
    with pytest.raises(DataError, match="class 3 has no real images"):
        RealImages(source(), 4, None)
    with pytest.raises(DataError, match="class 0 has 10 real images; 11"):
        initial_images(RealImages(source(), 3, None), 11, "real", rng())
    vectors = TensorSource({"x": torch.rand(6, 5), "target": torch.arange(6) % 3})
    with pytest.raises(DataError, match=r"images \(C, H, W\)"):
        RealImages(vectors, 3, None)


def test_mosaics_begin_with_the_images_that_single_ones_would():
    real = RealImages(source(60), 3, NORMAL)
    single = initial_images(real, 2, "real", rng())
    tiles = initial_images(real, 2, "real", rng(), factor=2)
    assert tiles.shape == single.shape
    first = torch.nn.functional.interpolate(single[:2], size=(2, 2), mode="nearest")
    assert torch.equal(tiles[:2, :, :2, :2], first)
    chosen = initial_images(real, 1, "smart", rng(), factor=2)
    assert chosen.shape == (3, 3, 4, 4)
    with pytest.raises(DataError, match="24 per class"):
        initial_images(real, 6, "real", rng(), factor=2)
    made = set_of(tiles, 2, ("a", "b", "c"), NORMAL, Decode(2, pad=0.5))
    assert made.decode.pad == pytest.approx((0.0, 1 / 3, 0.5))
    assert made.training_count == 24


def test_a_client_may_lack_a_class():
    data = source(classes=2)
    with pytest.raises(DataError, match="class 2 has no real images"):
        RealImages(data, 3, NORMAL)
    for hold_bytes in (0, 1 << 20):
        real = RealImages(data, 3, NORMAL, hold_bytes=hold_bytes, missing=True)
        assert [len(rows) for rows in real.rows] == [15, 15, 0]
        assert real.shape == (3, 4, 4)
        assert real.draw(2, 4, rng()).shape == (0, 3, 4, 4)
