"""Simulated driving: LiDAR and cameras of the same made-up scenes, rendered once.

For cross-modal and sequence distillation, where no small real set with both sensors, tracks and
boxes exists. `driving_world.py` says what is simulated. Each split lies in the cache under a
hash of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.clock import seed_of
from stillhouse.data.bev_frames import BevAugment, BevSource, Frames
from stillhouse.data.cached import cached_tensors
from stillhouse.data.data_set import DataSet
from stillhouse.data.driving_world import CATEGORIES, SURFACES, Frame, Sensors, make_scene, render
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import cache_folder
from stillhouse.errors import DataError
from stillhouse.parts.bev_grid import Grid
from stillhouse.parts.boxes import points_per_box
from stillhouse.teacher import Ragged

VERSION = 1  # of the simulator: part of the name under which scenes are kept
_Z = (-3.0, 2.0)


class SceneOptions(DataOptions):
    """Options of the simulated scenes."""

    train: int = Field(400, ge=1, description="scenes to train on")
    held: int = Field(60, ge=1, description="scenes for validation")
    test: int = Field(100, ge=1, description="scenes for the test")
    frames: int = Field(1, ge=1, le=200, description="frames of a scene, in order")
    interval: float = Field(0.5, gt=0, description="seconds between frames")
    sensors: list[Literal["lidar", "camera"]] = Field(
        ["lidar", "camera"], min_length=1, description="what is rendered and read"
    )
    beams: int = Field(32, ge=2, le=128, description="of the LiDAR")
    azimuths: int = Field(360, ge=16, le=2048, description="directions of the LiDAR a turn")
    cameras: int = Field(4, ge=1, le=12, description="evenly around, the first looking forward")
    field: float = Field(90.0, gt=10, lt=170, description="of view of a camera, degrees across")
    image: tuple[int, int] = Field((64, 160), description="height and width of images in pixels")
    reach: float = Field(25.6, gt=5, description="metres from the middle to the grid's border")
    cell: float = Field(0.8, gt=0, description="side of a cell of the sensors' maps, metres")
    min_points: int = Field(
        1, ge=0, description="boxes with fewer LiDAR points are not there: nobody could see them"
    )
    mirror: bool = Field(True, description="training reads are mirrored half of the time")
    turn: float = Field(
        22.5, ge=0, le=180, description="training reads are turned by up to so many degrees"
    )
    surfaces: bool = Field(False, description="keep the class of every point and pixel too")
    scene_seed: int = Field(0, description="which scenes are made; not the run's seed")

    @model_validator(mode="after")
    def _some_sensor_for_boxes(self) -> SceneOptions:
        if min(self.image) < 8:
            raise ValueError("images need 8 pixels a side at least")
        return self


class DrivingScenes(DataSet[SceneOptions]):
    """Street scenes with LiDAR, a ring of cameras, boxes, tracks and poses.

    A LiDAR is always cast, since boxes are kept by the points that they got; without "lidar"
    among the sensors its points are not read.
    """

    name = "driving_scenes"
    title = "simulated streets seen by a LiDAR and a ring of cameras; cars, trucks, pedestrians"
    tasks = ("driving",)
    licence = "made by the program"
    source = "rendered by a ray caster from a fixed seed"
    edition = "simulated"
    rows: ClassVar = {"train": 400, "val": 60, "test": 100}
    get = "it is rendered where it is used"

    Options = SceneOptions

    def open(self, options: SceneOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test" of different scenes."""
        grid = grid_of(options)
        augment = BevAugment(options.mirror, options.turn)
        sources = {}
        for role, scenes in (
            ("train", options.train),
            ("val", options.held),
            ("test", options.test),
        ):
            frames = rendered(role, scenes, options)
            if "camera" not in options.sensors:
                frames = frames.without_images()
            if "lidar" not in options.sensors:
                frames.clouds = {"x": emptied(frames.clouds["x"])}
            inside = grid.inside(frames.boxes)
            frames.valid = inside & (frames.seen >= options.min_points) & (frames.labels >= 0)
            frames.labels = frames.labels.clamp_min(0)
            used = augment if role == "train" and (options.mirror or options.turn) else None
            sources[role] = BevSource(frames, used, f"{self.name}/{role}")
        facts = {"categories": list(CATEGORIES), "grid": grid.plain()}
        about = {
            "categories": list(CATEGORIES),
            "grid": grid.plain(),
            "sensors": list(options.sensors),
            "surfaces": list(SURFACES),
            "facts": facts,
        }
        return Splits(sources, f"{self.edition}, scene seed {options.scene_seed}", about)


def grid_of(options: SceneOptions) -> Grid:
    """The square around the sensors."""
    reach = options.reach
    return Grid(
        (-reach, -reach, _Z[0], reach, reach, _Z[1]),
        (options.cell, options.cell),
    )


def emptied(cloud: Ragged) -> Ragged:
    """A cloud without points, of as many frames."""
    return Ragged(cloud.values[:0], torch.zeros_like(cloud.offsets))


def rendered(role: str, scenes: int, options: SceneOptions) -> Frames:
    """The frames of a split, from the cache or rendered now.

    Args:
        role: of the split; scenes of different roles differ.
        scenes: number of scenes.
        options: of the data.
    """
    camera = "camera" in options.sensors
    shape = {
        "version": VERSION,
        "role": role,
        "scenes": scenes,
        **options.model_dump(
            include={"frames", "interval", "beams", "azimuths", "reach", "scene_seed", "surfaces"}
        ),
        "cameras": (options.cameras, options.field, options.image) if camera else None,
    }
    key = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder("driving_scenes") / f"{role}-{key}.safetensors"
    sensors = Sensors(
        beams=options.beams,
        azimuths=options.azimuths,
        cameras=options.cameras if camera else 0,
        field=options.field,
        image=(options.image[0], options.image[1]),
    )

    def make() -> dict[str, Tensor]:
        return _rendered(role, scenes, options, sensors)

    return Frames.of(cached_tensors(path, make))


def _rendered(role: str, scenes: int, options: SceneOptions, sensors: Sensors) -> dict[str, Tensor]:
    made: list[tuple[int, int, Frame]] = []
    for number in range(scenes):
        # The scene is one draw, the sensors' noise another: more frames change no scene.
        scene = make_scene(_rng(options.scene_seed, role, number, "scene"), options.reach)
        noise = _rng(options.scene_seed, role, number, "noise")
        for moment in range(options.frames):
            frame = render(scene, sensors, moment * options.interval, noise)
            made.append((number, moment, frame))
    return gathered(made, sensors, surfaces=options.surfaces).tensors()


def _rng(*path: str | int) -> np.random.Generator:
    return np.random.default_rng(seed_of("driving scenes", *path))


def gathered(
    made: list[tuple[int, int, Frame]], sensors: Sensors, *, surfaces: bool = False
) -> Frames:
    """Rendered frames as tensors; `valid` is every box, labels of padding are -1.

    Args:
        made: scene, moment, frame.
        sensors: that they were rendered by.
        surfaces: keep the class of every point and pixel.

    Raises:
        DataError: no frame.
    """
    if not made:
        raise DataError("no frame was rendered")
    count = len(made)
    most = max(1, *(len(frame.boxes) for _, _, frame in made))
    boxes = torch.zeros(count, most, 9)
    labels = torch.full((count, most), -1, dtype=torch.int64)
    tracks = torch.full((count, most), -1, dtype=torch.int64)
    seen = torch.zeros(count, most, dtype=torch.int64)
    for place, (_, _, frame) in enumerate(made):
        own = len(frame.boxes)
        boxes[place, :own] = torch.from_numpy(frame.boxes)
        labels[place, :own] = torch.from_numpy(frame.labels)
        tracks[place, :own] = torch.from_numpy(frame.tracks)
        # Range noise moves points across borders: the box is taken a little larger.
        grown = torch.from_numpy(frame.boxes) + torch.tensor([0, 0, 0, 0.1, 0.1, 0.1, 0, 0, 0])
        seen[place, :own] = points_per_box(torch.from_numpy(frame.points), grown)
    lengths = torch.tensor([0, *(len(frame.points) for _, _, frame in made)])
    offsets = lengths.cumsum(0)
    points = torch.from_numpy(np.concatenate([frame.points for _, _, frame in made]))
    found = Frames(
        {"x": Ragged(points, offsets)},
        boxes,
        labels,
        labels >= 0,
        seen,
        tracks,
        torch.tensor([scene for scene, _, _ in made]),
        torch.tensor([moment for _, moment, _ in made]),
        torch.from_numpy(np.stack([frame.pose for _, _, frame in made])),
    )
    if sensors.cameras:
        images = np.stack([frame.images for _, _, frame in made])
        found.images = torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous()
        found.intrinsics = torch.from_numpy(sensors.intrinsics()).expand(
            count, sensors.cameras, 3, 3
        )
        found.cameras = torch.from_numpy(sensors.poses()).expand(count, -1, 4, 4)
    if surfaces:
        values = np.concatenate([frame.surfaces for _, _, frame in made]).astype(np.int64)
        found.surfaces = Ragged(torch.from_numpy(values), offsets.clone())
        if sensors.cameras:
            pixels = np.stack([frame.image_surfaces for _, _, frame in made])
            found.image_surfaces = torch.from_numpy(pixels)
    return found
