"""Runs of the command line that are killed at random moments, then resumed, end bit for bit alike.

One for each kind of work that is resumed: training, synthesis of pixels, labelling.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from stillhouse.teachers.asking import body_key

KILLS = 10
TRAINING: dict[str, Any] = {
    "method": "kd",
    "data": {"name": "digits", "options": {"per_class": 20, "val": 0.2}},
    "teacher": {
        "model": "stillhouse:small_cnn",
        "options": {"widths": [16, 32]},
        "train": {"epochs": 8, "batch": 32, "lr": 0.003},
    },
    "student": {"model": "stillhouse:small_cnn", "options": {"widths": [8, 16]}},
    "budget": {"epochs": 250, "batch": 32, "lr": 0.01, "select": "best"},
    "output": {"checkpoint_minutes": 0.001, "log_every": 3},
}
SYNTHESIS: dict[str, Any] = {
    "method": "datadam",
    "data": {"name": "generated", "options": {"kind": "images", "shape": [3, 8, 8], "rows": 64}},
    "student": {"model": "stillhouse:convnet", "options": {"width": 8, "depth": 2}},
    "settings": {
        "ipc": 2,
        "batch_real": 8,
        "judge_epochs": 20,
        "judge_nets": 2,
        "full_epochs": 2,
    },
    "budget": {"steps": 250},
    "output": {"checkpoint_minutes": 0.0, "log_every": 5},
}
CONCURRENCY = 4
LABELLING: dict[str, Any] = {
    "method": "llmlingua2",
    "data": {"name": "generated_prose", "options": {"texts": 240, "sentences": 3}},
    "teacher": {
        "endpoint": {
            "model": "rules",
            "concurrency": CONCURRENCY,
            "serve": {
                "rule": "stillhouse.teachers.delete_rules:compress",
                "fail": 0.3,
                "options": {"latency": 0.05, "seed": 8},
            },
        }
    },
    "student": {
        "model": "stillhouse:word-tagger",
        "options": {"width": 16, "heads": 2, "buckets": 64, "layers": 1, "length": 32},
    },
    "budget": {"steps": 60, "batch": 8, "lr": 0.01},
    "output": {"checkpoint_minutes": 0.0},
}


class Place:
    """A folder with a cache of its own in which a recipe is run, killed, and run again."""

    def __init__(self, home: Path, recipe: dict[str, Any]) -> None:
        self.home, self.folder, self.cache = home, home / "run", home / "cache"
        self.served = home / "served.jsonl"
        home.mkdir()
        if "endpoint" in recipe.get("teacher", {}):
            recipe = json.loads(json.dumps(recipe))
            recipe["teacher"]["endpoint"]["serve"]["options"]["log"] = str(self.served)
        (home / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "compare": []}))

    def start(self) -> subprocess.Popen[bytes]:
        words = ["run", str(self.home / "recipe.yaml"), "--folder", str(self.folder)]
        command = [sys.executable, "-m", "stillhouse", *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "STILLHOUSE_CACHE": str(self.cache)}
        with open(self.home / "output", "ab") as output:
            return subprocess.Popen(command, env=env, stdout=output, stderr=output)

    def finish(self) -> None:
        process = self.start()
        process.wait(timeout=600)
        assert process.returncode == 0, (self.home / "output").read_text()[-3000:]

    def state(self) -> Any:
        """What changes whenever the run has got on."""
        steps = {p for root in (self.folder, self.cache) for p in root.rglob("step-*.state")}
        return steps, self.served.stat().st_size if self.served.exists() else 0

    @property
    def finished(self) -> bool:
        return (self.folder / "run.json").exists()

    def answered(self) -> set[str]:
        """Keys, as the server counts them, of what has reached the journal."""
        found = set()
        for path in (self.cache / "journals").glob("*.jsonl"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                found.add(body_key({**json.loads(line)["request"], "model": "rules"}))
        return found

    def sent(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.served.read_text().splitlines()]


def kill_at_random(place: Place, seed: int, killed: Callable[[], None] = lambda: None) -> None:
    """SIGKILL ten times: a fourth of them anywhere from the start on, the others at work."""
    rng = random.Random(seed)
    for number in range(KILLS):
        process, before = place.start(), place.state()
        if number % 4 == 3:
            time.sleep(rng.uniform(0.0, 4.0))
        else:
            deadline = time.monotonic() + 240
            while place.state() == before and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        assert not place.finished
        killed()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [TRAINING, SYNTHESIS], ids=["training", "synthesis"])
def test_killed_ten_times_it_ends_the_same(tmp_path, recipe):
    whole, killed = Place(tmp_path / "whole", recipe), Place(tmp_path / "killed", recipe)
    whole.finish()
    kill_at_random(killed, seed=0)
    killed.finish()
    assert made(whole) == made(killed) != {}
    assert figures_of(whole) == figures_of(killed)
    log = (killed.folder / "log.jsonl").read_text()
    assert '"event": "resumed"' in log


@pytest.mark.slow
def test_killed_ten_times_while_labelling_nothing_is_lost_or_asked_again(tmp_path):
    whole, killed = Place(tmp_path / "whole", LABELLING), Place(tmp_path / "killed", LABELLING)
    whole.finish()
    marks: list[tuple[int, set[str]]] = []

    def note() -> None:
        time.sleep(0.5)  # the server ends with its parent
        marks.append((len(killed.sent()) if killed.served.exists() else 0, killed.answered()))

    kill_at_random(killed, seed=1, killed=note)
    killed.finish()
    assert made(whole) == made(killed) != {}
    assert figures_of(whole) == figures_of(killed)
    labels = [(p.folder / "artifact" / "attachments" / "labels") for p in (whole, killed)]
    texts = [sorted(f.read_bytes() for f in folder.rglob("*.jsonl")) for folder in labels]
    assert texts[0] == texts[1] != []
    sent = killed.sent()
    good = [entry["key"] for entry in sent if entry.get("fault") is None and entry["status"] == 200]
    assert set(good) == {e["key"] for e in whole.sent()}, "a request was lost"
    assert len(sent) - len(good) > 0.2 * len(sent), "the server did not fail"
    for lines, answered in marks:
        again = {entry["key"] for entry in sent[lines:]} & answered
        assert not again, "a request whose answer was written was sent again"
    assert len(good) - len(set(good)) <= CONCURRENCY * KILLS


def made(place: Place) -> dict[str, bytes]:
    """The tensors of an artifact, byte for byte."""
    files = sorted((place.folder / "artifact").rglob("*.safetensors"))
    return {
        f"{file.name}/{name}": value.numpy().tobytes()
        for file in files
        for name, value in load_file(file).items()
    }


def figures_of(place: Place) -> dict[str, float]:
    """Figures that are a function of the recipe, without times and memory."""
    found = json.loads((place.folder / "side.json").read_text())["figures"]
    measured = ("second", "peak", "memory", "_mb", "_ms")
    return {k: v for k, v in found.items() if not any(word in k for word in measured)}


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tmp_path):
    longer = {**TRAINING, "budget": {**TRAINING["budget"], "epochs": 4000}}
    longer["teacher"] = {**TRAINING["teacher"], "train": {"epochs": 2, "batch": 32, "lr": 0.003}}
    place = Place(tmp_path / "a", longer)
    process = place.start()
    deadline = time.monotonic() + 240
    while not list(place.folder.glob("stages/student/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    output = (place.home / "output").read_text()
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command" in output
    assert "Traceback" not in output
    # The rest of a run that long is not waited for: it goes on where it was.
    again = place.start()
    before = place.state()
    while place.state() == before and again.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    again.send_signal(signal.SIGTERM)
    again.wait(timeout=120)
    assert '"event": "resumed"' in (place.folder / "log.jsonl").read_text()
