from __future__ import annotations

import pytest
import torch

from stillhouse.errors import ModelError
from stillhouse.models.edsr import EDSR


def test_baseline_has_its_published_size() -> None:
    assert sum(p.numel() for p in EDSR().parameters()) == 1_369_859


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_output_grows_by_the_scale(scale: int) -> None:
    net = EDSR(8, 2, scale)
    assert net(torch.rand(2, 3, 7, 5)).shape == (2, 3, 7 * scale, 5 * scale)


def test_published_names_are_used() -> None:
    names = set(EDSR(8, 2, 4).state_dict())
    assert {"head.0.weight", "body.0.body.2.bias", "body.2.weight"} <= names
    assert {"tail.0.0.weight", "tail.0.2.weight", "tail.1.bias"} <= names
    assert not any("mean" in name for name in names)


def test_zero_tail_gives_the_mean_colour() -> None:
    net = EDSR(8, 1, 2)
    torch.nn.init.zeros_(net.tail[1].weight)
    torch.nn.init.zeros_(net.tail[1].bias)
    made = net(torch.rand(1, 3, 4, 4))
    torch.testing.assert_close(made, net.mean.expand_as(made))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EDSR(8, 1, 5), "scales 1, 2, 3, 4 and 8, not 5"),
        (lambda: EDSR(0, 1, 2), "at least 1"),
        (lambda: EDSR(8, 1, 2)(torch.zeros(1, 4, 8, 8)), r"got \(1, 4, 8, 8\)"),
    ],
)
def test_bad_settings_are_told(make, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        make()
