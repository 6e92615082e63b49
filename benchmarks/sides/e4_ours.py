"""E4, ours: live, then with stores; a writing epoch is the capture and one epoch from it."""

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


def run(folder: Path, store: dict | None) -> list[float]:
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


def stored(home: Path, dtype: str) -> dict[str, float]:
    """Epochs and bytes of a training from a store of numbers of this kind."""
    cached = run(home / dtype, {"path": str(home / "store" / dtype), "dtype": dtype, "batch": 256})
    lines = map(json.loads, (home / dtype / "log.jsonl").read_text().splitlines())
    capture = next(line for line in lines if line["event"] == "capture")
    files = [p for p in (home / "store" / dtype).rglob("*") if p.is_file()]
    return {
        "writing": capture["seconds"] + min(cached),
        "cached": min(cached),
        "bytes": capture["bytes_per_record"],
        "files": len(files),
    }


with tempfile.TemporaryDirectory() as place:
    home = Path(place)
    half, whole = stored(home, "float16"), stored(home, "int8")
    tell(
        live=min(run(home / "live", None)),
        **half,
        **{f"{name}, int8": value for name, value in whole.items()},
    )
