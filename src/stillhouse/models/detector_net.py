"""Two-stage detectors cut into the pieces that distillation needs; torchvision's converted.

Inside, the background is the LAST class and boxes lie in the frame of the resized input unless
said otherwise. torchvision puts the background first; that is turned at its border, here, and
nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import ModelError
from stillhouse.losses.detection import fast_rcnn
from stillhouse.net import Net
from stillhouse.parts.boxes import clipped, resized

_PARTS = ("transform", "backbone", "rpn", "roi_heads")
_HEADS = ("box_roi_pool", "box_head", "box_predictor", "box_coder", "select_training_samples")
_SMALLEST = 1e-2  # px: thinner boxes are no detections, as in torchvision


@dataclass
class Features:
    """What the backbone made of some images.

    Attributes:
        maps: by level, (B, D, h, w).
        images: the resized, normalised and padded images with their sizes (torchvision's
            ImageList).
        originals: height and width of each image as it was given.
    """

    maps: dict[str, Tensor]
    images: Any
    originals: list[tuple[int, int]]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each resized image, without padding."""
        return [(int(h), int(w)) for h, w in self.images.image_sizes]

    def __len__(self) -> int:
        return len(self.originals)

    def to_input(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes of the images as given, in the resized ones."""
        frames = zip(boxes, self.originals, self.sizes, strict=True)
        return [resized(b, before, after) for b, before, after in frames]

    def to_image(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes of the resized images, in those as given."""
        frames = zip(boxes, self.originals, self.sizes, strict=True)
        return [resized(b, after, before) for b, before, after in frames]

    def select(self, rows: Sequence[int]) -> Features:
        """Some of the images."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        kind = type(self.images)
        chosen = kind(
            self.images.tensors[index.to(self.images.tensors.device)],
            [self.images.image_sizes[i] for i in rows],
        )
        maps = {name: value[index.to(value.device)] for name, value in self.maps.items()}
        return Features(maps, chosen, [self.originals[i] for i in rows])


class DetectorNet(Net):
    """A two-stage detector as its pieces: features, proposals, regions, losses, detections.

    Called as a whole it gives, in eval mode, `boxes`, `scores` and `labels` (one tensor per
    image, in the image as given, best first, labels from 0), and in either mode `features` and
    `losses`, a function of the true boxes and labels.

    A class of other heads overrides `roi` (and, where it samples or decodes otherwise, `losses`
    and `decode`); all else follows.

    Args:
        module: torchvision's FasterRCNN, or any module with its `transform`, `backbone`, `rpn`
            and `roi_heads`.

    Raises:
        ModelError: another kind of module.
    """

    module: Any  # of a library without types

    def __init__(self, module: nn.Module, **settings: Any) -> None:
        lacking = [name for name in _PARTS if not hasattr(module, name)]
        heads = getattr(module, "roi_heads", None)
        lacking += [f"roi_heads.{n}" for n in _HEADS if heads is not None and not hasattr(heads, n)]
        if lacking:
            raise ModelError(
                f"a {type(module).__name__} is no two-stage detector: it has no "
                f"{', '.join(lacking)}, as torchvision's fasterrcnn_* and "
                "stillhouse:small-faster-rcnn have"
            )
        super().__init__(module, **{"answer": "boxes", **settings})

    @property
    def device(self) -> torch.device:
        """Where its parameters lie."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def categories(self) -> int | None:
        """Classes without the background; None where the box predictor does not show it."""
        layer = getattr(self.module.roi_heads.box_predictor, "cls_score", None)
        return layer.out_features - 1 if isinstance(layer, nn.Linear) else None

    # ---- the whole -------------------------------------------------------------------------

    def _call(self, view: Any) -> dict[str, Any]:
        features = self.features(view, vary=self.training)
        out: dict[str, Any] = {"features": features, "losses": partial(self.losses, features)}
        if not self.training:
            out.update(self.detect(features))
        return out

    def detect(self, features: Features) -> dict[str, list[Tensor]]:
        """Boxes in the images as given, scores and labels, by the detector's own thresholds."""
        proposals = self.propose(features)
        _, logits, deltas = self.roi(features, proposals)
        found = self.decode(features, proposals, logits, deltas)
        boxes = features.to_image([each["boxes"] for each in found])
        return {
            "boxes": boxes,
            "scores": [each["scores"] for each in found],
            "labels": [each["labels"] for each in found],
        }

    # ---- the pieces ------------------------------------------------------------------------

    def features(self, images: Any, *, vary: bool = False) -> Features:
        """The backbone's maps of images.

        Args:
            images: (B, 3, H, W) or a list of (3, H, W), in [0, 1].
            vary: let the detector draw one of its training sizes; else the fixed test size, so
                that two views of an image share their frame.
        """
        device = self.device
        given = [image.to(device, non_blocking=True) for image in images]
        transform = self.module.transform
        with _mode(transform, vary):
            held, _ = transform(given, None)
        maps = self.module.backbone(held.tensors)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        originals = [(int(image.shape[-2]), int(image.shape[-1])) for image in given]
        return Features(dict(maps), held, originals)

    def propose(self, features: Features) -> list[Tensor]:
        """Where objects may be: (N_i, 4) per image, best first, as many as at test time."""
        with _mode(self.module.rpn, False):
            proposals, _ = self.module.rpn(features.images, features.maps, None)
        return list(proposals)

    def roi(self, features: Features, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the second stage says of regions.

        Args:
            features: of B images.
            boxes: B tensors (N_i, 4).

        Returns:
            Over all N regions, image after image: `feature` (N, D) after pooling; `logits`
            (N, C + 1), background last; `deltas` (N, 4 C), or (N, 4) of class-agnostic heads.
        """
        heads = self.module.roi_heads
        pooled = heads.box_roi_pool(features.maps, list(boxes), features.images.image_sizes)
        feature = heads.box_head(pooled)
        logits, deltas = heads.box_predictor(feature)
        if feature.ndim == 4:  # heads of the C4 kind: what is compared is the pooled map
            feature = feature.mean((2, 3))
        return feature, background_last(logits), _without_background(deltas, logits.shape[1])

    def losses(
        self, features: Features, boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The losses of both stages.

        Args:
            features: of B images.
            boxes: B tensors (n_i, 4), in the resized images; may be empty.
            labels: B tensors (n_i,) int64, from 0.

        Returns:
            `rpn_class`, `rpn_box` and, of sampled regions, `class`, `box`.
        """
        device = self.device
        targets = [
            {
                "boxes": own.to(device).float().reshape(-1, 4),
                "labels": kind.to(device).long() + 1,
            }
            for own, kind in zip(boxes, labels, strict=True)
        ]
        with _mode(self.module.rpn, True):
            proposals, first = self.module.rpn(features.images, features.maps, targets)
        chosen, _, kinds, goals = self.module.roi_heads.select_training_samples(proposals, targets)
        _, logits, deltas = self.roi(features, chosen)
        background = logits.shape[1] - 1
        kind = torch.cat(kinds)
        kind = torch.where(kind > 0, kind - 1, background)
        second = fast_rcnn(logits, deltas, kind, torch.cat(goals))
        return {
            "rpn_class": first["loss_objectness"],
            "rpn_box": first["loss_rpn_box_reg"],
            "class": second[0],
            "box": second[1],
        }

    def decode(
        self,
        features: Features,
        boxes: Sequence[Tensor],
        logits: Tensor,
        deltas: Tensor,
        *,
        score: float | None = None,
        nms: float | None = None,
        limit: int | None = None,
        probabilities: Tensor | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detections from what `roi` said.

        Args:
            features: of B images.
            boxes: B tensors of regions, as given to `roi`.
            logits: (N, C + 1), background last.
            deltas: (N, 4 C) or (N, 4).
            score: least score; the detector's own when not given, as for the next two.
            nms: largest overlap of two detections of a class.
            limit: most detections of an image.
            probabilities: (N, C + 1) in place of the softmax of the logits (ensembles).

        Returns:
            Per image `boxes` (K, 4) in the resized image and clipped to it, `scores` (K,) and
            `labels` (K,) from 0, best first.
        """
        from torchvision.ops import batched_nms

        heads = self.module.roi_heads
        least = heads.score_thresh if score is None else score
        overlap = heads.nms_thresh if nms is None else nms
        most = heads.detections_per_img if limit is None else limit
        whole = logits.float().softmax(1) if probabilities is None else probabilities
        classes = whole.shape[1] - 1
        sizes = [len(each) for each in boxes]
        placed = self.coded(deltas.float(), torch.cat(list(boxes)), classes)
        places, owns = torch.split(placed, sizes), torch.split(whole[:, :classes], sizes)
        found = []
        for own, place, size in zip(owns, places, features.sizes, strict=True):
            rows, labels = (own > least).nonzero(as_tuple=True)
            spots = clipped(place[rows, labels], *size)
            large = ((spots[:, 2:] - spots[:, :2]) >= _SMALLEST).all(1)
            spots, scores, labels = spots[large], own[rows, labels][large], labels[large]
            kept = batched_nms(spots, scores, labels, overlap)[:most]
            found.append({"boxes": spots[kept], "scores": scores[kept], "labels": labels[kept]})
        return found

    def coded(self, deltas: Tensor, boxes: Tensor, classes: int) -> Tensor:
        """(N, 4 C) or (N, 4) deltas from boxes (N, 4) to (N, C, 4) boxes, not clipped."""
        coder = self.module.roi_heads.box_coder
        placed: Tensor = coder.decode(deltas, [boxes]).reshape(len(boxes), -1, 4)
        return placed if placed.shape[1] == classes else placed.expand(-1, classes, -1)


def background_last(logits: Tensor) -> Tensor:
    """From torchvision's order of classes (background first) to ours (background last)."""
    return torch.cat([logits[:, 1:], logits[:, :1]], dim=1)


def background_first(logits: Tensor) -> Tensor:
    """The inverse of `background_last`."""
    return torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)


def _without_background(deltas: Tensor, classes: int) -> Tensor:
    """Without the unused slot of the background; class-agnostic deltas as they are."""
    return deltas[:, 4:] if deltas.shape[1] == 4 * classes and classes > 1 else deltas


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """One module (not its children) in a mode, so that its code takes that branch."""
    before = module.training
    module.training = training
    try:
        yield
    finally:
        module.training = before


def frozen_norms(module: nn.Module) -> list[nn.Module]:
    """The batch normalisations of a module, now fixed: no statistics move, no weight learns."""
    norms: list[nn.Module] = [
        m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    for norm in norms:
        norm.eval()
        norm.requires_grad_(False)
    return norms


def targets_of(batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """True boxes and labels of a batch, without those marked as not to be learned (crowds)."""
    boxes, labels = list(batch["boxes"]), list(batch["target"])
    ignored = batch.get("ignored")
    if ignored is None:
        return boxes, labels
    keep = [~flags for flags in ignored]
    return (
        [b[k.to(b.device)] for b, k in zip(boxes, keep, strict=True)],
        [t[k.to(t.device)] for t, k in zip(labels, keep, strict=True)],
    )
