"""KITTI frames with a LiDAR, the left colour camera and boxes, from an information file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.bev_frames import BevAugment
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.driving_info import Kind, frames_of, read_info, splits_of
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import find_file, locate, missing
from stillhouse.parts.bev_grid import Grid


class FrameOptions(DataOptions):
    """Options of annotated frames."""

    path: str | None = Field(
        None, description="information file (JSON); clouds and images lie beside it"
    )
    categories: list[str] = Field(["Car"], min_length=1, description="boxes that are looked for")
    range: tuple[float, float, float, float, float, float] = Field(
        (0.0, -25.6, -3.0, 51.2, 25.6, 2.0),
        description="ground: x, y, z from, x, y, z to; metres in the LiDAR's frame",
    )
    cell: float = Field(0.8, gt=0, description="side of a cell of the sensors' maps, metres")
    image: tuple[int, int] = Field(
        (96, 320), description="height and width that images are brought to"
    )
    min_points: int = Field(1, ge=0, description="boxes with fewer LiDAR points are left out")
    mirror: bool = Field(False, description="training reads are mirrored half of the time")
    turn: float = Field(0.0, ge=0, le=180, description="training reads are turned by up to this")


class KittiFrames(DataSet[FrameOptions]):
    """Annotated frames of KITTI's object benchmark."""

    name = "kitti_frames"
    title = "annotated KITTI frames: LiDAR, one camera, boxes (one frame beside the checkout)"
    tasks = ("driving",)
    licence = "CC BY-NC-SA 3.0 (KITTI)"
    source = "KITTI by mmdetection3d's demonstration data"
    files = ("lidar/kitti/000008.json",)
    rows: ClassVar = {"train": 1, "val": 1, "test": 1}
    get = "make information files of KITTI with mmdetection3d and write them as JSON"

    Options = FrameOptions

    def open(self, options: FrameOptions, seed: int) -> Splits:
        """Splits of the frames; few frames are all in every split."""
        return opened(self, "kitti", options)


def opened(data: DataSet[FrameOptions], kind: Kind, options: FrameOptions) -> Splits:
    """The splits of an information file of either kind.

    Raises:
        DataError: missing, damaged, or of another form.
    """
    found: Path | None
    if options.path is not None:
        found = locate(options.path, option="path")
    else:
        found = find_file(data.files)
        if found is None:
            raise missing(data.name, data.files, get=data.get)
    grid = Grid(options.range, (options.cell, options.cell))
    frames = frames_of(
        read_info(found, kind), options.categories, grid, options.image, options.min_points
    )
    digest = content_hash(found)
    used = BevAugment(options.mirror, options.turn) if options.mirror or options.turn else None
    edition = f"{data.name} {found.stem}"
    return splits_of(frames, options.categories, grid, used, edition, digest)
