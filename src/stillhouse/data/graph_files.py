"""A user's own graph: edges, features and labels in files of their own, or in one npz."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Splits
from stillhouse.data.cached import content_hash
from stillhouse.data.data_set import DataSet
from stillhouse.data.node_splits import Setting, node_splits, random_parts, row_normalised
from stillhouse.data.options import DataOptions
from stillhouse.data.roots import search_path
from stillhouse.errors import DataError
from stillhouse.metrics.classification import IGNORE
from stillhouse.parts.graph import Graph, tidy_edges
from stillhouse.parts.sparse import SparseMatrix

_SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".txt")
_ROLES = ("train", "val", "test")
_NAMES = {
    "edges": ("edges", "edge_index"),
    "features": ("features", "x"),
    "labels": ("labels", "y"),
}


class GraphOptions(DataOptions):
    """Options of a user's own graph."""

    path: str = Field(
        description="a folder with edges, features, labels and, where there is a split, split.json "
        "(.npy, .csv, .tsv or .txt; features also as scipy's .npz), or one .npz with these arrays"
    )
    setting: Setting = Field(
        "transductive",
        description="transductive: all nodes and edges are seen in training; inductive: a share "
        "of the test nodes is not, and is what is judged",
    )
    hidden: float = Field(
        0.2, gt=0, lt=1, description="share of the test nodes that the inductive setting hides"
    )
    keep_rest: bool = Field(
        True, description="in the inductive setting, nodes of no split are seen too"
    )
    normalise: bool = Field(False, description="divide each node's features by their sum")
    undirected: bool = Field(True, description="give every edge both directions")
    per_class: int = Field(
        20, ge=1, description="training nodes of a class, where no split is given"
    )
    val_nodes: int = Field(500, ge=1, description="validation nodes, likewise")
    test_nodes: int = Field(1000, ge=1, description="test nodes, likewise")
    split_seed: int = Field(0, description="of the drawn split; not the run's seed")


class GraphFiles(DataSet[GraphOptions]):
    """A graph in files.

    `edges` has two columns of node numbers from 0; `features` a row of numbers per node; `labels`
    a class per node, a number or a name, empty or -1 where unknown. `split.json` holds lists of
    node numbers "train", "val", "test". In one .npz the arrays are called so too (or edge_index,
    x, y; train_mask, val_mask, test_mask).
    """

    name = "graph"
    title = "your own graph: edges, features and labels in files"
    tasks = ("node-classification",)
    licence = "the user's"
    source = "the user's"
    edition = "as given"

    Options = GraphOptions

    def open(self, options: GraphOptions, seed: int) -> Splits:
        """The splits that are given, else drawn: some nodes of every class for training."""
        path = _place(options.path)
        arrays = _arrays(path)
        for name in _NAMES:
            if name not in arrays:
                raise DataError(
                    f"{path} has no {name}: looked for {' or '.join(_NAMES[name])} as "
                    + ("an array" if path.is_file() else ", ".join(_SUFFIXES))
                )
        features = _features(arrays["features"], path)
        labels, classes = _labels(arrays["labels"], len(features), path)
        edges = _edges(arrays["edges"], len(features), options.undirected, path)
        parts = _given_parts(arrays, len(features), path)
        if parts is None:
            parts = random_parts(
                labels,
                per_class=options.per_class,
                val=options.val_nodes,
                test=options.test_nodes,
                seed=options.split_seed,
            )
        if options.normalise:
            features = row_normalised(features)
        return node_splits(
            Graph(features, edges),
            labels,
            *parts,
            classes=classes,
            setting=options.setting,
            hidden=options.hidden,
            keep_rest=options.keep_rest,
            seed=seed,
            name=path.stem,
            edition=f"{path.stem} (as given)",
            about={
                "name": self.name,
                "hash": _hash(path),
                "source": str(path),
                "normalise": options.normalise,
            },
        )


def read_graph(path: Path) -> Graph | None:
    """The graph in a folder or an npz; None where there are no edges."""
    if not path.is_dir() and path.suffix.lower() != ".npz":
        return None
    arrays = _arrays(path)
    if "edges" not in arrays or "features" not in arrays:
        return None
    features = _features(arrays["features"], path)
    return Graph(features, _edges(arrays["edges"], len(features), True, path))


def read_features(path: Path) -> Tensor | SparseMatrix:
    """Rows of features in a file.

    Raises:
        DataError: no such form, or no numbers.
    """
    return _features(_read(path), path)


def _place(given: str) -> Path:
    path = Path(given).expanduser()
    tried = [path] if path.is_absolute() else [path, *(root / path for root in search_path())]
    for place in tried:
        if place.exists():
            return place
    raise DataError(f"data option 'path': there is no {given} (tried {', '.join(map(str, tried))})")


def _arrays(path: Path) -> dict[str, Any]:
    """What is found, by the names of `_NAMES`, "split" and masks."""
    found: dict[str, Any] = {}
    if path.is_file():
        held = _npz(path)
        if not isinstance(held, dict):
            return {"features": held}
        for name, known in _NAMES.items():
            there = [key for key in known if key in held]
            if there:
                found[name] = held[there[0]]
        found.update({k: v for k, v in held.items() if k in _ROLES or k.endswith("_mask")})
        return found
    for name, known in _NAMES.items():
        for stem in known:
            for suffix in _SUFFIXES:
                if name not in found and (path / f"{stem}{suffix}").is_file():
                    found[name] = _read(path / f"{stem}{suffix}", names=name == "labels")
    if (path / "split.json").is_file():
        try:
            found.update(json.loads((path / "split.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path / 'split.json'} is no JSON object: {error}") from error
    return found


def _read(path: Path, *, names: bool = False) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if suffix == ".npz":
            return _npz(path)
        if suffix in {".csv", ".tsv", ".txt"}:
            lines = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip() or names
            ]
            if names:
                return np.array([line.strip() for line in lines])
            cells = [line.replace(",", " ").split() for line in lines if not line.startswith("#")]
            return np.array([[float(cell) for cell in row] for row in cells])
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as rows of numbers: {error}") from error
    raise DataError(f"{path} is none of {', '.join(_SUFFIXES)}")


def _npz(path: Path) -> Any:
    """The arrays of an npz by name; of one that scipy wrote, the sparse matrix."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            held = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as arrays of numbers: {error}") from error
    if {"format", "shape", "data"} <= held.keys():
        from scipy.sparse import load_npz

        try:
            return load_npz(path).tocsr()
        except (OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"{path} is a damaged sparse matrix: {error}") from error
    return held


def _features(value: Any, path: Path) -> Tensor | SparseMatrix:
    if hasattr(value, "tocoo"):
        entries = value.tocoo()
        return SparseMatrix.of_entries(
            torch.from_numpy(entries.row.astype(np.int64)),
            torch.from_numpy(entries.col.astype(np.int64)),
            torch.from_numpy(entries.data.astype(np.float32)),
            *value.shape,
        )
    array = np.asarray(value)
    if array.ndim != 2 or array.dtype.kind not in "iufb":
        raise DataError(
            f"{path}: features are numbers (nodes, features), not {array.dtype} {array.shape}"
        )
    return torch.from_numpy(array.astype(np.float32))


def _edges(value: Any, nodes: int, undirected: bool, path: Path) -> Tensor:
    array = np.asarray(value)
    if array.ndim == 2 and array.shape[0] != 2 and array.shape[1] == 2:
        array = array.T
    if array.ndim != 2 or array.shape[0] != 2 or not np.array_equal(array, np.round(array)):
        raise DataError(f"{path}: edges are pairs of node numbers, not {array.dtype} {array.shape}")
    edges = torch.from_numpy(array.astype(np.int64))
    if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < nodes:
        worst = int(edges.max()) if int(edges.max()) >= nodes else int(edges.min())
        raise DataError(f"{path}: an edge names node {worst}; there are {nodes}, from 0")
    return tidy_edges(edges, nodes, undirected=undirected)


def _labels(value: Any, nodes: int, path: Path) -> tuple[Tensor, list[str]]:
    array = np.asarray(value).reshape(-1)
    if len(array) != nodes:
        raise DataError(f"{path}: {len(array)} labels for {nodes} nodes")
    texts = [str(entry).strip() for entry in array.tolist()]
    numbers = [_whole(text) for text in texts]
    if all(number is not None for number in numbers):
        labels = torch.tensor([IGNORE if n is None or n < 0 else n for n in numbers])
        return labels, [str(c) for c in range(int(labels.max()) + 1)]
    names = sorted({text for text in texts if text and text != "-1"})
    place: dict[str, int] = {name: number for number, name in enumerate(names)}
    return torch.tensor([place.get(text, IGNORE) for text in texts]), names


def _whole(text: str) -> int | None:
    if not text:
        return -1
    try:
        return int(float(text)) if float(text) == int(float(text)) else None
    except (ValueError, OverflowError):
        return None


def _given_parts(
    arrays: dict[str, Any], nodes: int, path: Path
) -> tuple[Tensor, Tensor, Tensor] | None:
    parts = []
    for role in _ROLES:
        mask = arrays.get(f"{role}_mask")
        if mask is not None:
            parts.append(torch.from_numpy(np.asarray(mask).astype(bool)).nonzero()[:, 0])
        elif role in arrays:
            parts.append(_numbers(arrays[role], f"{path}, split '{role}'"))
    if not parts:
        return None
    if len(parts) < len(_ROLES):
        raise DataError(f"{path}: a split needs all of train, val and test")
    return parts[0], parts[1], parts[2]


def _numbers(value: Sequence[Any], where: str) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(value, dtype=np.int64))
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: node numbers are needed: {error}") from error


def _hash(path: Path) -> str:
    if path.is_file():
        return content_hash(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name}:{content_hash(file)}".encode())
    return digest.hexdigest()
