"""A two-stage detector small enough to be trained on a processor: torchvision's FasterRCNN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import MissingExtra, ModelError


class SmallBackbone(nn.Module):
    """Four 3x3 convolutions with BatchNorm and ReLU; one level.

    Args:
        channels: of the last three convolutions; the first has half of them.
        stride: 4 or 8 px of the image per cell of the map.

    Attributes:
        out_channels: as torchvision's detectors ask for it.
    """

    def __init__(self, channels: int, stride: int = 8) -> None:
        super().__init__()
        if stride not in {4, 8}:
            raise ModelError(f"the small backbone has stride 4 or 8, not {stride}")
        widths = [channels // 2, channels, channels, channels]
        strides = (2, 2, stride // 4, 1)
        layers: list[nn.Module] = []
        before = 3
        for width, stride in zip(widths, strides, strict=True):
            layers += [
                nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            before = width
        self.layers = nn.Sequential(*layers)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to one level (B, channels, H / stride, W / stride)."""
        return OrderedDict([("0", self.layers(images))])


class MobileBackbone(nn.Module):
    """MobileNetV2 up to stride 16, projected to few channels.

    The full 1,280 channels make a step of a two-stage detector some twenty times slower on a
    processor than 128 do.

    Args:
        channels: after the projection.
        blocks: of `features` that are kept; 14 end at stride 16 with 96 channels.
    """

    def __init__(self, channels: int, blocks: int = 14) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2

        body = mobilenet_v2(weights=None).features[:blocks]
        self.body = body
        with torch.no_grad():
            body.eval()
            width = body(torch.zeros(1, 3, 64, 64)).shape[1]
            body.train()
        self.project = nn.Conv2d(width, channels, 1)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to one level (B, channels, H / 16, W / 16)."""
        return OrderedDict([("0", self.project(self.body(images)))])


class SmallFasterRCNN(nn.Module):
    """torchvision's FasterRCNN on a small backbone with one level.

    Args:
        categories: classes without the background.
        channels: of the backbone's map.
        hidden: width of the box head.
        size: shorter side that images are resized to; sides of this size stay as they are.
        anchors: sizes of anchors, px.
        ratios: height / width of anchors.
        proposals: regions that go to the second stage at test time.
        regions: sampled regions of an image in training.
        positives: largest share of them that hold an object; torchvision's quarter leaves few
            where an image has few objects and the detector is trained from nothing.
        backbone: "small" (four convolutions) or "mobilenet" (projected MobileNetV2, stride 16).
        stride: of the small backbone, px: 8, or 4 for objects of less than 24 px.
    """

    def __init__(
        self,
        categories: int,
        *,
        channels: int = 64,
        hidden: int = 256,
        size: int = 96,
        anchors: Sequence[int] = (12, 20, 32),
        ratios: Sequence[float] = (1.0, 1.6),
        proposals: int = 100,
        regions: int = 64,
        positives: float = 0.5,
        backbone: str = "small",
        stride: int = 8,
    ) -> None:
        super().__init__()
        if categories < 1:
            raise ModelError(f"a detector needs one category at least, not {categories}")
        detector = _torchvision_detector(
            _backbone(backbone, channels, stride),
            categories + 1,
            channels=channels,
            hidden=hidden,
            size=size,
            anchors=tuple(anchors),
            ratios=tuple(ratios),
            proposals=proposals,
            regions=regions,
            positives=positives,
        )
        # Its parts are ours: a state dict then has torchvision's own keys.
        self.transform = detector.transform
        self.backbone = detector.backbone
        self.rpn = detector.rpn
        self.roi_heads = detector.roi_heads

    def forward(self, images: Any) -> list[dict[str, Tensor]]:
        """As torchvision answers in eval mode: boxes, labels (background 0) and scores."""
        held, _ = self.transform(list(images), None)
        maps = self.backbone(held.tensors)
        proposals, _ = self.rpn(held, maps, None)
        found, _ = self.roi_heads(maps, proposals, held.image_sizes, None)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        answers: list[dict[str, Tensor]] = self.transform.postprocess(
            found, held.image_sizes, sizes
        )
        return answers


def _backbone(kind: str, channels: int, stride: int) -> nn.Module:
    if kind == "small":
        return SmallBackbone(channels, stride)
    if kind == "mobilenet":
        return MobileBackbone(channels)
    raise ModelError(f"the backbone '{kind}' is none of small, mobilenet")


def _torchvision_detector(backbone: nn.Module, classes: int, **settings: Any) -> Any:
    try:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.faster_rcnn import AnchorGenerator, TwoMLPHead
        from torchvision.ops import MultiScaleRoIAlign
    except ModuleNotFoundError as error:
        raise MissingExtra("torchvision", "images", "for detectors") from error
    channels, hidden = settings["channels"], settings["hidden"]
    pooled = 5
    detector = FasterRCNN(
        backbone,
        num_classes=None,
        min_size=settings["size"],
        max_size=4 * settings["size"],
        rpn_anchor_generator=AnchorGenerator((settings["anchors"],), (settings["ratios"],)),
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=settings["proposals"],
        rpn_post_nms_top_n_test=settings["proposals"],
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=pooled, sampling_ratio=1),
        box_head=TwoMLPHead(channels * pooled**2, hidden),
        box_predictor=_Predictor(hidden, classes),
        box_batch_size_per_image=settings["regions"],
        box_positive_fraction=settings["positives"],
        box_detections_per_img=50,
    )
    detector.transform.size_divisible = 8
    return detector


class _Predictor(nn.Module):
    """As torchvision's box predictor, by its names."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes)
        self.bbox_pred = nn.Linear(width, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, width) to logits (N, classes) and deltas (N, 4 classes)."""
        return self.cls_score(x), self.bbox_pred(x)
