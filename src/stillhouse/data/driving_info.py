"""Annotated frames of KITTI and nuScenes in the JSON form of mmdetection3d's information files.

What differs between the two is brought to one form: points and boxes in the LiDAR's frame,
boxes by their centre with the yaw counter-clockwise from the frame's x axis, cameras by
intrinsics and the pose that takes their points to the LiDAR's frame.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.data.bev_frames import BevAugment, BevSource, Frames
from stillhouse.errors import DataError, nearest
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.boxes import points_per_box, wrapped
from stillhouse.teacher import Ragged

Kind = Literal["kitti", "nuscenes"]
KITTI_NAMES = (
    "Pedestrian",
    "Cyclist",
    "Car",
    "Van",
    "Truck",
    "Person_sitting",
    "Tram",
    "Misc",
)
_KITTI_CAMERA = "CAM2"


@dataclass
class RealFrame:
    """One annotated frame.

    Attributes:
        points: (N, 4) x, y, z, intensity in [0, 1].
        images: a (h, w, 3) uint8 array for each camera.
        camera_names: of the images.
        intrinsics: (V, 3, 3) float64.
        cameras: (V, 4, 4) float64, from each camera to the LiDAR's frame.
        boxes: (M, 9) float64: x, y, z, l, w, h, yaw, velocity along x and y (0 where unknown).
        names: category of each box.
        counted: (M,) LiDAR points in each box as the annotators counted them.
        pose: (4, 4) from the LiDAR's frame to the world; the identity where unknown.
    """

    points: Tensor
    images: list[np.ndarray[Any, np.dtype[np.uint8]]]
    camera_names: list[str]
    intrinsics: Tensor
    cameras: Tensor
    boxes: Tensor
    names: list[str]
    counted: Tensor
    pose: Tensor


def read_info(path: Path, kind: Kind) -> list[RealFrame]:
    """The frames of an information file; clouds and images lie beside it.

    Raises:
        DataError: it, a cloud or an image is missing, damaged, or of another form.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        listed = told["data_list"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no information file of frames: {error}") from error
    made = []
    for number, entry in enumerate(listed):
        try:
            names = _names(told.get("metainfo", {}), kind)
            read = _kitti if kind == "kitti" else _nuscenes
            made.append(read(entry, path.parent, names))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}, frame {number}: not of the form of {kind}: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not made:
        raise DataError(f"{path} lists no frame")
    return made


def _names(told: Mapping[str, Any], kind: Kind) -> dict[int, str]:
    given = told.get("categories")
    if isinstance(given, Mapping):
        return {int(number): str(name) for name, number in given.items()}
    if kind == "kitti":
        return dict(enumerate(KITTI_NAMES))
    raise ValueError("metainfo.categories does not name the categories")


def _cloud(folder: Path, told: Mapping[str, Any], scale: float) -> Tensor:
    file = folder / Path(str(told["lidar_path"])).name
    columns = int(told["num_pts_feats"])
    try:
        flat = np.fromfile(file, dtype=np.float32)
    except OSError as error:
        raise DataError(f"the cloud {file} cannot be read: {error.strerror}") from error
    if not len(flat) or len(flat) % columns:
        raise DataError(f"{file} holds {len(flat)} numbers, no whole points of {columns}")
    points = torch.from_numpy(flat.reshape(-1, columns)[:, :4].copy())
    points[:, 3] /= scale
    return points


def _image(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    stem = folder / Path(name).name
    file = next((f for f in (stem, stem.with_suffix(".jpg")) if f.is_file()), stem)
    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise DataError(f"the image {file} cannot be read: {error}") from error


def _matrix(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _kitti(told: Mapping[str, Any], folder: Path, names: Mapping[int, str]) -> RealFrame:
    camera = told["images"][_KITTI_CAMERA]
    projection, to_camera = _matrix(camera["cam2img"]), _matrix(camera["lidar2cam"])
    intrinsics = projection[:3, :3]
    # The fourth column holds how far this camera stands from the one that boxes are told in.
    beside = torch.eye(4, dtype=torch.float64)
    beside[:3, 3] = torch.linalg.solve(intrinsics, projection[:3, 3])
    pose = torch.linalg.inv(beside @ to_camera)
    kept = [e for e in told["instances"] if e["bbox_label_3d"] >= 0]
    given = _matrix([e["bbox_3d"] for e in kept]).reshape(-1, 7)
    bottom, (length, height, width, turn) = given[:, :3], given[:, 3:].unbind(-1)
    middle = bottom.clone()
    middle[:, 1] -= height / 2  # y points down, and the boxes are told by their floor
    back = torch.linalg.inv(to_camera)
    centre = middle @ back[:3, :3].T + back[:3, 3]
    # The length lies along (cos ry, 0, -sin ry) of the camera.
    along = torch.stack([turn.cos(), torch.zeros_like(turn), -turn.sin()], -1) @ back[:3, :3].T
    yaw = torch.atan2(along[:, 1], along[:, 0])
    still = torch.zeros(len(kept), 2, dtype=torch.float64)
    size = torch.stack([length, width, height], -1)
    return RealFrame(
        _cloud(folder, told["lidar_points"], 1.0),
        [_image(folder, str(camera["img_path"]))],
        [_KITTI_CAMERA],
        intrinsics[None],
        pose[None],
        torch.cat([centre, size, yaw[:, None], still], 1),
        [names[int(e["bbox_label_3d"])] for e in kept],
        torch.tensor([int(e["num_lidar_pts"]) for e in kept]),
        torch.eye(4, dtype=torch.float64),
    )


def _nuscenes(told: Mapping[str, Any], folder: Path, names: Mapping[int, str]) -> RealFrame:
    kept = [e for e in told["instances"] if e["bbox_label_3d"] >= 0]
    boxes = _matrix([e["bbox_3d"] for e in kept]).reshape(-1, 7)
    boxes[:, 6] = wrapped(boxes[:, 6])
    speed = _matrix([e["velocity"] for e in kept]).reshape(-1, 2).nan_to_num(0.0)
    cameras = told["images"]
    to_ego = _matrix(told["lidar_points"]["lidar2ego"])
    return RealFrame(
        _cloud(folder, told["lidar_points"], 255.0),
        [_image(folder, str(camera["img_path"])) for camera in cameras.values()],
        list(cameras),
        torch.stack([_matrix(camera["cam2img"])[:3, :3] for camera in cameras.values()]),
        torch.stack(
            [torch.linalg.inv(_matrix(camera["lidar2cam"])) for camera in cameras.values()]
        ),
        torch.cat([boxes, speed], 1),
        [names[int(e["bbox_label_3d"])] for e in kept],
        torch.tensor([int(e["num_lidar_pts"]) for e in kept]),
        _matrix(told["ego2global"]) @ to_ego,
    )


def resized(
    frame: RealFrame, size: tuple[int, int]
) -> tuple[list[np.ndarray[Any, np.dtype[np.uint8]]], Tensor]:
    """Images of (height, width), and the intrinsics that belong to them, (V, 3, 3)."""
    from PIL import Image

    images, scaled = [], frame.intrinsics.clone()
    for view, image in enumerate(frame.images):
        tall, wide = image.shape[:2]
        small = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX)
        images.append(np.asarray(small))
        scaled[view, 0] *= size[1] / wide
        scaled[view, 1] *= size[0] / tall
    return images, scaled


def frames_of(
    made: Sequence[RealFrame],
    categories: Sequence[str],
    grid: Grid,
    image: tuple[int, int],
    min_points: int,
) -> Frames:
    """Real frames as a source reads them; boxes of other categories are left out.

    Raises:
        DataError: a category that no frame has; the nearest are named.
    """
    there = sorted({name for frame in made for name in frame.names})
    for name in categories:
        if name not in there:
            raise DataError(f"no frame has a box of the category '{name}'{nearest(name, there)}")
    most = max(1, *(len(frame.boxes) for frame in made))
    boxes = torch.zeros(len(made), most, 9)
    labels = torch.zeros(len(made), most, dtype=torch.int64)
    seen, valid = torch.zeros_like(labels), torch.zeros(len(made), most, dtype=torch.bool)
    images, intrinsics = [], []
    for row, frame in enumerate(made):
        count = len(frame.boxes)
        boxes[row, :count] = frame.boxes.float()
        seen[row, :count] = points_per_box(frame.points, frame.boxes.float())
        for place, name in enumerate(frame.names):
            if name in categories:
                labels[row, place] = list(categories).index(name)
                valid[row, place] = True
        small, scaled = resized(frame, image)
        images.append(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))
        intrinsics.append(scaled.float())
    valid &= grid.inside(boxes) & (seen >= min_points)
    lengths = torch.tensor([0, *(len(frame.points) for frame in made)])
    return Frames(
        {"x": Ragged(torch.cat([frame.points for frame in made]), lengths.cumsum(0))},
        boxes,
        labels,
        valid,
        seen,
        torch.arange(most).expand(len(made), -1).clone(),
        torch.zeros(len(made), dtype=torch.int64),
        torch.arange(len(made)),
        torch.stack([frame.pose for frame in made]),
        torch.stack(images).contiguous(),
        torch.stack(intrinsics),
        torch.stack([frame.cameras.float() for frame in made]),
    )


def splits_of(
    frames: Frames,
    categories: Sequence[str],
    grid: Grid,
    augment: BevAugment | None,
    edition: str,
    digest: str,
) -> Splits:
    """Splits of real frames: a tenth each for validation and test; few are all in every split.

    With fewer than ten frames nothing can be held out: such splits show that a format is read
    and that a detector can learn it by heart, no more, and the edition says so.
    """
    few = len(frames) < 10
    held = 0 if few else max(1, len(frames) // 10)
    rows = torch.arange(len(frames))
    parts = {"train": rows, "val": rows, "test": rows}
    if held:
        parts = {
            "train": rows[: -2 * held],
            "val": rows[-2 * held : -held],
            "test": rows[-held:],
        }
    from stillhouse.batch import Subset

    sources: dict[str, Any] = {
        role: Subset(BevSource(frames, augment if role == "train" else None, edition), chosen)
        for role, chosen in parts.items()
    }
    note = "; the same frames to learn from and to judge on" if few else ""
    about = {
        "categories": list(categories),
        "grid": grid.plain(),
        "sensors": ["lidar", "camera"],
        "facts": {"categories": list(categories), "grid": grid.plain()},
        "hash": digest,
    }
    return Splits(sources, edition + note, about)
