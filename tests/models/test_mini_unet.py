from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.loading import load_model
from stillhouse.models.mini_unet import MiniUNet, time_embedding


def test_it_is_built_by_id_from_what_the_data_says():
    about = {"classes": ["a", "b", "c"], "input": (1, 8, 8)}
    made = load_model("stillhouse:mini_unet", about=about)
    assert isinstance(made, MiniUNet)
    assert (made.classes, made.null, made.shape) == (3, 3, (1, 8, 8))
    assert len(made.schedule) == 1000


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, (8, 4)), (1, 16)])
def test_noise_has_the_shape_of_the_image(channels, size):
    made = MiniUNet(classes=5, channels=channels, size=size)
    x = torch.randn(2, *made.shape)
    out = made(x, torch.tensor([3.0, 500.0]), torch.tensor([0, 5]))
    assert out.shape == x.shape
    assert float(out.detach().abs().max()) == 0.0  # it begins with no noise at all


def test_its_size_with_the_defaults():
    count = sum(p.numel() for p in MiniUNet().parameters())
    assert 60_000 < count < 100_000


def test_time_and_class_matter():
    torch.manual_seed(0)
    made = MiniUNet(classes=3, size=4, width=8).eval()
    torch.nn.init.normal_(made.last.weight)
    x = torch.randn(1, 1, 4, 4)

    def answer(time, condition):
        return made(x, torch.tensor([time]), torch.tensor([condition]))

    assert not torch.allclose(answer(1.0, 0), answer(900.0, 0))
    assert not torch.allclose(answer(1.0, 0), answer(1.0, 3))


def test_sides_that_cannot_be_halved_are_told():
    with pytest.raises(ModelError, match=r"14x14 cannot be halved 2 times.*canvas"):
        MiniUNet(size=14, multipliers=(1, 2, 2))
    with pytest.raises(ModelError, match="one level"):
        MiniUNet(multipliers=())


def test_times_are_taken_as_numbers():
    whole = time_embedding(torch.tensor([7]), 6)
    torch.testing.assert_close(whole, time_embedding(torch.tensor([7.0]), 6))
    assert whole.shape == (1, 6)
