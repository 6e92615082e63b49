"""Detectors in pieces: together they do what torchvision's whole does, background last inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillhouse.errors import ModelError
from stillhouse.models.detector_net import (
    DetectorNet,
    background_first,
    background_last,
    frozen_norms,
)
from stillhouse.models.loading import load_model
from stillhouse.models.small_faster_rcnn import SmallFasterRCNN

torchvision = pytest.importorskip("torchvision")


def whole(classes: int = 4) -> nn.Module:
    """torchvision's own class with a tiny backbone that has a feature pyramid."""
    torch.manual_seed(0)
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork

    class Pyramid(nn.Module):
        out_channels = 8

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, 4, 1)
            self.second = nn.Conv2d(8, 8, 3, 2, 1)
            self.fpn = FeaturePyramidNetwork([8, 8], 8)

        def forward(self, x):
            low = self.first(x).relu()
            return self.fpn({"0": low, "1": self.second(low).relu()})

    module = FasterRCNN(
        Pyramid(),
        None,
        min_size=64,
        max_size=128,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((0.5, 1.0),) * 2),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0", "1"], 5, 2),
        box_head=torchvision.models.detection.faster_rcnn.TwoMLPHead(8 * 25, 16),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(16, classes),
        box_score_thresh=0.01,
    )
    with torch.no_grad():  # a fresh head says nothing; make it speak
        for parameter in module.roi_heads.box_predictor.parameters():
            parameter.mul_(8)
    return module


def images() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.rand(3, 80, 60, generator=rng), torch.rand(3, 50, 70, generator=rng)]


def targets():
    boxes = [torch.tensor([[10.0, 12.0, 40.0, 50.0], [30.0, 8.0, 55.0, 30.0]]), torch.zeros(0, 4)]
    return boxes, [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.int64)]


def test_detections_are_those_of_the_whole():
    module = whole().eval()
    net = DetectorNet(module).eval()
    with torch.no_grad():
        theirs, ours = module(images()), net(images())
    assert sum(len(each["boxes"]) for each in theirs) > 20
    for row, each in enumerate(theirs):
        torch.testing.assert_close(ours["boxes"][row], each["boxes"])
        torch.testing.assert_close(ours["scores"][row], each["scores"])
        assert torch.equal(ours["labels"][row] + 1, each["labels"])


def test_losses_are_those_of_the_whole():
    module = whole().train()
    boxes, labels = targets()
    given = [{"boxes": b, "labels": t + 1} for b, t in zip(boxes, labels, strict=True)]
    torch.manual_seed(5)
    theirs = module(images(), given)
    net = DetectorNet(module)
    for mode in (True, False):  # the mode of the module changes nothing here
        net.train(mode)
        torch.manual_seed(5)
        features = net.features(images(), vary=True)  # as the whole does in train mode
        ours = net.losses(features, features.to_input(boxes), labels)
        pairs = {"rpn_class": "loss_objectness", "rpn_box": "loss_rpn_box_reg",
                 "class": "loss_classifier", "box": "loss_box_reg"}  # fmt: skip
        for name, other in pairs.items():
            torch.testing.assert_close(ours[name], theirs[other])


def test_an_image_without_a_box_trains_everything():
    net = DetectorNet(whole()).train()
    features = net.features(images())
    none = [torch.zeros(0, 4)] * 2
    losses = net.losses(features, none, [torch.zeros(0, dtype=torch.int64)] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_boxes_go_to_the_input_and_back():
    net = DetectorNet(whole()).eval()
    features = net.features(images())
    assert features.originals == [(80, 60), (50, 70)]
    assert min(features.sizes[0]) == 64
    boxes, _ = targets()
    back = features.to_image(features.to_input(boxes))
    torch.testing.assert_close(back[0], boxes[0])


def test_some_images_of_several():
    net = DetectorNet(whole()).eval()
    with torch.no_grad():
        both = net.features(images())
        second = both.select([1])
        boxes = net.propose(both)[1]
        torch.testing.assert_close(net.propose(second)[0], boxes)
        torch.testing.assert_close(net.roi(second, [boxes])[1],
                                   net.roi(both, [boxes[:0], boxes])[1])  # fmt: skip


def test_the_background_goes_last_and_first_again():
    z = torch.arange(6.0).reshape(1, 6)
    assert background_last(z).tolist() == [[1, 2, 3, 4, 5, 0]]
    assert torch.equal(background_first(background_last(z)), z)


def test_class_agnostic_deltas_move_every_class_alike():
    module = whole().eval()
    module.roi_heads.box_predictor.bbox_pred = nn.Linear(16, 4)
    net = DetectorNet(module).eval()
    features = net.features(images())
    proposals = net.propose(features)
    _, logits, deltas = net.roi(features, proposals)
    assert deltas.shape[1] == 4
    placed = net.coded(deltas, torch.cat(proposals), 3)
    assert placed.shape[1:] == (3, 4)
    assert torch.equal(placed[:, 0], placed[:, 2])
    assert len(net.decode(features, proposals, logits, deltas, score=0.3)) == 2
    boxes, labels = targets()
    assert torch.isfinite(sum(net.losses(features, features.to_input(boxes), labels).values()))


def test_a_copy_has_parameters_of_its_own():
    net = DetectorNet(whole())
    other = copy.deepcopy(net)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in other.parameters()}


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvisions_builders_fit_the_data_and_fetch_nothing(name, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: 1 / 0)
    about = {"categories": ["a", "b"]}
    options = {"rpn_post_nms_top_n_test": 10, "min_size": 64, "max_size": 64}
    net = DetectorNet(load_model(f"torchvision:{name}", options=options, about=about)).eval()
    assert net.categories == 2
    with torch.no_grad():
        out = net(torch.rand(1, 3, 64, 64))
    assert len(out["boxes"]) == 1
    frozen_norms(net)
    net.train()
    norms = frozen_norms(net)
    assert norms
    assert not any(n.training or n.weight.requires_grad for n in norms)


def test_a_small_detector_of_either_backbone():
    for kind in ("small", "mobilenet"):
        net = DetectorNet(SmallFasterRCNN(3, channels=8, hidden=16, size=64, backbone=kind))
        assert net.categories == 3
        features = net.features(torch.rand(2, 3, 64, 64))
        boxes, labels = targets()
        losses = net.losses(features, features.to_input(boxes), labels)
        assert set(losses) == {"rpn_class", "rpn_box", "class", "box"}
    assert net.module.backbone.out_channels == 8


def test_what_is_no_two_stage_detector_is_told():
    with pytest.raises(ModelError, match=r"no two-stage detector.*rpn"):
        DetectorNet(nn.Linear(2, 2))
    retina = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    with pytest.raises(ModelError, match="rpn, roi_heads"):
        DetectorNet(retina)
    with pytest.raises(ModelError, match="none of small"):
        SmallFasterRCNN(3, backbone="large")
