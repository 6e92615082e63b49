"""E4, ours: live, then with a store; the writing epoch is the capture and one epoch from it."""

import json
import tempfile
from pathlib import Path

from e4_case import ALPHA, BATCH, CLASSES, EPOCHS, RATE, TEMPERATURE, Epochs, data, pair, tell

import stillhouse as still
from stillhouse.batch import Batch, TensorSource
from stillhouse.clock import Views

teacher, student = pair()
x, y = data()
stamps = Epochs()


class Timed(TensorSource):
    """Notes when each batch is read."""

    def read(self, rows, views: Views | None) -> Batch:
        """As its base does."""
        stamps()
        return super().read(rows, views)


def run(folder: Path, store: str | None) -> list[float]:
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
        epochs=EPOCHS,
        lr=RATE,
        optimizer="sgd",
        weight_decay=0.0,
        schedule="constant",
    )
    return stamps.seconds()


with tempfile.TemporaryDirectory() as place:
    home = Path(place)
    live = run(home / "live", None)
    cached = run(home / "stored", str(home / "store"))
    lines = map(json.loads, (home / "stored" / "log.jsonl").read_text().splitlines())
    capture = next(line for line in lines if line["event"] == "capture")
    files = [p.stat().st_size for p in (home / "store").rglob("*") if p.is_file()]
    tell(
        live=min(live),
        writing=capture["seconds"] + min(cached),
        cached=min(cached),
        bytes=capture["bytes_per_record"],
        bytes_on_disk=sum(files) / len(x),
        files=len(files),
    )
