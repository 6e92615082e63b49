"""A user's own torch Dataset or DataLoader as a source of the house."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stillhouse.batch import Sample, Source, Splits
from stillhouse.errors import DataError

_TARGETS = ("target", "label", "labels", "y")
_VIEWS = ("x", "image", "pixel_values", "input", "input_ids")


class DatasetSource:
    """A map-style dataset; samples are (x, target) pairs or mappings.

    Random transforms of the dataset draw from torch's global generator; it is seeded per
    sample here, so that a resumed run and any number of workers see the same augmentation.

    Args:
        dataset: with `__getitem__` and `__len__`.
        name: for reports.

    Raises:
        DataError: iterable-style or empty.
    """

    def __init__(self, dataset: Dataset[Any], name: str = "own data") -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{type(dataset).__name__} has no __getitem__: a map-style dataset is needed, so "
                "that an interrupted run can go on at the same sample"
            )
        if not isinstance(dataset, Sized) or len(dataset) == 0:
            raise DataError(f"the data set {type(dataset).__name__} is empty or has no length")
        self.dataset = dataset
        self.name = name

    @property
    def fingerprint(self) -> str:
        """Of the type, the length and a few samples: a user's dataset has no other identity."""
        digest = hashlib.sha256(f"{type(self.dataset).__qualname__}:{len(self)}".encode())
        for index in {0, len(self) // 2, len(self) - 1}:
            for value in self[index, Generator().manual_seed(0)].values():
                if isinstance(value, Tensor):
                    digest.update(
                        value.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                    )
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        index, rng = item
        with torch.random.fork_rng(devices=[]):
            seed = 0 if rng is None else int(torch.randint(0, 1 << 31, (), generator=rng))
            torch.manual_seed(seed)
            return as_sample(self.dataset[index])


def as_sample(value: Any) -> Sample:
    """A dataset's item as a sample with "x" and "target".

    Raises:
        DataError: neither a mapping nor a tuple.
    """
    if isinstance(value, Mapping):
        sample = {str(k): _tensor(v) for k, v in value.items()}
        for names, key in ((_TARGETS, "target"), (_VIEWS, "x")):
            found = next((n for n in names if n in sample), None)
            if found is not None and key not in sample:
                sample[key] = sample.pop(found)
        return sample
    if isinstance(value, (tuple, list)) and value:
        sample = {"x": _tensor(value[0])}
        if len(value) > 1:
            sample["target"] = _tensor(value[1])
        return sample
    if isinstance(value, Tensor):
        return {"x": value}
    raise DataError(
        f"the data set gives {type(value).__name__}; (x, target) or a mapping is needed"
    )


def _tensor(value: Any) -> Any:
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        return torch.as_tensor(value.__array__())
    return value


def as_source(data: Any, name: str) -> Source:
    """A source from a source, a dataset, or a DataLoader's dataset."""
    if isinstance(data, DataLoader):
        return DatasetSource(data.dataset, name)
    if isinstance(data, Dataset):
        return DatasetSource(data, name)
    if hasattr(data, "fingerprint") and hasattr(data, "__getitem__"):
        found: Source = data
        return found
    return DatasetSource(data, name)


def splits_of(
    train: Any, val: Any | None, test: Any | None, classes: list[str] | int | None
) -> Splits:
    """Splits from a user's own data; without a test part the validation part is judged on.

    Args:
        train: DataLoader, Dataset or Source; or a graph (PyTorch Geometric's `Data`), or Splits,
            that bring their own val and test.
        val: likewise, or None.
        test: likewise, or None.
        classes: names or number; counted from the training targets when not given.

    Raises:
        DataError: neither val nor test, so that nothing could be judged.
    """
    if isinstance(train, Splits):
        return train
    if hasattr(train, "edge_index"):
        from stillhouse.data.node_splits import splits_of_graph

        return splits_of_graph(train, classes=classes)
    sources = {"train": as_source(train, "train")}
    if val is not None:
        sources["val"] = as_source(val, "val")
    if test is not None:
        sources["test"] = as_source(test, "test")
    if len(sources) == 1:
        raise DataError("give val or test data: without it no gain can be shown")
    sources.setdefault("test", sources["val"] if "val" in sources else sources["train"])
    sample = sources["train"][0, None]
    about: dict[str, Any] = {}
    # Data without labels has no classes; a task that wants them says so.
    if classes is None and _is_label(sample.get("target")):
        classes = _count_classes(sources["train"])
    if classes is not None:
        names = range(classes) if isinstance(classes, int) else classes
        about["classes"] = [str(c) for c in names]
    if isinstance(sample.get("x"), Tensor):
        about["input"] = list(sample["x"].shape)
    return Splits(sources, "own data", about)


def _is_label(target: Any) -> bool:
    value = torch.as_tensor(target) if isinstance(target, (int, Tensor)) else None
    return value is not None and value.ndim == 0 and not value.is_floating_point()


def _count_classes(source: Source) -> int:
    top = -1
    for index in range(len(source)):
        target = source[index, None].get("target")
        if target is None:
            raise DataError("the training data has no target; give (x, target) samples")
        top = max(top, int(target))
    return top + 1
