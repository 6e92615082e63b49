"""Images with boxes as a source: kept in memory or decoded when read; one draw for both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample
from stillhouse.clock import Views
from stillhouse.errors import DataError
from stillhouse.parts.boxes import flipped

Reader = Callable[[int], Tensor]


class BoxSource:
    """Images (3, H, W), the boxes on them, and what the boxes hold.

    A batch has "x": (B, 3, H, W) in [0, 1] where all sizes are equal, else a list; "boxes": a
    list of (n, 4) float32 in pixels (left, top, right, bottom); "target": a list of (n,) int64
    classes from 0; and, where given, "ignored": a list of (n,) bool for boxes that are neither
    learned nor counted, "crowd": likewise for those that stand for many, and "instances":
    (B, H, W) or a list of (H, W) int64 maps in which pixel value k stands for box k - 1.

    Args:
        images: (N, 3, H, W) uint8, or a function from a position to (3, H, W) uint8.
        boxes: per image (n, 4).
        labels: per image (n,).
        ignored: per image (n,) bool.
        crowd: per image (n,) bool, boxes that stand for many objects; ignored too.
        instances: (N, H, W), or a function from a position.
        names: of the images, for messages and predictions.
        ids: (N,) content ids; positions when not given.
        flip: mirror half of the augmented readings, boxes and instances alike.
        content: hash of the images where they are read by a function.
        categories: number of classes, against which labels are checked.
        name: of the data.

    Attributes:
        fingerprint: of content, ids and augmentation.

    Raises:
        DataError: no images; boxes without area, not finite, or beyond the image (told where the
            size is known); labels out of range.
    """

    def __init__(
        self,
        images: Tensor | Reader,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        *,
        ignored: Sequence[Tensor] | None = None,
        crowd: Sequence[Tensor] | None = None,
        instances: Tensor | Reader | None = None,
        names: Sequence[str] | None = None,
        ids: Tensor | None = None,
        flip: bool = False,
        content: str = "",
        categories: int | None = None,
        name: str = "images with boxes",
    ) -> None:
        if len(boxes) == 0:
            raise DataError(f"the data set '{name}' is empty")
        self.images, self.instances, self.flip, self.name = images, instances, flip, name
        self.boxes = [b.float().reshape(-1, 4) for b in boxes]
        self.labels = [t.long().reshape(-1) for t in labels]
        self.ignored = None if ignored is None else [f.bool().reshape(-1) for f in ignored]
        self.crowd = None if crowd is None else [f.bool().reshape(-1) for f in crowd]
        self.names = list(names) if names is not None else [str(i) for i in range(len(boxes))]
        self.ids = torch.arange(len(self.boxes)) if ids is None else ids
        self._check(categories)
        self._content = content
        self._fingerprint = ""

    def _check(self, categories: int | None) -> None:
        held = len(self.images) if isinstance(self.images, Tensor) else len(self.boxes)
        if not held == len(self.boxes) == len(self.labels) == len(self.names) == len(self.ids):
            raise DataError(
                f"{self.name}: {held} images, {len(self.boxes)} lists of boxes, "
                f"{len(self.labels)} of labels"
            )
        for row, (own, kinds) in enumerate(zip(self.boxes, self.labels, strict=True)):
            where = f"{self.name}, image '{self.names[row]}'"
            if len(own) != len(kinds):
                raise DataError(f"{where}: {len(own)} boxes and {len(kinds)} labels")
            sound = torch.isfinite(own).all(1) & (own[:, 2:] > own[:, :2]).all(1)
            if not bool(sound.all()):
                bad = int((~sound).nonzero()[0, 0])
                raise DataError(
                    f"{where}: box {bad} is {own[bad].tolist()}; left < right and top < bottom are "
                    "needed (left, top, right, bottom in pixels)"
                )
            if categories is not None and len(kinds) and not 0 <= int(kinds.min()) <= int(
                kinds.max()
            ) < categories:  # fmt: skip
                raise DataError(
                    f"{where}: a label of {sorted(set(kinds.tolist()))} is not in 0 .. "
                    f"{categories - 1}"
                )

    @property
    def fingerprint(self) -> str:
        """A hash of the content, the ids and the augmentation."""
        if not self._fingerprint:
            digest = hashlib.sha256(repr((self.name, self._content, self.flip)).encode())
            held: list[Tensor] = [
                self.ids,
                *self.boxes,
                *self.labels,
                *(self.ignored or ()),
                *(self.crowd or ()),
            ]
            held += [v for v in (self.images, self.instances) if isinstance(v, Tensor)]
            for value in held:
                digest.update(str((tuple(value.shape), value.dtype)).encode())
                digest.update(value.detach().cpu().numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def __len__(self) -> int:
        return len(self.boxes)

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        return int(self.ids[index])

    def name_of(self, index: int) -> str:
        """The name of the image at position `index`."""
        return self.names[index]

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """One image with its boxes; mirrored by a draw of the generator where `flip` is set."""
        mirrored = self.flip and item[1] is not None
        turn = mirrored and float(torch.rand((), generator=item[1])) < 0.5
        return self._sample(int(item[0]), turn)

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The images at positions `rows`; mirrored by draws unless `views` is None."""
        ids = self.ids[rows]
        turns = [False] * len(rows)
        if self.flip and views is not None:
            turns = (views.uniform(ids, "flip", 1)[:, 0] < 0.5).tolist()
        samples = [self._sample(i, turn) for i, turn in zip(rows.tolist(), turns, strict=True)]
        return boxed_batch(samples, ids)

    def _sample(self, index: int, turn: bool) -> Sample:
        image = self.images[index] if isinstance(self.images, Tensor) else self.images(index)
        image = image.float().div(255.0) if image.dtype == torch.uint8 else image
        boxes = self.boxes[index]
        sample: Sample = {"x": image, "boxes": boxes, "target": self.labels[index]}
        for name, flags in (("ignored", self.ignored), ("crowd", self.crowd)):
            if flags is not None:
                sample[name] = flags[index]
        if self.instances is not None:
            maps = self.instances
            sample["instances"] = (maps[index] if isinstance(maps, Tensor) else maps(index)).long()
        if turn:
            sample["x"] = image.flip(-1)
            sample["boxes"] = flipped(boxes, image.shape[-1])
            if "instances" in sample:
                sample["instances"] = sample["instances"].flip(-1)
        return sample


def boxed_batch(samples: Sequence[Mapping[str, Any]], ids: Tensor | None = None) -> Batch:
    """Join images with boxes: lists of boxes stay lists, images of one size are stacked."""
    batch = Batch()
    if ids is not None:
        batch["id"] = ids.clone()
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key in {"x", "instances"} and len({tuple(v.shape) for v in values}) == 1:
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    return batch
