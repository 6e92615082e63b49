"""E4b: one training live and the same from a store, in turn; the argument is the case."""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from stillhouse import launch, summary
from stillhouse.engine.profile import StepProfile
from stillhouse.recipe import load_recipe
from stillhouse.stages.capture import Captured

case = sys.argv[1]
torch.set_num_threads(1)
# Processor time: on one thread, with data and store in memory, no side waits for anything else.
StepProfile._now = lambda profile: time.process_time()
# What a run says besides, of a sample's cost and of other layouts, takes longer than its steps.
summary._sizes = lambda *_: {}
summary._probes = lambda *_: {}
summary._labelling_probe = lambda *_: None
asked = []
ask = Captured._capture


def timed(captured: Captured, *given: object) -> None:
    """A capture, and the processor time it took."""
    began = time.process_time()
    ask(captured, *given)
    asked.append(time.process_time() - began)


Captured._capture = timed


def cifar(student: str) -> tuple[dict, dict]:
    """ResNet-56 teaches on augmented CIFAR-10; four draws are stored."""
    recipe = {
        "method": "kd",
        "data": {
            "name": "cifar10",
            "options": {
                "per_class": {"train": 16, "test": 1},
                "augment": "crop+flip",
                "val": 0,
            },
        },
        "teacher": {
            "model": "stillhouse:resnet56",
            "weights": "data:cifar10_resnets/resnet56.safetensors",
            "options": {
                "input_mean": [0.485, 0.456, 0.406],
                "input_std": [0.229, 0.224, 0.225],
            },
        },
        "student": {"model": f"stillhouse:{student}"},
        "budget": {"epochs": 4, "batch": 32, "lr": 0.05, "optimizer": "sgd"},
        "compare": [],
    }
    return recipe, {"draws": 4, "batch": 32}


def labelling() -> tuple[dict, dict]:
    """MobileNetV2 labels images of 224 pixels, once; a small ConvNet learns from that alone.

    What it says is not looked at here, so its weights are random.
    """
    recipe = {
        "method": "kd",
        "data": {
            "name": "cifar10",
            "options": {"per_class": {"train": 10, "test": 1}, "image_size": 224, "val": 0},
        },
        "teacher": {
            "model": "torchvision:mobilenet_v2",
            "options": {"num_classes": 10},
        },
        "student": {"model": "stillhouse:convnet", "options": {"width": 8}},
        "settings": {"alpha": 1.0},
        "budget": {"epochs": 3, "batch": 10, "lr": 0.01, "optimizer": "sgd"},
        "compare": [],
    }
    return recipe, {"batch": 10}


recipe, store = labelling() if case == "labelling" else cifar(case)
draws = store.get("draws", 1)
with tempfile.TemporaryDirectory() as folder:
    home = Path(folder)

    def run(name: str) -> dict:
        """The profile of the student's training."""
        result = launch.run(load_recipe(recipe), folder=home / name, progress=False, profiled=True)
        return result.summary["profile"][-1]

    # Twice in turn, and of each the quicker one: what else the machine does lasts for seconds.
    lives, storeds = [], []
    for turn in range(2):
        recipe["teacher"]["store"] = None
        lives.append(run(f"live-{turn}"))
        recipe["teacher"]["store"] = {**store, "path": str(home / "store")}
        storeds.append(run(f"stored-{turn}"))
    live = min(lives, key=lambda found: found["step_ms"])
    stored = min(storeds, key=lambda found: found["step_ms"])
    lines = map(json.loads, (home / "stored-0" / "log.jsonl").read_text().splitlines())
    capture = next(line for line in lines if line["event"] == "capture")
    steps = -(-capture["records"] // draws // recipe["budget"]["batch"])
    teacher = live["ms"]["teacher"]
    student = live["step_ms"] - teacher
    saved = live["step_ms"] - stored["step_ms"]
    print(
        json.dumps(
            {
                "speedup": live["step_ms"] / stored["step_ms"],
                "ceiling": live["step_ms"] / student,
                "reached": student / stored["step_ms"],
                "live_ms": live["step_ms"],
                "student_ms": student,
                "stored_ms": stored["step_ms"],
                "steps": steps,
                "records": capture["records"],
                "capture_epochs": asked[0] * 1e3 / (live["step_ms"] * steps),
                "break_even": asked[0] * 1e3 / (saved * steps),
                "reading_ms": stored["ms"]["teacher"],
                "bytes": capture["bytes_per_record"],
            }
        )
    )
