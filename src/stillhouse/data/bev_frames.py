"""Frames of driving as a source: point clouds, cameras and boxes under one geometric draw.

A frame's sensors, boxes and calibration are turned and mirrored together: points and boxes are
moved, and so are the poses of the cameras, whose pixels stay. So a network that lifts images by
their calibration, and one that reads points, see the same world.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample
from stillhouse.clock import Views
from stillhouse.data.cached import tensors_hash
from stillhouse.errors import DataError
from stillhouse.parts.boxes import moved, turned
from stillhouse.teacher import Ragged


@dataclass(frozen=True)
class BevAugment:
    """One draw a frame: mirrored (y to -y) half of the time, turned, for all sensors alike.

    Attributes:
        mirror: whether frames are mirrored.
        turn: largest angle in degrees, either way; 180 is any direction.
    """

    mirror: bool = True
    turn: float = 22.5

    def draw(self, ids: Tensor, views: Views) -> tuple[Tensor, Tensor]:
        """(B,) angles in radians and (B,) signs of y, a function of ids and draw."""
        chance = views.uniform(ids, "bev", 2)
        angle = (2 * chance[:, 0] - 1) * torch.pi * self.turn / 180
        sign = torch.where((chance[:, 1] < 0.5) & self.mirror, -1.0, 1.0)
        return angle, sign


@dataclass
class Frames:
    """Frames in memory.

    Attributes:
        clouds: view's name to its points, `Ragged` values (sum N, F), first x, y, z. The cloud
            "x" belongs to the view "x"; others become views of their own with the same entries.
        boxes: (n, M, 7 or 9), padded.
        labels: (n, M) int64.
        valid: (n, M) bool, which boxes are there.
        seen: (n, M) int64, points of the cloud "x" in each box.
        tracks: (n, M) int64, the object's number in its scene.
        scene: (n,) int64, the sequence that a frame belongs to.
        moment: (n,) int64, its place in the sequence.
        pose: (n, 4, 4) from the frame's coordinates to those of its sequence.
        images: (n, V, 3, H, W) uint8, or None.
        intrinsics: (n, V, 3, 3), or None.
        cameras: (n, V, 4, 4) from each camera to the frame's coordinates, or None.
        surfaces: `Ragged` (sum N,) int64 classes of the points of "x", or None.
        image_surfaces: (n, V, H, W) classes of pixels, or None.
    """

    clouds: dict[str, Ragged]
    boxes: Tensor
    labels: Tensor
    valid: Tensor
    seen: Tensor
    tracks: Tensor
    scene: Tensor
    moment: Tensor
    pose: Tensor
    images: Tensor | None = None
    intrinsics: Tensor | None = None
    cameras: Tensor | None = None
    surfaces: Ragged | None = None
    image_surfaces: Tensor | None = None
    hashed: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, for writing to disk."""
        found: dict[str, Tensor] = {}
        for name, cloud in self.clouds.items():
            found[f"cloud.{name}.values"], found[f"cloud.{name}.offsets"] = cloud
        if self.surfaces is not None:
            found["surfaces.values"], found["surfaces.offsets"] = self.surfaces
        for name in _DENSE:
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Frames:
        """The inverse of `tensors`."""
        clouds = {
            name.split(".")[1]: Ragged(value, tensors[name.replace("values", "offsets")])
            for name, value in tensors.items()
            if name.startswith("cloud.") and name.endswith(".values")
        }
        surfaces = None
        if "surfaces.values" in tensors:
            surfaces = Ragged(tensors["surfaces.values"], tensors["surfaces.offsets"])
        dense: Any = {name: tensors[name] for name in _DENSE if name in tensors}
        return cls(clouds, surfaces=surfaces, **dense)

    def with_cloud(self, name: str, cloud: Ragged) -> Frames:
        """The same frames with one more cloud, as a view of that name."""
        return replace(self, clouds={**self.clouds, name: cloud}, hashed="")

    def without_images(self) -> Frames:
        """The same frames for a LiDAR only."""
        bare: Any = {"images": None, "intrinsics": None, "cameras": None, "image_surfaces": None}
        return replace(self, **bare, hashed="")


_DENSE = (
    "boxes",
    "labels",
    "valid",
    "seen",
    "tracks",
    "scene",
    "moment",
    "pose",
    "images",
    "intrinsics",
    "cameras",
    "image_surfaces",
)


class BevSource:
    """Frames as batches: the view "x" holds what the sensors saw, beside it what is there.

    A batch has `x`: {points (B, N, F) padded with zeros, point_count (B,), images
    (B, V, 3, H, W) in [0, 1], intrinsics (B, V, 3, 3), cameras (B, V, 4, 4)}, what there is of
    it; further clouds as views {points, point_count}; `boxes` (B, M, 7 or 9), `labels`,
    `valid`, `seen`, `tracks` (B, M); `scene`, `moment` (B,); `pose` (B, 4, 4).

    Args:
        frames: in memory.
        augment: the geometric draw of training reads, or None.
        name: of the data.
    """

    def __init__(self, frames: Frames, augment: BevAugment | None = None, name: str = "") -> None:
        if len(frames) == 0:
            raise DataError(f"the data set '{name}' has no frame")
        self.frames, self.augment, self.name = frames, augment, name

    @property
    def fingerprint(self) -> str:
        """Of the content and the augmentation."""
        if not self.frames.hashed:
            self.frames.hashed = tensors_hash(self.frames.tensors())
        text = f"{self.name}|{self.frames.hashed}|{self.augment}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.frames)

    def id_of(self, index: int) -> int:
        """The position itself."""
        return index

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        rows = torch.tensor([int(item[0])])
        views = None
        if item[1] is not None:
            views = Views(int(torch.randint(0, 1 << 31, (), generator=item[1])))
        batch = self.read(rows, views)
        return {
            k: {n: v[0] for n, v in value.items()} if isinstance(value, Batch) else value[0]
            for k, value in batch.items()
        }

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """Frames at positions `rows`; turned and mirrored unless `views` is None."""
        frames = self.frames
        batch = Batch(id=rows.clone())
        for name, cloud in frames.clouds.items():
            points, count = padded(cloud, rows)
            batch[name] = Batch(points=points, point_count=count)
        if frames.images is not None:
            assert frames.intrinsics is not None
            assert frames.cameras is not None
            batch["x"].update(
                images=frames.images[rows].float().div_(255.0),
                intrinsics=frames.intrinsics[rows],
                cameras=frames.cameras[rows],
            )
        for name in ("boxes", "labels", "valid", "seen", "tracks", "scene", "moment", "pose"):
            batch[name] = getattr(frames, name)[rows]
        if frames.surfaces is not None:
            batch["surfaces"] = padded(frames.surfaces, rows, fill=-1)[0]
        if frames.image_surfaces is not None:
            batch["image_surfaces"] = frames.image_surfaces[rows]
        if self.augment is not None and views is not None:
            _augment(batch, *self.augment.draw(rows, views), tuple(frames.clouds))
        return batch


def padded(cloud: Ragged, rows: Tensor, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of a ragged tensor side by side: (B, N, ...) with N the longest, and (B,) counts."""
    start, stop = cloud.offsets[rows].tolist(), cloud.offsets[rows + 1].tolist()
    count = [b - a for a, b in zip(start, stop, strict=True)]
    shape = (len(rows), max(1, *count), *cloud.values.shape[1:])
    found = torch.full(shape, fill, dtype=cloud.values.dtype)
    for place, (a, b) in enumerate(zip(start, stop, strict=True)):
        found[place, : b - a] = cloud.values[a:b]
    return found, torch.tensor(count)


def _augment(batch: Batch, angle: Tensor, sign: Tensor, clouds: tuple[str, ...]) -> None:
    """Move all that has a place in the world, in place."""
    for name in clouds:
        points = batch[name]["points"]
        mirrored = torch.stack([points[..., 0], points[..., 1] * sign[:, None]], -1)
        batch[name]["points"] = torch.cat([turned(mirrored, angle[:, None]), points[..., 2:]], -1)
    world = torch.zeros(len(angle), 4, 4)
    world[:, 0, 0], world[:, 0, 1] = angle.cos(), -angle.sin() * sign
    world[:, 1, 0], world[:, 1, 1] = angle.sin(), angle.cos() * sign
    world[:, 2, 2] = world[:, 3, 3] = 1
    if "cameras" in batch["x"]:
        batch["x"]["cameras"] = world[:, None] @ batch["x"]["cameras"]
    batch["pose"] = batch["pose"] @ torch.linalg.inv(world).to(batch["pose"].dtype)
    batch["boxes"] = moved(batch["boxes"], angle, sign)
