"""E4, ours: live, then with stores; a writing epoch is the capture and one epoch from it."""

import json
import os
import tempfile
import time
from pathlib import Path

from e4_case import ALPHA, BATCH, CLASSES, EPOCHS, RATE, TEMPERATURE, Epochs, data, pair, tell

import stillhouse as still
from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views
from stillhouse.stages.capture import Captured

teacher, student = pair()
x, y = data()
stamps = Epochs()


class Asked:
    """Processor seconds of each capture, and the seconds that it waited for the disk."""

    def __init__(self) -> None:
        self.seconds, self.waited = [], 0.0
        self.sync, self.capture = os.fsync, Captured._capture
        os.fsync = self._fsync
        Captured._capture = lambda captured, *given: self._capture(captured, *given)

    def _fsync(self, handle: int) -> None:
        began = time.perf_counter() - time.process_time()
        self.sync(handle)
        self.waited += time.perf_counter() - time.process_time() - began

    def _capture(self, captured: Captured, *given: object) -> None:
        began, self.waited = time.process_time(), 0.0
        self.capture(captured, *given)
        self.seconds.append(time.process_time() - began + self.waited)


asked = Asked()


class Timed(TensorSource):
    """Notes when each batch is read."""

    def read(self, rows, views: Views | None) -> Batch:
        """As its base does."""
        stamps()
        return super().read(rows, views)


def run(folder: Path, store: dict | None, epochs: int = EPOCHS) -> list[float]:
    """Seconds of the epochs of one training."""
    stamps.times = []
    still.distill(
        teacher,
        student,
        Timed({"x": x, "target": y}),
        test=TensorSource({"x": x[:64], "target": y[:64]}),
        method="kd",
        classes=CLASSES,
        settings={"alpha": ALPHA, "temperature": TEMPERATURE},
        store=store,
        compare=[],
        folder=folder,
        batch=BATCH,
        epochs=epochs,
        lr=RATE,
        optimizer="sgd",
        weight_decay=0.0,
        schedule="constant",
    )
    return stamps.seconds(epochs)


def stored(home: Path, dtype: str) -> dict[str, float]:
    """Epochs and bytes of a training from a store of numbers of this kind.

    The capture is the quickest of three, as the epochs are.
    """
    cached, asked.seconds = [], []
    for number in range(3):
        place = home / f"{dtype}-{number}"
        store = {"path": str(place / "store"), "dtype": dtype, "batch": 128}
        epochs = run(place, store, 1 if number else EPOCHS)
        cached = cached or epochs
    lines = map(json.loads, (place / "log.jsonl").read_text().splitlines())
    capture = next(line for line in lines if line["event"] == "capture")
    files = [p for p in (home / f"{dtype}-0" / "store").rglob("*") if p.is_file()]
    return {
        "writing": min(asked.seconds) + min(cached),
        "cached": min(cached),
        "bytes": capture["bytes_per_record"],
        "files": len(files),
    }


with tempfile.TemporaryDirectory() as place:
    home = Path(place)
    live = min(run(home / "live", None))  # first: it warms up
    half, whole = stored(home, "float16"), stored(home, "int8")
    tell(live=live, **half, **{f"{name}, int8": value for name, value in whole.items()})
