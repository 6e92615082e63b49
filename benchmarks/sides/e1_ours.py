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
from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views

step = asked()
teacher, student = pair(step)
x, y = data()
stamps = Stamps()


class Timed(TensorSource):
    """Notes when each training batch is read."""

    def read(self, rows, views: Views | None) -> Batch:
        """As its base does."""
        stamps()
        return super().read(rows, views)


with tempfile.TemporaryDirectory() as folder:
    result = still.distill(
        teacher,
        student,
        Timed({"x": x, "target": y}),
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
