from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from stillhouse.errors import ModelError
from stillhouse.models import resnet_cifar
from stillhouse.models.resnet_cifar import BasicBlock, ResNetCifar

PUBLISHED = {"resnet20": 0.810, "resnet32": 0.837, "resnet44": 0.842, "resnet56": 0.837}
MILLIONS = {"resnet8": 0.08, "resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes(name):
    net = getattr(resnet_cifar, name)()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == MILLIONS[name]
    assert net.depth == int(name.removeprefix("resnet"))
    assert len([m for m in net.modules() if isinstance(m, BasicBlock)]) == (net.depth - 2) // 2


@pytest.mark.parametrize("size", [16, 28, 32, (28, 56)])
def test_any_image_size(size):
    height, width = (size, size) if isinstance(size, int) else size
    net = ResNetCifar(8, classes=7, channels=1, width=8)
    assert net(torch.randn(2, 1, height, width)).shape == (2, 7)


def test_the_shortcut_has_no_parameters_and_keeps_every_second_pixel():
    block = BasicBlock(2, 4, 2).eval()
    x = torch.randn(1, 2, 4, 4)
    short = block.shortcut(x)
    assert torch.equal(short[:, 1:3], x[:, :, ::2, ::2])
    assert (short[:, [0, 3]] == 0).all()
    assert not [name for name, _ in block.named_parameters() if "shortcut" in name]


def test_taps_name_modules():
    net = resnet_cifar.resnet8()
    assert set(net.taps.values()) <= {name for name, _ in net.named_modules()}


def test_bad_depth_is_told():
    with pytest.raises(ModelError, match=r"6n \+ 2.*not 18"):
        ResNetCifar(18)
    with pytest.raises(ModelError, match="at least 1"):
        ResNetCifar(8, classes=0)


def first_images(root, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(root / "cifar10" / "cifar10_jpg.npz", allow_pickle=False) as stored:
        blob, offsets = stored["test_blob"], stored["test_off"]
        labels = torch.as_tensor(stored["test_labels"][:count]).long()
        pixels = [
            np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())))
            for i in range(count)
        ]
    images = torch.as_tensor(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), labels


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_and_classify(data_root, name):
    net = getattr(resnet_cifar, name)()
    net.load_state_dict(load_file(data_root / "cifar10_resnets" / f"{name}.safetensors"))
    net.eval()
    images, labels = first_images(data_root, 600)
    with torch.no_grad():
        right = [net(part).argmax(1) for part in images.split(100)]
    accuracy = (torch.cat(right) == labels).float().mean().item()
    # 600 of 10,000 images: a standard error of 1.6 points
    assert abs(accuracy - PUBLISHED[name]) < 0.05


@pytest.mark.slow
def test_published_resnet20_on_the_whole_test_split(data_root):
    net = resnet_cifar.resnet20()
    net.load_state_dict(load_file(data_root / "cifar10_resnets" / "resnet20.safetensors"))
    net.eval()
    images, labels = first_images(data_root, 10_000)
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in images.split(200)]) == labels
    assert right.float().mean().item() == pytest.approx(0.810, abs=0.001)


def test_it_learns():
    torch.manual_seed(0)
    net = resnet_cifar.resnet8(classes=2, channels=1, width=4)
    x = torch.randn(32, 1, 12, 12)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
