"""A user's own images with boxes in Pascal VOC's XML, one file per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from pydantic import Field

from stillhouse.batch import Splits
from stillhouse.data.box_files import BoxOptions, Listing, box_splits
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import ImageFiles
from stillhouse.data.roots import locate
from stillhouse.errors import DataError, nearest

_ROLES = ("train", "val", "test")


class VocOptions(BoxOptions):
    """Options of VOC's format."""

    path: str = Field(
        description="folder with JPEGImages and Annotations, and ImageSets/Main/{train,val,test}"
        ".txt where it says which image is in which split; as it stands, or below a data root"
    )
    categories: list[str] | None = Field(
        None,
        description="names of the classes that are kept, in this order; none: all, alphabetically",
    )
    unlabelled: bool = Field(
        False, description="images of train without an XML file are kept, without boxes"
    )


class VocXml(DataSet[VocOptions]):
    """Boxes from `object/bndbox`, names from `object/name`.

    VOC counts pixels from 1 and includes the last one: (xmin, ymin, xmax, ymax) becomes
    (xmin - 1, ymin - 1, xmax, ymax). Objects marked `difficult` are neither learned nor counted.
    """

    name = "voc-xml"
    title = "your own images with boxes, in Pascal VOC's XML"
    tasks = ("detection",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = VocOptions

    def open(self, options: VocOptions, seed: int) -> Splits:
        """The splits that ImageSets names; all images are train where it names none."""
        root = locate(options.path, option="path", folder=True)
        files = ImageFiles.find(_folder(root, "JPEGImages"))
        marks = _folder(root, "Annotations")
        by_stem = {Path(name).stem: name for name in files.names}
        read = {
            stem: _read(marks / f"{stem}.xml")
            for stem in by_stem
            if (marks / f"{stem}.xml").is_file()
        }
        names = _names(read, options.categories)
        splits = _splits(root, by_stem)
        if "train" not in splits:
            named = {stem for stems in splits.values() for stem in stems}
            splits["train"] = [stem for stem in sorted(by_stem) if stem not in named]
        listings = {}
        for role, stems in splits.items():
            lacking = [stem for stem in stems if stem not in read]
            if lacking and not (role == "train" and options.unlabelled):
                raise DataError(
                    f"voc-xml, {role}: {len(lacking)} images have no XML, the first "
                    f"{marks / lacking[0]}.xml (unlabelled: true keeps such of train)"
                )
            listings[role] = _listing(files, stems, by_stem, read, names)
        return box_splits(self, listings, names, options, edition=root.name)


Marks = tuple[tuple[int, int], list[tuple[str, list[float], bool]]]


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        raise DataError(f"data option 'path': {root} has no folder {name}, as VOC's format asks")
    return folder


def _splits(root: Path, by_stem: dict[str, str]) -> dict[str, list[str]]:
    found = {}
    for role in _ROLES:
        path = root / "ImageSets" / "Main" / f"{role}.txt"
        if path.is_file():
            stems = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
            for stem in stems:
                if stem not in by_stem:
                    raise DataError(
                        f"{path} names '{stem}', of which there is no image{nearest(stem, by_stem)}"
                    )
            found[role] = stems
    return found


def _read(path: Path) -> Marks:
    """Size and objects of an XML file."""
    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        assert size is not None
        height, width = (int(float(_text(size, key))) for key in ("height", "width"))
        objects = []
        for entry in root.iter("object"):
            box = entry.find("bndbox")
            assert box is not None
            left, top, right, bottom = (
                float(_text(box, key)) for key in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = (entry.findtext("difficult") or "0").strip() == "1"
            objects.append((_text(entry, "name"), [left - 1, top - 1, right, bottom], difficult))
    except (ElementTree.ParseError, AssertionError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is not of VOC's format: {error or 'size or bndbox lacks'}"
        ) from error
    return (height, width), objects


def _text(entry: ElementTree.Element, key: str) -> str:
    found = entry.findtext(key)
    if found is None:
        raise ValueError(f"<{entry.tag}> has no <{key}>")
    return found.strip()


def _names(read: dict[str, Marks], wanted: Sequence[str] | None) -> list[str]:
    known = sorted({name for _, objects in read.values() for name, _, _ in objects})
    if wanted is None:
        if not known:
            raise DataError("voc-xml: no object in any XML, so there is no class")
        return known
    for name in wanted:
        if name not in known:
            raise DataError(f"data option 'categories': there is no '{name}'{nearest(name, known)}")
    return list(wanted)


def _listing(
    files: ImageFiles,
    stems: list[str],
    by_stem: dict[str, str],
    read: dict[str, Marks],
    names: list[str],
) -> Listing:
    from stillhouse.data.coco_json import image_size

    place = {name: row for row, name in enumerate(names)}
    boxes, labels, hard, sizes = [], [], [], []
    for stem in stems:
        size, objects = read.get(stem) or (image_size(files.content(by_stem[stem]), stem), [])
        own = [o for o in objects if o[0] in place and o[1][2] > o[1][0] and o[1][3] > o[1][1]]
        boxes.append(torch.tensor([o[1] for o in own], dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.tensor([place[o[0]] for o in own], dtype=torch.int64))
        hard.append(torch.tensor([o[2] for o in own], dtype=torch.bool))
        sizes.append(size)
    paths = [by_stem[stem] for stem in stems]
    return Listing(
        [Path(path).name for path in paths],
        lambda index: files.content(paths[index]),
        boxes,
        labels,
        sizes,
        ignored=hard,
    )
