"""E5, sentence-transformers: `dataset.map(teacher.encode)`, saved to disk as Arrow; reading.

Argument: the folder, which keeps what the students of E10 read.
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from e5_case import encoder, size, sources, spearman, tell
from sentence_transformers import SentenceTransformer

home = Path(sys.argv[1])
shutil.rmtree(home, ignore_errors=True)
train, test = sources()
teacher = SentenceTransformer(encoder(), device="cpu")


def label(rows):
    """The float32 array as `encode` gives it."""
    return {"label": teacher.encode(rows["sentence"])}


began = time.perf_counter()
plain = Dataset.from_dict({"sentence": train.views["text"]})
plain.map(label, batched=True, keep_in_memory=True).save_to_disk(str(home / "train"))
seconds = time.perf_counter() - began
kept = load_from_disk(str(home / "train"))
# The bytes of the label column alone: what the sentences take is no cost of the vectors.
kept.select_columns(["label"]).map(keep_in_memory=True).save_to_disk(str(home / "label"))
order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
for _ in range(2):
    began = time.perf_counter()
    for rows in order.split(64):
        torch.tensor(kept[rows.tolist()]["label"]).sum()
    read = time.perf_counter() - began
tell(
    capture=seconds,
    bytes=size(home / "label", "*.arrow") / len(kept),
    read=read,
    dtype=str(kept.features["label"]),
    spearman=spearman(teacher.encode(test.views["text"], convert_to_tensor=True), test),
)
