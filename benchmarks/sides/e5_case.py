"""What both sides of E5 and E10 read: sentences of STS-B, the real teacher, where things lie."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from stillhouse.batch import TensorSource
from stillhouse.data import open_data
from stillhouse.models.loading import find_folder

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCES, WIDTH, LENGTH = 3072, 384, 128
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def sources() -> tuple[TensorSource, TensorSource]:
    """Sentences to learn from; sides of the test pairs."""
    splits = open_data("stsb", options={"sentences": SENTENCES}).judging()
    return splits["train"], splits["test"]


def encoder() -> str:
    """The teacher's folder, made by `make models`."""
    found = find_folder(ENCODER)
    if found is None:
        raise SystemExit(f"{ENCODER} is not on this machine: run `make models`")
    return str(found)


def spearman(vectors: torch.Tensor, test: TensorSource) -> float:
    """Of the cosines of the test pairs with their scores."""
    from stillhouse.metrics.similarity import PairSimilarity

    metric = PairSimilarity()
    metric.update({"embedding": vectors}, test.views)
    return metric.compute()["spearman"]


def size(folder: Path, pattern: str) -> int:
    """Bytes of the files of that name."""
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def tell(**figures: object) -> None:
    """The side's last line."""
    print(json.dumps(figures))
