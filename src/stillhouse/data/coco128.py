"""coco128: 128 + 128 real COCO photographs with the boxes of 80 classes, to check formats on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.batch import Splits
from stillhouse.data.box_files import BoxOptions, Listing, box_splits
from stillhouse.data.cached import content_hash
from stillhouse.data.coco_json import image_size
from stillhouse.data.data_set import DataSet
from stillhouse.data.roots import find_file, missing
from stillhouse.errors import DataError


class Coco128(DataSet[BoxOptions]):
    """128 images of train2017, and as test 128 of val2017, longer side 320.

    Too few to train on; for checks of readers, figures and pretrained detectors.
    """

    name = "coco128"
    title = "128 + 128 COCO photographs with boxes of 80 classes"
    tasks = ("detection",)
    licence = "annotations CC BY 4.0; images under their Flickr terms"
    source = "GitHub lightly-ai/coco128_yolo"
    files = ("coco128/coco128.npz",)
    rows = {"train": 128, "test": 128}  # noqa: RUF012
    get = "coco128.npz, annotations.json.gz and object_detection_config.yaml of the data root"

    Options = BoxOptions

    def open(self, options: BoxOptions, seed: int) -> Splits:
        """Splits "train" (train2017) and "test" (val2017)."""
        path = find_file(self.files)
        if path is None:
            raise missing(self.name, self.files, get=self.get)
        try:
            names = category_names(path.parent / "object_detection_config.yaml")
            with gzip.open(path.parent / "annotations.json.gz") as held:
                marks = json.load(held)
            with np.load(path, allow_pickle=False) as stored:
                listings = {
                    role: _listing(stored, official, marks[official]["boxes_yolo"])
                    for role, official in (("train", "train2017"), ("test", "val2017"))
                }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is damaged or of another form: {error}") from error
        edition = self.edition_of(content_hash(path), "coco128, longer side 320")
        return box_splits(self, listings, names, options, edition=edition)


def category_names(path: Path) -> list[str]:
    """Names of the classes in a YOLO data file: `names`, a list or a mapping from numbers."""
    import yaml

    found: Any = yaml.safe_load(path.read_text(encoding="utf-8")).get("names")
    if isinstance(found, dict):
        return [str(found[key]) for key in sorted(found, key=int)]
    return [str(name) for name in found]


def _listing(stored: Any, split: str, marks: dict[str, list[list[float]]]) -> Listing:
    blob, offsets = stored[f"{split}_blob"], stored[f"{split}_off"]
    ids = [str(int(number)) for number in stored[f"{split}_ids"]]
    files = [blob[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(ids))]
    names = [f"{number:0>12}.jpg" for number in ids]
    sizes = [image_size(content, name) for content, name in zip(files, names, strict=True)]
    boxes, labels = [], []
    for number, (height, width) in zip(ids, sizes, strict=True):
        rows = torch.tensor(marks.get(number, []), dtype=torch.float32).reshape(-1, 5)
        boxes.append(from_centres(rows[:, 1:], height, width))
        labels.append(rows[:, 0].long())
    return Listing(names, files.__getitem__, boxes, labels, sizes)


def from_centres(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """YOLO's relative centre x, centre y, width, height (n, 4) to pixels of the corners."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], 1)
    return corners * corners.new_tensor([width, height, width, height])
