"""A user's own images with boxes in COCO's JSON; a split may be without any boxes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.box_files import BoxOptions, Listing, box_splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import ImageFiles
from stillhouse.data.roots import locate
from stillhouse.errors import DataError, nearest


class CocoOptions(BoxOptions):
    """Options of COCO's format; paths as they stand, or below a data root."""

    images: str = Field(description="folder or zip of the training images")
    annotations: str | None = Field(
        None,
        description="JSON of the training images; none: they are unlabelled, and all in the "
        "folder are read",
    )
    val_images: str | None = Field(None, description="of the validation split; none: as images")
    val_annotations: str | None = Field(None, description="JSON of the validation split")
    test_images: str | None = Field(None, description="of the test split; none: as images")
    test_annotations: str | None = Field(None, description="JSON of the test split")
    categories: list[str] | None = Field(
        None, description="names of the classes that are kept, in this order; none: all, by id"
    )


class CocoJson(DataSet[CocoOptions]):
    """Boxes from `annotations`, names from `categories`, files from `images`.

    Boxes marked `iscrowd` are neither learned nor counted. Boxes without area are left out.
    """

    name = "coco-json"
    title = "your own images with boxes, in COCO's JSON"
    tasks = ("detection",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = CocoOptions

    def open(self, options: CocoOptions, seed: int) -> Splits:
        """The splits that are given; unlabelled training images have empty lists of boxes."""
        tables = {
            role: _table(given, f"{prefix}annotations")
            for role, prefix, given in (
                ("train", "", options.annotations),
                ("val", "val_", options.val_annotations),
                ("test", "test_", options.test_annotations),
            )
            if given is not None
        }
        if not tables:
            raise DataError(
                "data option 'annotations': coco-json needs the JSON of one split at least, for "
                "the names of the classes (val_annotations or test_annotations will do)"
            )
        numbers, names = _categories(tables, options.categories)
        folders = {
            "train": options.images,
            "val": options.val_images or options.images,
            "test": options.test_images or options.images,
        }
        listings = {
            role: _listing(_files(folders[role], role), table, numbers, role)
            for role, table in tables.items()
        }
        if "train" not in listings:
            named = {name for own in listings.values() for name in own.names}
            listings["train"] = _unlabelled(_files(options.images, "train"), named)
        return box_splits(self, listings, names, options, edition=Path(options.images).name)


def _files(place: str, role: str) -> ImageFiles:
    option = "images" if role == "train" else f"{role}_images"
    return ImageFiles.find(locate(place, option=option, folder=not place.lower().endswith(".zip")))


def _table(given: str, option: str) -> dict[str, Any]:
    path = locate(given, option=option)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data option '{option}': {path} is no JSON: {error}") from error
    lacking = [key for key in ("images", "annotations", "categories") if key not in table]
    if not isinstance(table, dict) or lacking:
        raise DataError(
            f"data option '{option}': {path} is not COCO's detection format: it has no "
            f"{', '.join(lacking)}"
        )
    return table


def _categories(
    tables: Mapping[str, Mapping[str, Any]], wanted: Sequence[str] | None
) -> tuple[dict[int, int], list[str]]:
    """Category ids to class numbers, and the names of the classes."""
    known: dict[int, str] = {}
    for role, table in tables.items():
        for entry in table["categories"]:
            number, name = int(entry["id"]), str(entry["name"])
            if known.setdefault(number, name) != name:
                raise DataError(
                    f"coco-json: category {number} is '{known[number]}' in one split and "
                    f"'{name}' in {role}"
                )
    names = [known[number] for number in sorted(known)] if wanted is None else list(wanted)
    for name in names:
        if name not in known.values():
            raise DataError(
                f"data option 'categories': there is no '{name}'{nearest(name, known.values())}"
            )
    place = {name: row for row, name in enumerate(names)}
    return {number: place[name] for number, name in known.items() if name in place}, names


def _listing(
    files: ImageFiles, table: Mapping[str, Any], numbers: Mapping[int, int], role: str
) -> Listing:
    by_name = _by_name(files)
    rows: dict[int, int] = {}
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    places: list[str] = []
    for entry in table["images"]:
        name = str(entry["file_name"])
        place = by_name.get(name) or by_name.get(Path(name).name)
        if place is None:
            raise DataError(
                f"coco-json, {role}: the image '{name}' is not in {files.place}"
                f"{nearest(Path(name).name, by_name)}"
            )
        rows[int(entry["id"])] = len(names)
        names.append(name)
        places.append(place)
        sizes.append((int(entry["height"]), int(entry["width"])))
    boxes: list[list[list[float]]] = [[] for _ in names]
    labels: list[list[int]] = [[] for _ in names]
    crowds: list[list[bool]] = [[] for _ in names]
    for entry in table["annotations"]:
        row = rows.get(int(entry["image_id"]))
        if row is None:
            raise DataError(
                f"coco-json, {role}: annotation {entry.get('id')} is of image "
                f"{entry['image_id']}, which 'images' does not list"
            )
        label = numbers.get(int(entry["category_id"]))
        left, top, width, height = (float(v) for v in entry["bbox"])
        if label is None or width <= 0 or height <= 0:
            continue
        boxes[row].append([left, top, left + width, top + height])
        labels[row].append(label)
        crowds[row].append(bool(entry.get("iscrowd", 0)))
    crowd = [torch.tensor(own, dtype=torch.bool) for own in crowds]
    return Listing(
        names,
        lambda index: files.content(places[index]),
        [torch.tensor(own, dtype=torch.float32).reshape(-1, 4) for own in boxes],
        [torch.tensor(own, dtype=torch.int64) for own in labels],
        sizes,
        ignored=crowd,
        crowd=crowd,
    )


def _unlabelled(files: ImageFiles, labelled: set[str]) -> Listing:
    """All images of a folder but those that a labelled split names."""
    names = [n for n in files.names if n not in labelled and Path(n).name not in labelled]
    if not names:
        raise DataError(f"coco-json: every image of {files.place} belongs to val or test")
    return listing_without_boxes(files, names)


def listing_without_boxes(files: ImageFiles, names: list[str]) -> Listing:
    """Images of which nothing is known."""
    none = torch.zeros(0, dtype=torch.bool)
    return Listing(
        names,
        lambda index: files.content(names[index]),
        [torch.zeros(0, 4) for _ in names],
        [torch.zeros(0, dtype=torch.int64) for _ in names],
        [image_size(files.content(name), name) for name in names],
        ignored=[none for _ in names],
        crowd=[none for _ in names],
    )


def image_size(content: bytes, name: str) -> tuple[int, int]:
    """Height and width of an encoded image, from its header."""
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from None


def _by_name(files: ImageFiles) -> dict[str, str]:
    """Paths in the folder, and last parts of paths, to paths."""
    return {Path(name).name: name for name in files.names} | {name: name for name in files.names}
