"""A user's own arrays: one npz or safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Source, Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.check import check_finite, check_labels
from stillhouse.data.data_set import DataSet
from stillhouse.data.image_arrays import ImageSource, array_of, augment_of, moments, open_npz
from stillhouse.data.options import Augment, OwnOptions
from stillhouse.data.roots import locate
from stillhouse.data.series import channel_moments
from stillhouse.data.splitting import choose, hold_out
from stillhouse.errors import DataError, RecipeError, nearest

_ROLES = ("train", "val", "test", "unlabelled", "transfer")
_NONE = torch.empty(0)
_VIEWS = {"images": "x", "features": "x", "data": "x", "labels": "target", "y": "target"}
_BY_CLASS = (
    "classes", "per_class", "long_tail", "label_fraction", "labels_per_class", "few_shot",
    "drop_classes", "modulo",
)  # fmt: skip


class TensorOptions(OwnOptions):
    """Options of a file of arrays."""

    augment: Augment = Field(
        "none", description="of training reads of images: crop (shift), flip, or both"
    )


class Tensors(DataSet[TensorOptions]):
    """Arrays named `{split}_{view}`, such as `train_x`, `train_target`, `test_x`, `test_target`.

    Splits: train, val, test, unlabelled, transfer; names without a split mean train. `images`,
    `features` and `data` stand for the view `x`, `labels` and `y` for `target`. `x` is
    (N, C, H, W), (N, H, W, C) or (N, H, W) uint8 for images, (N, C, T) for series, else (N, D)
    floats or (N, L) whole numbers (token ids). uint8 images are read as [0, 1]; in series
    and further views (N, C, T) beside them numbers of every type are taken as they are, and are
    normalised channel by channel. `target` is (N,) whole numbers for classes; any other target is
    passed on as it is. `classes` (names) may be an array of the npz file or a JSON list in the
    metadata of the safetensors file.
    """

    name = "tensors"
    title = "your own arrays in one npz or safetensors file"
    tasks = ("classification", "image-generation", "representation")
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = TensorOptions

    def open(self, options: TensorOptions, seed: int) -> Splits:
        """The splits there are; "test" is held out of train where there is none."""
        path = locate(options.path, option="path")
        arrays, names = _read(path)
        parts = _by_split(arrays, path)
        _check(parts, path)
        classes = _class_names(parts, names, path)
        if "test" not in parts:
            _split_test(parts, options, path)
        elif options.test is not None:
            raise RecipeError(f"data option 'test': {path} has a test split; leave 'test' out")
        about: dict[str, Any] = {
            "name": self.name,
            "hash": content_hash(path),
            "licence": self.licence,
            "source": str(path),
        }
        # Without classes every row is of one kind, so that `subset` still works.
        labels = {
            role: views["target"].long() if classes and "target" in views else _zeros(views)
            for role, views in parts.items()
        }
        if not classes:
            _refuse_by_class(options, path)
        choice = choose(labels, classes or ["row"], options, name=path.name)
        sources: dict[str, Source] = {}
        for role, chosen in choice.splits.items():
            views = {key: value.index_select(0, chosen.rows) for key, value in parts[role].items()}
            if classes and "target" in views:
                views.update(chosen.views())
            augment = None
            if role == "train" and views["x"].ndim == 4:
                augment = augment_of(options.augment, views["x"].shape[-1])
            sources[role] = ImageSource(
                views, augment=augment, ids=chosen.ids, name=f"{path.name}/{role}"
            )
        first = parts["train"]["x"]
        if options.augment != "none" and first.ndim != 4:
            raise RecipeError(
                f"data option 'augment': the training data of {path} are no images but "
                f"{tuple(first.shape)}"
            )
        about["input"] = list(first.shape[1:])
        about.update(choice.about())
        if not classes:
            del about["classes"]
        if first.ndim == 4:
            about["mean"], about["std"] = moments(first)
        if first.ndim == 3:
            train = sources["train"].views  # type: ignore[attr-defined]
            # Nothing is said of a view that is no series: it is not normalised.
            about["views"] = {
                name: channel_moments(value) if _series(value) else {}
                for name, value in train.items()
            }
        return Splits(sources, f"{path.name} (own tensors)", about)


def _read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Arrays by name, and names of classes where the file has them."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix != ".npz":
        raise DataError(f"{path}: a .npz or .safetensors file is needed")
    with open_npz(path) as stored:
        found = {key: array_of(stored, key, path) for key in stored.files}
    names = [str(name) for name in found.pop("classes", np.array([]))]
    for key, value in found.items():
        if value.dtype.kind not in "biuf":
            raise DataError(f"{path}: the array '{key}' holds {value.dtype}, no numbers")
    return {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in found.items()}, names


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            told = (opened.metadata() or {}).get("classes", "[]")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a safetensors file: {error}") from error
    try:
        names = json.loads(told)
    except ValueError as error:
        raise DataError(f"{path}: 'classes' in its metadata is no JSON list: {error}") from error
    if not isinstance(names, list):
        raise DataError(f"{path}: 'classes' in its metadata is no JSON list")
    return found, [str(name) for name in names]


def _by_split(arrays: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in arrays.items():
        if value.ndim == 0:
            continue  # a remark such as an edition, not a view
        role, _, view = key.partition("_")
        if role not in _ROLES or not view:
            role, view = "train", key
        view = _VIEWS.get(view, view)
        if view in parts.setdefault(role, {}):
            raise DataError(f"{path}: '{key}' is a second array for the view '{view}' of {role}")
        parts[role][view] = _typed(value, view)
    for views in parts.values():
        if views.get("x", _NONE).ndim == 3:
            views.update({k: v.float() for k, v in views.items() if v.ndim == 3})
    for role, views in parts.items():
        if "x" not in views:
            wanted = f"{role}_x"
            raise DataError(f"{path} has no array '{wanted}'{nearest(wanted, arrays)}")
    if "train" not in parts:
        raise DataError(f"{path} has no training data{nearest('train_x', arrays)}")
    return parts


def _series(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _typed(value: Tensor, view: str) -> Tensor:
    if view == "target":
        return value.float() if value.is_floating_point() else value.long()
    if value.is_floating_point():
        value = value.float()
    elif value.dtype not in {torch.uint8, torch.bool}:
        value = value.long()
    if view != "x":
        return value
    if value.ndim == 4 and value.shape[1] not in {1, 3} and value.shape[3] in {1, 3}:
        return value.permute(0, 3, 1, 2).contiguous()
    return value[:, None] if value.ndim == 3 and value.dtype == torch.uint8 else value


def _check(parts: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    shape = tuple(parts["train"]["x"].shape[1:])
    for role, views in parts.items():
        where = f"{path}, split '{role}'"
        sizes = {key: len(value) for key, value in views.items()}
        if min(sizes.values()) == 0:
            raise DataError(f"{where}: it is empty (rows per view: {sizes})")
        if len(set(sizes.values())) > 1:
            raise DataError(f"{where}: the views differ in length: {sizes}")
        if tuple(views["x"].shape[1:]) != shape:
            raise DataError(f"{where}: x is {tuple(views['x'].shape[1:])} a row, train has {shape}")
        for key, value in views.items():
            if value.is_floating_point():
                check_finite(value, f"{where}, view '{key}'")


def _split_test(parts: dict[str, dict[str, Tensor]], options: TensorOptions, path: Path) -> None:
    whole = parts["train"]
    labels = whole.get("target")
    grouped = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
    held = hold_out(
        labels if labels is not None and grouped else _zeros(whole),
        options.test,
        seed=options.subset_seed,
        name=path.name,
    )
    parts["test"] = {key: value[held] for key, value in whole.items()}
    parts["train"] = {key: value[~held] for key, value in whole.items()}


def _class_names(
    parts: Mapping[str, Mapping[str, Tensor]], names: list[str], path: Path
) -> list[str]:
    """Names of the classes; empty where targets are no classes."""
    target = parts["train"].get("target")
    if target is None or target.ndim != 1 or target.is_floating_point():
        return []
    if not names:
        names = [str(number) for number in range(max(0, int(target.max())) + 1)]
    for role, views in parts.items():
        if "target" in views:
            where = f"{path}, split '{role}'"
            check_labels(views["target"], len(names), where, several=role == "train")
    return names


def _zeros(views: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(len(views["x"]), dtype=torch.int64)


def _refuse_by_class(options: TensorOptions, path: Path) -> None:
    for option in _BY_CLASS:
        if getattr(options, option) not in (None, []):
            raise RecipeError(f"data option '{option}': {path} has no class labels")
