"""Penn-Fudan pedestrians: 170 photographs with boxes and instance masks; ONE class."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.batch import Splits
from stillhouse.data.box_files import BoxOptions, Listing, box_splits
from stillhouse.data.cached import content_hash
from stillhouse.data.coco_json import image_size
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_files import Pixels
from stillhouse.data.roots import find_file, missing
from stillhouse.errors import DataError

_TEST = 50


class PennFudan(DataSet[BoxOptions]):
    """The last 50 images are test, as is usual; boxes follow from the masks.

    With one class a detector's distribution over objects is always peaked, so whatever filters by
    class (LPLD's peak) is void here.
    """

    name = "penn-fudan"
    title = "170 photographs of pedestrians with boxes and masks (one class)"
    tasks = ("detection",)
    licence = "none stated; for research (University of Pennsylvania and Fudan, 2007)"
    source = "https://www.cis.upenn.edu/~jshi/ped_html/ (copy: GitHub ell-hosse/TinyDETR-PennFudan)"
    files = ("penn_fudan/penn_fudan.npz",)
    rows = {"train": 120, "test": 50}  # noqa: RUF012
    get = (
        "an npz of img_blob, img_off (JPEG bytes one after another and where each begins), "
        "mask_blob, mask_off (PNG, 0 background, 1..k instances) and names"
    )

    Options = BoxOptions

    def open(self, options: BoxOptions, seed: int) -> Splits:
        """Decode the masks to boxes; photographs are decoded when they are read."""
        path = find_file(self.files)
        if path is None:
            raise missing(self.name, self.files, get=self.get)
        try:
            with np.load(path, allow_pickle=False) as held:
                blobs = {key: held[key] for key in held.files}
            images, masks = (_Blob(blobs[f"{k}_blob"], blobs[f"{k}_off"]) for k in ("img", "mask"))
            names = [str(name) for name in blobs["names"]]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is damaged or of another form: {error}") from error
        whole = _listing(images, masks, names)
        last = len(names) - _TEST
        listings = {
            "train": whole.take(range(last)),
            "test": whole.take(range(last, len(names))),
        }
        edition = self.edition_of(content_hash(path), "Penn-Fudan, longer side 384")
        return box_splits(self, listings, ["person"], options, edition=edition)


class _Blob:
    """Files one after another in one array of bytes."""

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.blob, self.offsets = blob, offsets

    def __call__(self, index: int) -> bytes:
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.blob[start:stop].tobytes()


def _listing(images: _Blob, masks: _Blob, names: list[str]) -> Listing:
    maps = [_plain(masks(i)) for i in range(len(names))]
    boxes, held = [], []
    for mask in maps:
        own, kept = boxes_of(mask)
        boxes.append(own)
        held.append(kept)
    return Listing(
        names,
        images,
        boxes,
        [torch.zeros(len(own), dtype=torch.int64) for own in boxes],
        [image_size(images(i), names[i]) for i in range(len(names))],
        instances=lambda index: held[index],
    )


def boxes_of(mask: Pixels) -> tuple[torch.Tensor, Pixels]:
    """Tight boxes of the instances of a map (H, W), and the map renumbered from 1."""
    boxes, numbered = [], np.zeros_like(mask)
    for value in np.unique(mask[mask > 0]).tolist():
        rows, columns = np.nonzero(mask == value)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        numbered[mask == value] = len(boxes)
    return torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4)), numbered


def _plain(content: bytes) -> Pixels:
    """A PNG of numbers as it is, not as colours."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image, dtype=np.uint8)
