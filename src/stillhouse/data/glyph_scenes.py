"""Glyph scenes: real scanned digits on real photographs, with exact boxes and masks.

Objects are scikit-learn's digits, enlarged, tinted and pasted; grounds are crops of photographs,
those embedded in scikit-learn or a folder of your own. The same options give the same scenes on
every machine, whatever the run's seed. Weather, blur and night make other domains of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor
from torch.nn import functional as F

from stillhouse.batch import Splits
from stillhouse.clock import generator
from stillhouse.data.box_source import BoxSource
from stillhouse.data.cached import cached_tensors, tensors_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.digits import embedded_table
from stillhouse.data.image_files import ImageFiles, as_tensor, decode_image
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import cache_folder, locate
from stillhouse.data.splitting import stratified
from stillhouse.errors import DataError, MissingExtra
from stillhouse.parts.corruptions import corrupted
from stillhouse.parts.strong_views import grey

INK = 0.35  # opacity from which a pixel belongs to the glyph
_EDITION = "glyph scenes 1"
_TRIES = 60
Kind = Literal["none", "fog", "blur", "night", "mixed"]


class SceneOptions(DataOptions):
    """Options of the glyph scenes."""

    train: int = Field(300, ge=1, description="training scenes")
    held_out: int = Field(60, ge=1, description="scenes of the validation split")
    test: int = Field(100, ge=1, description="test scenes, of digits and grounds of their own")
    side: int = Field(96, ge=32, le=512, description="height and width, px")
    digits: list[int] = Field(
        default_factory=lambda: list(range(10)), description="which digits occur: the classes"
    )
    novel: list[int] = Field(
        default_factory=list,
        description="digits that are there without boxes in train and val, and judged in test "
        "(open vocabulary); they come last among the classes",
    )
    objects: tuple[int, int] = Field((2, 5), description="least and most objects of a scene")
    glyph: tuple[int, int] = Field((16, 40), description="least and largest side of a glyph, px")
    touching: int = Field(
        0, ge=0, description="pairs of one class whose boxes touch, in every scene"
    )
    overlap: float = Field(
        0.1, ge=0, le=1, description="largest share of a box that another may cover"
    )
    corruption: Kind = Field("none", description="none, fog, blur, night, or mixed (one a scene)")
    strength: float = Field(1.0, ge=0, le=1.5, description="of the corruption")
    contrast: float = Field(
        0.35, ge=0, le=1, description="least difference of a glyph's brightness from its ground"
    )
    grounds: str | None = Field(
        None,
        description="folder or zip of photographs, as it stands or below a data root; none: the "
        "two embedded in scikit-learn",
    )
    part: tuple[float, float] = Field(
        (0.0, 1.0),
        description="which of the photographs, as shares of their sorted list: [0, 0.5] and "
        "[0.5, 1] give two domains with grounds of their own (of the embedded two: one each)",
    )
    instances: bool = Field(False, description="give maps of instances too (view 'instances')")
    sizes: tuple[float, float] = Field(
        (14.0, 22.0), description="where small ends and large begins, px: roots of box areas"
    )
    scene_seed: int = Field(0, description="another draw of all scenes; not the run's seed")

    @field_validator("digits", "novel")
    @classmethod
    def _digits(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value) or any(not 0 <= digit <= 9 for digit in value):
            raise ValueError("different digits from 0 to 9")
        return value

    @field_validator("objects", "glyph", "part", "sizes")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1] or value[0] < 0:
            raise ValueError("the smaller number first, none below 0")
        return value


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: (3, S, S) float in [0, 1].
        boxes: (n, 4) float, tight around the ink of each whole glyph.
        labels: (n,) int64, the digits.
        instances: (S, S) uint8: 0, or 1 + the glyph that is seen there.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    instances: Tensor


class GlyphScenes(DataSet[SceneOptions]):
    """Scenes with several classes for detection, open vocabularies and instances."""

    name = "glyph-scenes"
    title = "real scanned digits on real photographs, with exact boxes, clean or under weather"
    tasks = ("detection",)
    licence = "digits CC BY 4.0 (UCI); photographs of scikit-learn CC BY 2.0, or your own"
    source = "scikit-learn load_digits and sample images; composed on opening"
    edition = "composed, fixed scenes"

    Options = SceneOptions

    def open(self, options: SceneOptions, seed: int) -> Splits:
        """Compose the scenes of each split, or read them from the cache."""
        base = [d for d in options.digits if d not in options.novel]
        classes = base + list(options.novel)
        if not base:
            raise DataError("data option 'novel': every digit is novel, none has a box in train")
        if options.part[0] >= options.part[1]:
            raise DataError(f"data option 'part': {list(options.part)} holds no photograph")
        counts = {"train": options.train, "val": options.held_out, "test": options.test}
        sources = {
            role: self._source(options, role, count, base, classes)
            for role, count in counts.items()
        }
        about = {
            "categories": [str(d) for d in classes],
            "novel": [str(d) for d in options.novel],
            "sizes": list(options.sizes),
            "input": (3, options.side, options.side),
        }
        edition = f"glyph scenes, {options.corruption}, {options.side} px"
        return Splits(sources, edition, about)

    def _source(
        self, options: SceneOptions, role: str, count: int, base: list[int], classes: list[int]
    ) -> BoxSource:
        said = options.model_dump(mode="json", exclude={"train", "held_out", "test", "val",
                                                        "instances", "sizes"})  # fmt: skip
        key = repr((_EDITION, role, count, sorted(said.items()), _ground_stamp(options)))
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        path = cache_folder("glyph_scenes") / f"{name}.safetensors"
        held = cached_tensors(path, lambda: _composed(options, role, count, classes))
        sizes = held["counts"].tolist()
        number = torch.full((10,), -1, dtype=torch.int64)
        number[torch.tensor(classes)] = torch.arange(len(classes))
        boxes = list(torch.split(held["boxes"], sizes))
        labels = [number[own] for own in torch.split(held["labels"], sizes)]
        instances = held["instances"] if options.instances else None
        if options.novel and role != "test":
            seen = [own < len(base) for own in labels]
            boxes = [b[k] for b, k in zip(boxes, seen, strict=True)]
            labels = [t[k] for t, k in zip(labels, seen, strict=True)]
        return BoxSource(
            held["images"],
            boxes,
            labels,
            instances=instances,
            names=[f"{role}-{i:05d}" for i in range(count)],
            content=tensors_hash(held),
            categories=len(classes),
            name=f"glyph scenes {role}",
        )


def _composed(
    options: SceneOptions, role: str, count: int, classes: Sequence[int]
) -> dict[str, Tensor]:
    """All scenes of a split as tensors of fixed form."""
    glyphs, digits = _glyphs(role, classes)
    grounds = _grounds(options, role)
    scenes = [
        compose(
            options,
            glyphs,
            digits,
            grounds,
            generator("glyph scene", options.scene_seed, role, number),
        )
        for number in range(count)
    ]
    return {
        "images": torch.stack([_bytes(s.image) for s in scenes]),
        "boxes": torch.cat([s.boxes for s in scenes]),
        "labels": torch.cat([s.labels for s in scenes]),
        "counts": torch.tensor([len(s.boxes) for s in scenes]),
        "instances": torch.stack([s.instances for s in scenes]),
    }


def compose(
    options: SceneOptions,
    glyphs: Tensor,
    digits: Tensor,
    grounds: Sequence[Tensor],
    rng: Generator,
) -> Scene:
    """One scene by a generator.

    Args:
        options: of the data.
        glyphs: (G, 8, 8) opacities in [0, 1].
        digits: (G,) what they are.
        grounds: photographs (3, H, W) in [0, 1].
        rng: the chance.
    """
    side = options.side
    image = _ground(grounds, side, rng)
    instances = torch.zeros(side, side, dtype=torch.uint8)
    boxes: list[list[float]] = []
    labels: list[int] = []
    wanted = _whole(rng, *options.objects)

    def paste(ink: Tensor, top: int, left: int, box: list[float], digit: int) -> None:
        nonlocal image
        image = _tinted(image, ink, top, left, options.contrast, rng)
        spot = instances[top : top + ink.shape[0], left : left + ink.shape[1]]
        boxes.append(box)
        labels.append(digit)
        spot[ink >= INK] = len(boxes)

    for _ in range(options.touching):
        made = _pair(options, glyphs, digits, boxes, rng)
        for piece in made or ():
            paste(*piece)
    for _ in range(max(0, wanted - 2 * options.touching)):
        one = _single(options, glyphs, digits, boxes, rng)
        if one is not None:
            paste(*one)
    image = corrupted(image, options.corruption, rng, strength=options.strength)
    return Scene(
        image,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        instances,
    )


Piece = tuple[Tensor, int, int, list[float], int]


def _single(
    options: SceneOptions,
    glyphs: Tensor,
    digits: Tensor,
    taken: Sequence[Sequence[float]],
    rng: Generator,
) -> Piece | None:
    """A glyph at a free place; None where none is found."""
    ink, box, digit = _glyph(options, glyphs, digits, rng)
    for _ in range(_TRIES):
        top, left = (_whole(rng, 0, options.side - length) for length in ink.shape)
        moved = _moved(box, top, left)
        if not _covers(moved, taken, options.overlap):
            return ink, top, left, moved, digit
    return None


def _pair(
    options: SceneOptions,
    glyphs: Tensor,
    digits: Tensor,
    taken: Sequence[Sequence[float]],
    rng: Generator,
) -> list[Piece] | None:
    """Two glyphs of one class side by side, the right box beginning where the left one ends."""
    ink, box, digit = _glyph(options, glyphs, digits, rng)
    own = (digits == digit).nonzero()[:, 0]
    other = int(own[_whole(rng, 0, len(own) - 1)])
    second, beside = _enlarged(glyphs[other], ink.shape[0])
    for _ in range(_TRIES):
        top = _whole(rng, 0, options.side - ink.shape[0])
        left = _whole(rng, 0, options.side - 2 * ink.shape[0])
        first = _moved(box, top, left)
        shift = int(first[2] - beside[0])
        lower = min(max(top + _whole(rng, -2, 2), 0), options.side - second.shape[0])
        if not 0 <= shift <= options.side - second.shape[1]:
            continue
        next_to = _moved(beside, lower, shift)
        if _covers(first, taken, options.overlap) or _covers(next_to, taken, options.overlap):
            continue
        return [(ink, top, left, first, digit), (second, lower, shift, next_to, digit)]
    return None


def _glyph(
    options: SceneOptions, glyphs: Tensor, digits: Tensor, rng: Generator
) -> tuple[Tensor, list[float], int]:
    """A drawn class, then a drawn glyph of it, at a drawn size: ink, its box, the digit."""
    classes = torch.unique(digits)
    digit = int(classes[_whole(rng, 0, len(classes) - 1)])
    own = (digits == digit).nonzero()[:, 0]
    row = int(own[_whole(rng, 0, len(own) - 1)])
    ink, box = _enlarged(glyphs[row], _whole(rng, *options.glyph))
    return ink, box, digit


def _enlarged(glyph: Tensor, side: int) -> tuple[Tensor, list[float]]:
    """(8, 8) opacities at (side, side), and the tight box around the ink."""
    large = F.interpolate(glyph[None, None], size=(side, side), mode="bicubic")[0, 0]
    ink = large.clamp(0.0, 1.0)
    rows, columns = (ink >= INK).nonzero(as_tuple=True)
    if len(rows) == 0:
        rows, columns = (ink >= ink.max()).nonzero(as_tuple=True)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return ink, [float(v) for v in box]


def _moved(box: Sequence[float], top: int, left: int) -> list[float]:
    return [box[0] + left, box[1] + top, box[2] + left, box[3] + top]


def _covers(box: Sequence[float], taken: Sequence[Sequence[float]], most: float) -> bool:
    """Whether a box and one of those that are there share more than `most` of either."""
    for other in taken:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        if wide > 0 and high > 0:
            smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
            if wide * high > most * smaller:
                return True
    return False


def _tinted(
    image: Tensor, ink: Tensor, top: int, left: int, contrast: float, rng: Generator
) -> Tensor:
    """The image with a glyph in a random tint that stands out from its ground."""
    height, width = ink.shape
    made = image.clone()
    spot = made[:, top : top + height, left : left + width]
    ground = float(grey(spot).mean())
    room = (ground - contrast, 1.0 - ground - contrast)  # below, above
    darker = room[0] > 0 and (room[1] <= 0 or float(torch.rand((), generator=rng)) < 0.5)
    share = float(torch.rand((), generator=rng))
    low, high = (0.0, max(room[0], 0.0)) if darker else (min(ground + contrast, 1.0), 1.0)
    brightness = low + share * (high - low)
    tint = (torch.rand(3, generator=rng) - 0.5) * 0.3
    colour = (brightness + tint - tint.mean()).clamp(0.0, 1.0)
    made[:, top : top + height, left : left + width] = (
        spot * (1 - ink) + colour[:, None, None] * ink
    )
    return made


def _ground(grounds: Sequence[Tensor], side: int, rng: Generator) -> Tensor:
    """A crop of a photograph, at a drawn scale, mirrored or not."""
    photograph = grounds[_whole(rng, 0, len(grounds) - 1)]
    span = min(_whole(rng, side, 2 * side), *photograph.shape[-2:])
    top, left = (_whole(rng, 0, length - span) for length in photograph.shape[-2:])
    crop = photograph[:, top : top + span, left : left + span]
    if float(torch.rand((), generator=rng)) < 0.5:
        crop = crop.flip(-1)
    if span == side:
        return crop.clone()
    crop = F.interpolate(crop[None], size=(side, side), mode="bilinear", antialias=True)[0]
    return crop.clamp(0.0, 1.0)


def _glyphs(role: str, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Opacities and digits of a role: test has scans that train and val never show."""
    table = embedded_table()
    ink = torch.from_numpy(table[:, :-1].reshape(-1, 8, 8) / 16.0).float()
    digits = torch.from_numpy(table[:, -1].astype(np.int64))
    order = stratified(digits, 540, generator("glyph scenes", "digits"))
    held = torch.zeros(len(digits), dtype=torch.bool)
    held[order] = True  # 360 for test, 180 for val, class by class
    val = torch.zeros(len(digits), dtype=torch.bool)
    val[order[stratified(digits[order], 180, generator("glyph scenes", "val digits"))]] = True
    chosen = {"train": ~held, "val": val, "test": held & ~val}[role]
    chosen = chosen & torch.isin(digits, torch.tensor(list(classes)))
    return ink[chosen], digits[chosen]


def _grounds(options: SceneOptions, role: str) -> list[Tensor]:
    """Photographs of a role; with ten or more, every fifth is kept for test."""
    files = _ground_files(options)
    first, last = (round(share * len(files)) for share in options.part)
    own = files[first:last] or files[min(first, len(files) - 1) :][:1]
    if len(own) >= 10:
        own = [f for i, f in enumerate(own) if (i % 5 == 4) == (role == "test")]
    photographs = [as_tensor(decode_image(content, name)) for name, content in own]
    return [_at_least(photograph, options.side) for photograph in photographs]


def _at_least(photograph: Tensor, side: int) -> Tensor:
    """A photograph enlarged where a crop would not fit into it."""
    shortest = min(photograph.shape[-2:])
    if shortest >= side:
        return photograph
    size = [-(-length * side // shortest) for length in photograph.shape[-2:]]
    return F.interpolate(photograph[None], size=size, mode="bilinear")[0]


def _ground_files(options: SceneOptions) -> list[tuple[str, bytes]]:
    if options.grounds is None:
        return [(path.name, path.read_bytes()) for path in _embedded_photographs()]
    return list(ImageFiles.find(_place(options.grounds)).read())


def _ground_stamp(options: SceneOptions) -> str:
    if options.grounds is None:
        return "embedded"
    return ImageFiles.find(_place(options.grounds)).stamp()


def _place(given: str) -> Path:
    """A zip or a folder, as it stands or below a data root."""
    return locate(given, option="grounds", folder=not given.lower().endswith(".zip"))


def _embedded_photographs() -> list[Path]:
    """china.jpg and flower.jpg, read without importing scikit-learn, which takes seconds."""
    package = find_spec("sklearn")
    folders = package.submodule_search_locations if package is not None else None
    for folder in folders or ():
        found = sorted((Path(folder) / "datasets" / "images").glob("*.jpg"))
        if found:
            return found
    raise MissingExtra("scikit-learn", "images", "for the embedded digits and photographs")


def _bytes(image: Tensor) -> Tensor:
    return (image * 255.0).round().clamp(0, 255).to(torch.uint8)


def _whole(rng: Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(torch.randint(low, max(low, high) + 1, (), generator=rng))
