"""Street scenes that are made up honestly: solids, motion, a LiDAR and a ring of cameras.

A scene has walls and posts that stand, cars, trucks and pedestrians that move at constant
velocity, and a carrier of the sensors that moves too. LiDAR and cameras see the same solids at
the same moment; occlusion is by the nearest hit. Everything is a function of a seed.

The frame of points and boxes is that of the LiDAR: x forward, y left, z up, the ground at -1.8 m.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.data.ray_casting import FAR, SKY, Array, Hits, Solids, cast

GROUND_Z = -1.8
CATEGORIES = ("car", "truck", "pedestrian")
# What a point or pixel belongs to; movable things come last, in the order of CATEGORIES.
SURFACES = ("sky", "road", "wall", "post", *CATEGORIES)
_SIZES = {"car": (4.4, 1.85, 1.55), "truck": (7.5, 2.5, 3.0), "pedestrian": (0.7, 0.7, 1.75)}
_SPEEDS = {"car": 8.0, "truck": 6.0, "pedestrian": 1.4}
_INTENSITY = {"road": 0.2, "wall": 0.35, "post": 0.6, "car": 0.75, "truck": 0.5, "pedestrian": 0.45}
_COLOURS = {
    "sky": (0.62, 0.74, 0.90),
    "road": (0.34, 0.34, 0.36),
    "wall": (0.55, 0.42, 0.33),
    "post": (0.50, 0.52, 0.50),
}
# Texture: amplitude of the noise and its cells a metre.
_TEXTURE = {
    "road": (0.10, 3.0),
    "wall": (0.22, 2.0),
    "post": (0.05, 6.0),
    "car": (0.06, 2.0),
    "truck": (0.12, 1.0),
    "pedestrian": (0.25, 5.0),
}


@dataclass(frozen=True)
class Sensors:
    """What is carried along.

    Attributes:
        beams: of the LiDAR.
        azimuths: directions of the LiDAR a turn.
        elevation: lowest and highest beam, degrees.
        noise: standard deviation of the LiDAR's range, metres.
        dropout: share of returns lost at 25 m; it grows with the square of the range.
        cameras: number of them, evenly around, the first looking forward; 0 for none.
        field: horizontal field of view of a camera, degrees.
        image: (height, width) of its images.
        mount: distance of a camera from the LiDAR's axis, metres.
    """

    beams: int = 32
    azimuths: int = 360
    elevation: tuple[float, float] = (-24.0, 4.0)
    noise: float = 0.02
    dropout: float = 0.25
    cameras: int = 4
    field: float = 90.0
    image: tuple[int, int] = (64, 160)
    mount: float = 0.4

    def intrinsics(self) -> NDArray[np.float32]:
        """(3, 3), equal for all cameras."""
        height, width = self.image
        focal = width / 2 / np.tan(np.radians(self.field) / 2)
        return np.array(
            [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], dtype=np.float32
        )

    def poses(self) -> NDArray[np.float32]:
        """(V, 4, 4) from each camera's frame (x right, y down, z forward) to the LiDAR's."""
        found = np.zeros((self.cameras, 4, 4), np.float32)
        for number in range(self.cameras):
            yaw = 2 * np.pi * number / self.cameras
            forward = np.array([np.cos(yaw), np.sin(yaw), 0])
            right = np.array([np.sin(yaw), -np.cos(yaw), 0])
            found[number, :3, :3] = np.stack([right, (0, 0, -1), forward], axis=1)
            found[number, :3, 3] = self.mount * forward + np.array([0, 0, -0.2])
            found[number, 3, 3] = 1
        return found

    def rays(self) -> Array:
        """(beams * azimuths, 3) unit directions of the LiDAR, beam by beam."""
        elevation = np.radians(np.linspace(*self.elevation, self.beams))[:, None]
        azimuth = np.linspace(-np.pi, np.pi, self.azimuths, endpoint=False)[None]
        parts = (
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation) * np.ones_like(azimuth),
        )
        return np.stack(parts, -1).reshape(-1, 3).astype(np.float32)


@dataclass
class Scene:
    """One sequence: what stands, what moves, and how it is lit.

    Attributes:
        walls: (n, 7) boxes in the world, which is the LiDAR's frame at time 0.
        posts: (m, 5) cylinders.
        movers: (k, 7) boxes at time 0.
        kinds: (k,) number of each mover's category.
        speeds: (k, 2) metres a second.
        paint: (k, 3) colours.
        ego_speed: metres a second along x at time 0.
        ego_turn: radians a second.
        light: (3,) towards the light.
        brightness: of the light.
        tint: (3,) colour of the light.
        seed: of texture.
    """

    walls: Array
    posts: Array
    movers: Array
    kinds: NDArray[np.int64]
    speeds: Array
    paint: Array
    ego_speed: float
    ego_turn: float
    light: Array
    brightness: float
    tint: Array
    seed: int


@dataclass
class Frame:
    """What is seen at one moment.

    Attributes:
        points: (N, 4) x, y, z, intensity.
        surfaces: (N,) number of each point's surface in `SURFACES`.
        boxes: (M, 9) of movers: x, y, z, l, w, h, yaw, velocity along x and y, relative to
            the ground.
        labels: (M,) categories.
        tracks: (M,) the mover's number in its scene.
        pose: (4, 4) from the LiDAR's frame to the world.
        images: (V, H, W, 3) uint8.
        image_surfaces: (V, H, W) uint8.
    """

    points: Array
    surfaces: NDArray[np.uint8]
    boxes: Array
    labels: NDArray[np.int64]
    tracks: NDArray[np.int64]
    pose: NDArray[np.float64]
    images: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    image_surfaces: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


def make_scene(rng: np.random.Generator, reach: float) -> Scene:
    """A scene whose movers stand within `reach` metres of the sensors at time 0.

    Args:
        rng: the chance.
        reach: metres.
    """
    taken: list[tuple[float, float, float]] = [(0.0, 0.0, 3.0)]
    movers, kinds, speeds, paint = [], [], [], []
    for _ in range(int(rng.integers(4, 11))):
        kind = int(rng.choice(3, p=(0.5, 0.2, 0.3)))
        name = CATEGORIES[kind]
        size = np.array(_SIZES[name]) * rng.uniform(0.9, 1.1, 3)
        if name == "pedestrian":
            size[1] = size[0]
        place = _free(rng, taken, reach - 1.0, float(np.hypot(size[0], size[1])) / 2 + 0.3)
        if place is None:
            continue
        yaw = float(rng.uniform(-np.pi, np.pi))
        speed = float(rng.uniform(0, _SPEEDS[name])) * float(rng.random() < 0.6)
        movers.append((*place, GROUND_Z + size[2] / 2, *size, yaw))
        kinds.append(kind)
        speeds.append((speed * np.cos(yaw), speed * np.sin(yaw)))
        paint.append(_paint(rng, name))
    walls = [_wall(rng, reach) for _ in range(int(rng.integers(3, 7)))]
    posts = []
    for _ in range(int(rng.integers(3, 9))):
        place = _free(rng, taken, reach, 0.4)
        if place is not None:
            height = rng.uniform(3, 6)
            posts.append((*place, GROUND_Z + height / 2, rng.uniform(0.08, 0.2), height))
    light = np.array([rng.normal(), rng.normal(), rng.uniform(0.8, 2.0)])
    return Scene(
        np.array(walls, np.float32).reshape(-1, 7),
        np.array(posts, np.float32).reshape(-1, 5),
        np.array(movers, np.float32).reshape(-1, 7),
        np.array(kinds, np.int64),
        np.array(speeds, np.float32).reshape(-1, 2),
        np.array(paint, np.float32).reshape(-1, 3),
        float(rng.uniform(0, 8)),
        float(rng.normal(0, 0.05)),
        (light / np.linalg.norm(light)).astype(np.float32),
        float(rng.uniform(0.75, 1.15)),
        rng.uniform(0.88, 1.0, 3).astype(np.float32),
        int(rng.integers(1 << 30)),
    )


def _free(
    rng: np.random.Generator, taken: list[tuple[float, float, float]], reach: float, radius: float
) -> tuple[float, float] | None:
    """A place that touches nothing, or None after many tries."""
    for _ in range(30):
        x, y = (float(v) for v in rng.uniform(-reach, reach, 2))
        if all(np.hypot(x - a, y - b) > radius + r for a, b, r in taken):
            taken.append((x, y, radius))
            return x, y
    return None


def _paint(rng: np.random.Generator, name: str) -> tuple[float, ...]:
    base = {"car": (0.25, 0.95), "truck": (0.45, 0.9), "pedestrian": (0.1, 0.8)}[name]
    return tuple(float(v) for v in rng.uniform(*base, 3))


def _wall(rng: np.random.Generator, reach: float) -> tuple[float, ...]:
    """A wall around the street: facing the sensors at some distance, so that it hides little."""
    angle = rng.uniform(-np.pi, np.pi)
    away = rng.uniform(0.75, 1.3) * reach
    height = rng.uniform(2.5, 7)
    centre = (away * np.cos(angle), away * np.sin(angle), GROUND_Z + height / 2)
    return (*centre, rng.uniform(6, 18), rng.uniform(0.4, 6), height, angle + np.pi / 2)


def ego_pose(scene: Scene, time: float) -> NDArray[np.float64]:
    """(4, 4) from the LiDAR's frame at a time to the world: motion on a circle."""
    turn = scene.ego_turn * time
    if abs(scene.ego_turn) < 1e-6:
        x, y = scene.ego_speed * time, 0.0
    else:
        radius = scene.ego_speed / scene.ego_turn
        x, y = radius * np.sin(turn), radius * (1 - np.cos(turn))
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    pose[:2, 3] = x, y
    return pose


def _seen_from(pose: NDArray[np.float64], solids: Array) -> Array:
    """Boxes or cylinders of the world in the frame of the sensors."""
    moved = solids.copy()
    moved[:, :2] = (solids[:, :2] - pose[:2, 3]) @ pose[:2, :2]
    if solids.shape[1] == 7:
        moved[:, 6] = solids[:, 6] - np.arctan2(pose[1, 0], pose[0, 0])
    return moved


def render(scene: Scene, sensors: Sensors, time: float, rng: np.random.Generator) -> Frame:
    """What the sensors see at a time.

    Args:
        scene: the world.
        sensors: carried.
        time: seconds.
        rng: noise of the LiDAR.
    """
    pose = ego_pose(scene, time)
    movers = scene.movers.copy()
    movers[:, :2] += scene.speeds * np.float32(time)
    movers, walls = _seen_from(pose, movers), _seen_from(pose, scene.walls)
    round_ones = scene.kinds == CATEGORIES.index("pedestrian")
    people = np.column_stack([movers[:, :3], movers[:, 3] / 2, movers[:, 5]])[round_ones]
    posts = _seen_from(pose, scene.posts)
    solids = Solids(
        np.concatenate([walls, movers[~round_ones]]).astype(np.float32),
        np.concatenate([posts, people]).astype(np.float32),
        GROUND_Z,
    )
    kinds = np.concatenate(
        [
            np.full(len(walls), SURFACES.index("wall")),
            scene.kinds[~round_ones] + SURFACES.index(CATEGORIES[0]),
            np.full(len(posts), SURFACES.index("post")),
            scene.kinds[round_ones] + SURFACES.index(CATEGORIES[0]),
        ]
    ).astype(np.int64)
    paint = np.concatenate(
        [
            np.tile(_COLOURS["wall"], (len(walls), 1)),
            scene.paint[~round_ones],
            np.tile(_COLOURS["post"], (len(posts), 1)),
            scene.paint[round_ones],
        ]
    ).astype(np.float32)
    points, surfaces = _scan(sensors, solids, kinds, rng)
    speeds = scene.speeds @ pose[:2, :2].astype(np.float32)
    boxes = np.concatenate([movers, speeds], axis=1).astype(np.float32)
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    frame = Frame(points, surfaces, boxes, scene.kinds, np.arange(len(movers)), pose)
    if sensors.cameras:
        frame.images, frame.image_surfaces = _photograph(sensors, solids, kinds, paint, scene)
    return frame


def _scan(
    sensors: Sensors, solids: Solids, kinds: NDArray[np.int64], rng: np.random.Generator
) -> tuple[Array, NDArray[np.uint8]]:
    rays = sensors.rays()
    hits = cast(np.zeros(3, np.float32), rays, solids)
    surface = _surface(hits, kinds)
    lost = sensors.dropout * (hits.distance / 25.0) ** 2
    noise = rng.normal(0, sensors.noise, len(rays)).astype(np.float32)
    kept = (hits.distance < 60) & (rng.random(len(rays)) >= np.minimum(lost, 0.95))
    distance = (hits.distance + noise)[kept, None]
    given = np.array([_INTENSITY.get(name, 0.0) for name in SURFACES], np.float32)
    facing = np.abs((hits.normal * rays).sum(1))
    shine = given[surface] * (0.4 + 0.6 * facing) + rng.normal(0, 0.03, len(rays))
    points = np.concatenate([rays[kept] * distance, shine[kept, None]], axis=1)
    return points.astype(np.float32), surface[kept]


def _surface(hits: Hits, kinds: NDArray[np.int64]) -> NDArray[np.uint8]:
    # GROUND is -2 and SKY is -1: they stand last in every table of solids.
    table = np.concatenate([kinds, [SURFACES.index("road"), SURFACES.index("sky")]])
    return table[hits.solid].astype(np.uint8)


def _photograph(
    sensors: Sensors,
    solids: Solids,
    kinds: NDArray[np.int64],
    paint: Array,
    scene: Scene,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width = sensors.image
    inverse = np.linalg.inv(sensors.intrinsics())
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1).reshape(-1, 3)
    flat = (pixels @ inverse.T).astype(np.float32)
    table = np.concatenate([paint, [_COLOURS["road"], _COLOURS["sky"]]]).astype(np.float32)
    images, surfaces = [], []
    for pose in sensors.poses():
        rays = flat @ pose[:3, :3].T
        hits = cast(pose[:3, 3], rays, solids)
        surface = _surface(hits, kinds)
        colour = table[hits.solid] * _texture(hits, surface, scene.seed)[:, None]
        lit = 0.45 + 0.55 * np.maximum(hits.normal @ scene.light, 0)
        lit[hits.solid == SKY] = 1
        haze = np.exp(-np.minimum(hits.distance, 200) / 120)[:, None].astype(np.float32)
        colour = colour * (lit * scene.brightness)[:, None] * scene.tint
        colour = np.where(
            hits.solid[:, None] == SKY, colour, colour * haze + table[SKY] * (1 - haze)
        )
        images.append((np.clip(colour, 0, 1) * 255).round().reshape(height, width, 3))
        surfaces.append(surface.reshape(height, width))
    return np.stack(images).astype(np.uint8), np.stack(surfaces)


def _texture(hits: Hits, surface: NDArray[np.uint8], seed: int) -> Array:
    """Noise that sticks to surfaces: a hash of the cell in the solid's own frame."""
    strength = np.array([_TEXTURE.get(n, (0.0, 1.0))[0] for n in SURFACES], np.float32)
    fine = np.array([_TEXTURE.get(n, (0.0, 1.0))[1] for n in SURFACES], np.float32)
    cell = np.floor(hits.local * fine[surface][:, None]).astype(np.int64)
    mixed = cell @ np.array([73856093, 19349663, 83492791]) + (hits.solid + seed) * 2654435761
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    noise = ((mixed >> 8) & 0xFFFF).astype(np.float32) / 65535 - 0.5
    found: Array = 1 + 2 * strength[surface] * noise * (hits.distance < FAR)
    return found
