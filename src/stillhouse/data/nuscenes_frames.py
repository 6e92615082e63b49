"""NuScenes key frames with a LiDAR, six cameras and boxes, from an information file."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.kitti_frames import FrameOptions, opened


class NuScenesOptions(FrameOptions):
    """Options of nuScenes frames."""

    categories: list[str] = Field(
        ["car", "truck", "pedestrian"], min_length=1, description="boxes that are looked for"
    )
    range: tuple[float, float, float, float, float, float] = Field(
        (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
        description="ground: x, y, z from, x, y, z to; metres in the LiDAR's frame",
    )
    cell: float = Field(0.8, gt=0, description="side of a cell of the sensors' maps, metres")
    image: tuple[int, int] = Field(
        (144, 256), description="height and width that images are brought to"
    )


class NuScenesFrames(DataSet[NuScenesOptions]):
    """Annotated key frames of nuScenes: one turn of the LiDAR, the ring of six cameras."""

    name = "nuscenes_frames"
    title = "annotated nuScenes key frames: LiDAR, six cameras, boxes (one beside the checkout)"
    tasks = ("driving",)
    licence = "CC BY-NC-SA 4.0 (nuScenes)"
    source = "nuScenes by mmdetection3d's demonstration data"
    files = ("lidar/nuscenes/n015-2018-07-24-11-22-45+0800.json",)
    rows: ClassVar = {"train": 1, "val": 1, "test": 1}
    get = "make information files of nuScenes with mmdetection3d and write them as JSON"

    Options = NuScenesOptions

    def open(self, options: NuScenesOptions, seed: int) -> Splits:
        """Splits of the frames; few frames are all in every split."""
        return opened(self, "nuscenes", options)  # type: ignore[arg-type]
