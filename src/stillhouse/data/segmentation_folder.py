"""A user's own images and label maps in folders: VOC, Cityscapes, ADE20K and the like."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Generator, Tensor

from stillhouse.batch import Batch, Sample, Source, Splits
from stillhouse.clock import Views, generator, seed_of
from stillhouse.data.augment_scenes import AugmentScenes
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import SUFFIXES, decode_image
from stillhouse.data.label_maps import (
    SceneOptions,
    about_scenes,
    check_label_maps,
    resized_images,
    resized_labels,
    translated,
)
from stillhouse.data.roots import locate
from stillhouse.errors import DataError, RecipeError, nearest
from stillhouse.losses.spatial import IGNORE

# What the usual pretrained networks were trained with (ImageNet).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_ROLES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_IMAGES = ("images", "JPEGImages", "leftImg8bit", "img", "img_dir")
_MASKS = ("masks", "labels", "annotations", "SegmentationClass", "gtFine", "ann_dir")
_LISTS = "ImageSets/Segmentation"
_TEST = 0.2
_CHECKED = 200  # label maps that are read before training


class SegmentationFolderOptions(SceneOptions):
    """Options of folders of images and label maps."""

    path: str = Field(description="where the data is: as it stands, or below a data root")
    image_size: list[int] | None = Field(
        default_factory=lambda: [256, 256],
        description="[height, width] that images and label maps are brought to",
    )
    classes: list[str] | str = Field(
        "classes.txt",
        description="names of the classes in the order of their numbers, or a text file of them, "
        "one a line, as it stands or below path",
    )
    images: str | None = Field(
        None, description=f"folder of the images below path; none: {', '.join(_IMAGES)}"
    )
    masks: str | None = Field(
        None, description=f"folder of the label maps below path; none: {', '.join(_MASKS)}"
    )
    image_suffix: str = Field(
        "", description="end of an image's name before its extension, such as _leftImg8bit"
    )
    mask_suffix: str = Field(
        "", description="end of a label map's name before its extension, such as _gtFine_labelIds"
    )
    label_map: dict[int, int | str] = Field(
        default_factory=dict,
        description="value in the files to class number or name; values that are not named are "
        "ignored. None: values are class numbers",
    )
    ignore: list[int] = Field(
        default_factory=lambda: [255], description="values in the files that count for nothing"
    )
    test: int | float | None = Field(
        None,
        description="images (integer) or share (below 1) held out for the test by a fixed seed; "
        "only where the data has no test split of its own, and a fifth when not said",
    )

    @field_validator("test")
    @classmethod
    def _test_is_count_or_share(cls, value: int | float | None) -> int | float | None:
        if value is not None and (value <= 0 or (isinstance(value, float) and value >= 1)):
            raise ValueError("a count of images (integer >= 1) or a share in (0, 1)")
        return value

    @field_validator("image_size")
    @classmethod
    def _needs_a_size(cls, value: list[int] | None) -> list[int] | None:
        if value is None:
            raise ValueError("[height, width]: images of a folder may differ in size")
        return value


class SegmentationFolder(DataSet[SegmentationFolderOptions]):
    """Images and indexed label maps of one name, in the layouts that are in use.

    - VOC: `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png`, and lists of names in
      `ImageSets/Segmentation/{train,val,test}.txt`.
    - by split outside: `{train,val,test}/{images,masks}/...`.
    - by split inside: `{images,masks}/{train,val,test}/...` (Cityscapes, ADE20K).
    - without splits: `{images,masks}/...`; a part is held out.

    A label map is a PNG whose values (palette indices or grey levels) are classes. Files are
    decoded when they are read. A content id is a hash of the image's name.
    """

    name = "segmentation_folder"
    title = "your own images and label maps (VOC, Cityscapes, ADE20K layouts)"
    tasks = ("segmentation",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = SegmentationFolderOptions

    def open(self, options: SegmentationFolderOptions, seed: int) -> Splits:
        """The splits there are; "test" is held out of train where there is none."""
        root = locate(options.path, option="path", folder=True)
        classes = _class_names(options.classes, root)
        pairs = _with_test(_pairs(root, options), options.test, root)
        table = _table(options, classes)
        assert options.image_size is not None
        sources: dict[str, Source] = {}
        for role, found in pairs.items():
            source = SceneFiles(
                found,
                size=options.image_size,
                table=table,
                augment=options.augmentation() if role == "train" else None,
            )
            source.check(len(classes), f"{root}, {role}")
            sources[role] = source
        about = {
            "name": self.name,
            "licence": self.licence,
            "source": str(root),
            **about_scenes(classes, options.image_size, MEAN, STD, options.class_weights),
        }
        return Splits(sources, f"{root.name} (segmentation folder)", about)


@dataclass(frozen=True)
class Pair:
    """An image and its label map.

    Attributes:
        name: what both are called.
        image: its file.
        labels: its label map's file.
    """

    name: str
    image: Path
    labels: Path


class SceneFiles:
    """Pairs decoded when they are read: "x" (3, H, W) in [0, 1] and "target" (H, W) int16.

    Args:
        pairs: the files.
        size: [height, width].
        table: (256,) int16, the class of each value in the files.
        augment: of reads with chance.

    Attributes:
        ids: (N,) int64, a hash of each name.
        fingerprint: of names, sizes and times of the files, and how they are read.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        size: Sequence[int],
        table: Tensor,
        augment: AugmentScenes | None = None,
    ) -> None:
        self.pairs, self.size, self.table, self.augment = list(pairs), list(size), table, augment
        self.ids = torch.tensor([seed_of("scene", pair.name) for pair in self.pairs])
        digest = hashlib.sha256(repr((self.size, table.tolist(), repr(augment))).encode())
        for pair in self.pairs:
            for file in (pair.image, pair.labels):
                stat = file.stat()
                digest.update(f"{pair.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
        self.fingerprint = digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.pairs)

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        return int(self.ids[index])

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """One pair; augmented by the generator where there is one."""
        views = None
        if self.augment is not None and item[1] is not None:
            views = Views(int(torch.randint(0, 1 << 31, (), generator=item[1])))
        return {k: v[0] for k, v in self.read(torch.tensor([int(item[0])]), views).items()}

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The pairs at positions `rows`; augmented unless `views` is None.

        Raises:
            DataError: a file cannot be read, or two of one name differ in size.
        """
        images, labels = zip(*(self._decoded(i) for i in rows.tolist()), strict=True)
        batch = Batch(id=self.ids[rows], x=torch.cat(images), target=torch.cat(labels))
        if self.augment is not None and views is not None:
            batch = self.augment(batch, views)
        if batch["x"].dtype == torch.uint8:
            batch["x"] = batch["x"].float().div_(255.0)
        return batch

    def _decoded(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        pixels = decode_image(pair.image, str(pair.image))
        values = decode_labels(pair.labels)
        if pixels.shape[:2] != values.shape:
            raise DataError(
                f"{pair.image} is {pixels.shape[0]}x{pixels.shape[1]}, its label map {pair.labels} "
                f"{values.shape[0]}x{values.shape[1]}; they must be of one size"
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        labels = translated(resized_labels(torch.from_numpy(values)[None], self.size), self.table)
        return resized_images(image, self.size), labels

    def check(self, classes: int, where: str) -> None:
        """Read label maps before any training: all, or a fixed sample of many.

        Raises:
            DataError: a value that is no class, and what would make it one.
        """
        rows = torch.arange(len(self))
        if len(rows) > _CHECKED:
            rows = torch.randperm(len(rows), generator=generator("scenes"))[:_CHECKED]
        learnable = False
        for row in rows.tolist():
            pair = self.pairs[row]
            maps = translated(torch.from_numpy(decode_labels(pair.labels))[None], self.table)
            if bool((maps != IGNORE).any()):
                learnable = True
                told = "; name values in label_map, or those that do not count in ignore"
                try:
                    check_label_maps(maps, classes, str(pair.labels))
                except DataError as error:
                    raise DataError(f"{error}{told}") from None
        if not learnable:
            raise DataError(f"{where}: every pixel is ignored; see label_map and ignore")


def decode_labels(path: Path) -> NDArray[np.uint8]:
    """A label map (H, W) as its values stand in the file: palette indices or grey levels.

    Raises:
        DataError: no image, or a colour image, whose classes cannot be told.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in {"P", "L", "1", "I", "I;16"}:
                raise DataError(
                    f"{path} is a colour image ({image.mode}); a label map is an indexed or grey "
                    "PNG whose values are class numbers"
                )
            values = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a label map: {error}") from error
    if values.max(initial=0) > 255:
        raise DataError(f"{path} holds the value {int(values.max())}; at most 255 is read")
    return values.astype(np.uint8)


# ---- which files belong together ---------------------------------------------------------


def _pairs(root: Path, options: SegmentationFolderOptions) -> dict[str, list[Pair]]:
    lists = root / _LISTS
    if lists.is_dir():
        images, masks = _folder(root, options, "images"), _folder(root, options, "masks")
        found = {}
        for file in sorted(lists.glob("*.txt")):
            if file.stem in _ROLES:
                names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
                found[_ROLES[file.stem]] = _matched(images, masks, options, names, str(file))
        if found:
            return _with_train(found, root)
    outside = {_ROLES[p.name.lower()]: p for p in _folders(root) if p.name.lower() in _ROLES}
    if outside:
        return _with_train(
            {
                role: _matched(
                    _folder(place, options, "images"), _folder(place, options, "masks"), options
                )
                for role, place in outside.items()
            },
            root,
        )
    images, masks = _folder(root, options, "images"), _folder(root, options, "masks")
    inside = {_ROLES[p.name.lower()]: p for p in _folders(images) if p.name.lower() in _ROLES}
    if not inside:
        return {"train": _matched(images, masks, options)}
    return _with_train(
        {
            role: _matched(place, masks / place.name, options)
            for role, place in inside.items()
            # Cityscapes and ADE20K publish test images without labels.
            if (masks / place.name).is_dir()
        },
        root,
    )


def _folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _folder(place: Path, options: SegmentationFolderOptions, what: str) -> Path:
    named: str | None = getattr(options, what)
    tried = (named,) if named is not None else (_IMAGES if what == "images" else _MASKS)
    for name in tried:
        if (place / name).is_dir():
            return place / name
    beside = [p.name for p in _folders(place)]
    hint = nearest(str(tried[0]), beside) if beside else ""
    raise DataError(
        f"{place} has no folder of {what} ({', '.join(tried)}){hint}; name it with the data option "
        f"'{what}'"
    )


def _stems(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of a folder by their name below it, without extension and suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem.endswith(suffix):
                found[stem.removesuffix(suffix)] = path
    return found


def _matched(
    images: Path,
    masks: Path,
    options: SegmentationFolderOptions,
    names: Sequence[str] | None = None,
    lister: str = "",
) -> list[Pair]:
    if not masks.is_dir():
        raise DataError(f"there is no folder of label maps {masks}")
    seen, known = _stems(images, options.image_suffix), _stems(masks, options.mask_suffix)
    wanted = sorted(seen) if names is None else list(names)
    if not wanted:
        raise DataError(f"{lister or images} names no image ({', '.join(SUFFIXES)})")
    for name in wanted:
        for folder, files, what in ((images, seen, "image"), (masks, known, "label map")):
            if name not in files:
                hint = nearest(name, files) if files else ""
                raise DataError(f"{folder} has no {what} '{name}'{hint}")
    return [Pair(name, seen[name], known[name]) for name in wanted]


def _with_train(found: dict[str, list[Pair]], root: Path) -> dict[str, list[Pair]]:
    if "train" not in found:
        raise DataError(f"{root} has {', '.join(sorted(found)) or 'no split'} but no 'train'")
    return found


def _with_test(
    pairs: dict[str, list[Pair]], share: int | float | None, root: Path
) -> dict[str, list[Pair]]:
    if "test" in pairs:
        if share is not None:
            raise RecipeError(f"data option 'test': {root} has a test split; leave 'test' out")
        return pairs
    train = pairs["train"]
    share = _TEST if share is None else share
    count = round(len(train) * share) if isinstance(share, float) else share
    if not 0 < count < len(train):
        raise DataError(
            f"data option 'test': cannot hold out {count} of {len(train)} images of {root}"
        )
    order = torch.randperm(len(train), generator=generator("scenes", "test")).tolist()
    held = set(order[:count])
    return {
        **pairs,
        "train": [pair for row, pair in enumerate(train) if row not in held],
        "test": [train[row] for row in sorted(held)],
    }


# ---- what the values mean ------------------------------------------------------------------


def _class_names(given: list[str] | str, root: Path) -> list[str]:
    names = given
    if isinstance(given, str):
        tried = [root / given, Path(given).expanduser()]
        file = next((path for path in tried if path.is_file()), None)
        if file is None:
            raise DataError(
                f"data option 'classes': there is no file {given} (tried "
                f"{', '.join(map(str, tried))}); name them in the recipe, or one a line there"
            )
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
    if len(names) < 2 or len(names) > IGNORE:
        raise DataError(
            f"data option 'classes': 2 to {IGNORE} classes are needed, got {len(names)}"
        )
    return list(names)


def _table(options: SegmentationFolderOptions, classes: Sequence[str]) -> Tensor:
    """(256,) int16: the class of each value; 255 for what is ignored."""
    if not options.label_map:
        table = torch.arange(256, dtype=torch.int16)
    else:
        table = torch.full((256,), IGNORE, dtype=torch.int16)
        for value, target in _numbers(options.label_map, classes).items():
            table[value] = target
    for value in options.ignore:
        if not 0 <= value <= 255:
            raise RecipeError(f"data option 'ignore': values are 0 to 255, not {value}")
        table[value] = IGNORE
    return table


def _numbers(label_map: Mapping[int, int | str], classes: Sequence[str]) -> dict[int, int]:
    found: dict[int, int] = {}
    for value, target in label_map.items():
        number: Any = target
        if isinstance(target, str):
            if target not in classes:
                raise RecipeError(
                    f"data option 'label_map': no class is called '{target}'"
                    f"{nearest(target, classes)}"
                )
            number = classes.index(target)
        if not 0 <= value <= 255 or not 0 <= number < len(classes):
            raise RecipeError(
                f"data option 'label_map': {value}: {target} does not fit; values are 0 to 255, "
                f"classes 0 to {len(classes) - 1}"
            )
        found[value] = number
    return found
