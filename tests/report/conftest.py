from __future__ import annotations

import base64
import io
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image


def png(width: int = 96, height: int = 32) -> bytes:
    """A PNG with a gradient."""
    rows = np.linspace(0, 255, width, dtype=np.uint8)
    image = np.stack([np.tile(rows, (height, 1))] * 3, -1)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def summary(seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """A `run.json` with every part."""

    def side(base: float, seconds: float) -> dict[str, Any]:
        return {
            str(s): {
                "accuracy": base + 0.004 * ((s * 5) % 3),
                "macro_f1": base - 0.01,
                "ece": 0.03,
                "seconds": seconds + s,
                "peak_mb": 500.0,
            }
            for s in range(seeds)
        }

    matrix = [[40, 1, 0], [2, 37, 3], [0, 0, 41]]
    bins = [
        {"low": i / 10, "high": (i + 1) / 10, "count": 5 + 9 * i, "confidence": i / 10 + 0.06,
         "accuracy": min(1.0, i / 10 + 0.1)}
        for i in range(3, 10)
    ]  # fmt: skip
    found: dict[str, Any] = {
        "schema": 1,
        "method": "kd",
        "title": "Distilling the Knowledge in a Neural Network",
        "task": "classification",
        "metric": "accuracy",
        "higher_is_better": True,
        "data": {"name": "digits", "edition": "digits (scikit-learn)", "hash": "4f2a9c"},
        "seed": 0,
        "seeds": list(range(seeds)),
        "versions": {"stillhouse": "0.1.0", "torch": "2.14.1"},
        "hardware": "cpu, 2 threads; direct",
        "date": "2030-01-02T10:20:30+00:00",
        "seconds": 74.2,
        "peak_mb": 612.5,
        "teacher_share": 0.62,
        "store_saving": 0.58,
        "stages": [
            {"name": "teacher", "kind": "train", "seconds": 31.0, "steps": 460},
            {"name": "student", "kind": "train", "seconds": 12.5, "steps": 460,
             "teacher_seconds": 7.4, "loop_seconds": 11.9},
            {"name": "judge", "kind": "judge", "seconds": 0.2},
        ],
        "sides": {
            "distilled": side(0.951, 43.5),
            "alone": side(0.932, 5.1),
            "teacher": {"0": {"accuracy": 0.983, "macro_f1": 0.982, "ece": 0.01}},
        },
        "sizes": {
            "teacher": {"parameters": 1_240_330, "bytes": 4_961_320, "macs": 21_400_000,
                        "latency_ms": {"1": {"p50": 1.31, "p95": 1.62},
                                       "32": {"p50": 12.2, "p95": 13.9}}, "throughput": 2622.0},
            "student": {"parameters": 61_706, "bytes": 246_824, "macs": 902_000,
                        "latency_ms": {"1": {"p50": 0.212, "p95": 0.25},
                                       "32": {"p50": 1.1, "p95": 1.4}}, "throughput": 29090.0},
        },
        "details": {
            "confusion": {"labels": ["zero", "one", "two"], "matrix": matrix},
            "calibration": {"bins": bins, "ece": 0.031, "nll": 0.21, "brier": 0.08},
            "agreement": {"agreement": 0.957, "teacher_kl": 0.081},
            "images": [{"title": "low, ours, true",
                        "png_base64": base64.b64encode(png()).decode()}],
            "tables": [{"title": "Heads", "columns": ["head", "cosine"],
                        "rows": [["main", -0.11], ["auxiliary", 0.5]]}],
            "texts": [{"title": "A compressed prompt", "text": "distil the knowledge"}],
        },
    }  # fmt: skip
    found.update(changes)
    return found


def log_lines(steps: int = 460, every: int = 20) -> list[dict[str, Any]]:
    """A log of a teacher's and a student's training."""
    lines: list[dict[str, Any]] = [{"event": "run", "method": "kd", "time": 0.0}]
    for stage, terms in (("teacher", ("task",)), ("student", ("task", "logits"))):
        lines.append({"event": "stage", "stage": stage, "kind": "train", "state": "begin"})
        for step in range(every, steps + 1, every):
            value = 2.3 * math.exp(-step / 120) + 0.08
            found = {term: value / (n + 1) for n, term in enumerate(terms)}
            lines.append(
                {"event": "step", "stage": stage, "step": step, "epoch": step // 46,
                 "time": float(step), "terms": found, "loss": sum(found.values()),
                 "lr": 0.05 * (1 + math.cos(math.pi * step / steps)) / 2,
                 "notes": {"gradient_cosine": math.sin(step / 40)}}
            )  # fmt: skip
            if step % 100 == 0:
                scores = {"accuracy": 0.95 - math.exp(-step / 90), "nll": value}
                lines.append(
                    {"event": "validation", "stage": stage, "step": step, "scores": scores}
                )
        lines.append(
            {"event": "stage", "stage": stage, "kind": "train", "state": "end", "seconds": 12.5}
        )
    lines.append({"event": "warning", "text": "BatchNorm under several processes"})
    return lines


RECIPE = {
    "method": "kd",
    "task": "classification",
    "data": {"name": "digits", "options": {}},
    "teacher": {"model": "stillhouse:small_cnn_teacher", "train": {"epochs": 20}},
    "student": {"model": "stillhouse:small_cnn", "options": {"width": 8}},
    "settings": {"temperature": 4.0, "alpha": 0.9},
    "budget": {"epochs": 10, "batch": 32, "optimizer": "sgd", "lr": 0.05, "schedule": "cosine",
               "select": "last"},
    "seed": 0,
    "seeds": 3,
}  # fmt: skip


class Folder:
    """Writes run folders, whole or lacking."""

    png = staticmethod(png)
    summary = staticmethod(summary)
    log_lines = staticmethod(log_lines)
    recipe = RECIPE

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root

    def __call__(
        self,
        name: str = "run",
        *,
        run: dict[str, Any] | None = None,
        log: list[dict[str, Any]] | str | None = None,
        recipe: dict[str, Any] | str | None = None,
        alone: bool = False,
    ) -> pathlib.Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        if run is not None:
            (folder / "run.json").write_text(json.dumps(run))
        if log is not None:
            text = log if isinstance(log, str) else "".join(json.dumps(e) + "\n" for e in log)
            (folder / "log.jsonl").write_text(text)
        if recipe is not None:
            text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
            (folder / "recipe.yaml").write_text(text)
        if alone:
            side = folder / "sides" / "supervised" / "seed-0"
            side.mkdir(parents=True)
            lines = [
                {"event": "validation", "stage": "student", "step": step,
                 "scores": {"accuracy": 0.9 - math.exp(-step / 90)}}
                for step in range(100, 461, 100)
            ]  # fmt: skip
            (side / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
        return folder


@pytest.fixture
def run_folder(tmp_path: pathlib.Path) -> Folder:
    return Folder(tmp_path)
