"""E5, ours: the teacher's vectors captured into a store; the same in float16 and int8; reading.

Argument: the folder, which keeps what the students of E10 read.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from e5_case import LENGTH, WIDTH, encoder, size, sources, spearman, tell

import stillhouse as still
from stillhouse.engine.records import Field
from stillhouse.engine.store import Store
from stillhouse.models.sentence_embedder import SentenceEmbedder

home = Path(sys.argv[1])
shutil.rmtree(home, ignore_errors=True)
train, test = sources()
teacher = SentenceEmbedder(encoder(), length=LENGTH).eval()


class Tiny(torch.nn.Module):
    """A student that costs nothing: what is measured is the capture."""

    reads = "text"

    def __init__(self) -> None:
        super().__init__()
        self.vector = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, texts):
        """The same vector for every text."""
        return torch.ones(len(texts), 1) * self.vector


def captured(name: str, source) -> float:
    """Seconds of the stage that asks the teacher about every row of a source."""
    still.distill(
        teacher,
        Tiny(),
        source,
        test=test,
        method="embedding-l2",
        store={"path": str(home / name / "float32"), "dtype": "float32", "batch": 512},
        compare=[],
        folder=home / f"run-{name}",
        steps=1,
        batch=64,
        progress=False,
    )
    lines = (home / f"run-{name}" / "log.jsonl").read_text().splitlines()
    capture = next(e for e in map(json.loads, lines) if e["event"] == "capture")
    return float(capture["seconds"])


def written(name: str, dtype: str) -> Store:
    """What a capture in another dtype would have written: the same values by the same door."""
    whole = Store.open(home / name / "float32")
    head = whole.header
    vectors = whole.read(whole.ids)[0]
    with Store.create(
        home / name / dtype,
        [Field("embedding", (WIDTH,), dtype=dtype)],
        whole.ids,
        teacher=head.teacher,
        data=head.data,
        preprocessing=head.preprocessing,
        edition=head.edition,
    ) as store:
        store.write(whole.ids, vectors)
    return Store.open(home / name / dtype)


seconds = captured("train", train)
captured("test", test)
figures = {"capture": seconds}
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
for dtype in ("float32", "float16", "int8"):
    store = Store.open(home / "train" / dtype) if dtype == "float32" else written("train", dtype)
    figures[f"{dtype} bytes"] = size(home / "train" / dtype, "*") / len(store)
    judged = Store.open(home / "test" / dtype) if dtype == "float32" else written("test", dtype)
    figures[f"{dtype} spearman"] = spearman(judged.read(judged.ids)[0]["embedding"], test)
    for _ in range(2):
        began = time.perf_counter()
        for rows in order.split(64):
            store.read(rows)[0]["embedding"].sum()
        figures[f"{dtype} read"] = time.perf_counter() - began
tell(**figures)
