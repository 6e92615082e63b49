"""E1, ours: `stillhouse.distill` with log, checkpoints, NaN guard and progress."""

import tempfile
from pathlib import Path

from e1_pair import (
    ALPHA,
    BATCH,
    CLASSES,
    MOMENTUM,
    RATE,
    STEPS,
    TEMPERATURE,
    Stamps,
    asked,
    data,
    pair,
)

import stillhouse as still
from stillhouse.batch import TensorSource

step = asked()
stamps = Stamps()
teacher, student = pair(step, stamps)
x, y = data()
with tempfile.TemporaryDirectory() as folder:
    result = still.distill(
        teacher,
        student,
        TensorSource({"x": x, "target": y}),
        test=TensorSource({"x": x[:256], "target": y[:256]}),
        method="kd",
        classes=CLASSES,
        settings={"alpha": ALPHA, "temperature": TEMPERATURE},
        compare=[],
        folder=Path(folder) / "run",
        batch=BATCH,
        steps=STEPS[step],
        lr=RATE,
        momentum=MOMENTUM,
        optimizer="sgd",
        weight_decay=0.0,
        schedule="constant",
    )
    stamps.times = stamps.times[: STEPS[step]]
    stamps.tell(lines=len((Path(folder) / "run" / "log.jsonl").read_text().splitlines()))
