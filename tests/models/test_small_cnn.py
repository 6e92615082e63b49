from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.small_cnn import SmallCNN, small_cnn, small_cnn_teacher


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_sizes_of_teacher_and_student():
    assert 280_000 < size(small_cnn_teacher(classes=100)) < 320_000
    assert 27_000 < size(small_cnn(classes=100)) < 33_000


@pytest.mark.parametrize("image", [(28, 56), (8, 8), (28, 28), (5, 1)])
@pytest.mark.parametrize("make", [small_cnn, small_cnn_teacher])
def test_any_image_size(image, make):
    assert make(classes=7, channels=2)(torch.randn(2, 2, *image)).shape == (2, 7)


def test_blocks_halve_the_image():
    net = SmallCNN(widths=(4, 5, 6))
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape[1:])))
    net(torch.randn(1, 1, 8, 8))
    assert seen == [(4, 8, 8), (5, 4, 4), (6, 2, 2)]
    assert set(net.taps.values()) <= {name for name, _ in net.named_modules()}


def test_the_last_linear_layer_sees_pooled_features():
    net = SmallCNN(widths=(4, 6)).eval()
    caught = []
    net.classifier.register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    net(torch.randn(3, 1, 8, 8))
    assert caught[0].shape == (3, 6)


def test_bad_numbers_are_told():
    with pytest.raises(ModelError, match="at least one block"):
        SmallCNN(widths=())
    with pytest.raises(ModelError, match="classes=0"):
        SmallCNN(classes=0)
