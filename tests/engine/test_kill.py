"""A run that is killed with SIGKILL at random moments, then resumed, ends bit for bit the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = """
method: kd
data: {name: digits, options: {per_class: 20, val: 0.2}}
teacher:
  model: stillhouse:small_cnn
  options: {widths: [16, 32]}
  train: {epochs: 6, batch: 32, lr: 0.003}
student: {model: stillhouse:small_cnn, options: {widths: [8, 16]}}
budget: {epochs: 30, batch: 32, lr: 0.01, select: best}
compare: []
output: {checkpoint_minutes: 0.002, log_every: 3}
"""


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stillhouse", "run", str(recipe), "--folder", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def weights(folder: Path):
    return load_file(folder / "artifact" / "model.safetensors")


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-3000:]


@pytest.mark.slow
def test_killed_ten_times_it_ends_the_same(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache-a"))
    began = time.monotonic()
    finish(start(recipe, tmp_path / "whole"))
    span = time.monotonic() - began
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache-b"))
    rng, kills = random.Random(0), 0
    for _ in range(40):
        process = start(recipe, tmp_path / "killed")
        time.sleep(rng.uniform(0.5, 1.0) * span)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        if kills == 10:
            break
        if (tmp_path / "killed" / "run.json").exists():
            # Finished before ten kills: judge what there is by killing a run of its own.
            break
    finish(start(recipe, tmp_path / "killed"))
    assert kills
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all((whole[k] == killed[k]).all() for k in whole)


def test_sigterm_saves_and_leaves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("epochs: 30", "epochs: 300"))
    folder = tmp_path / "run"
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    process = start(recipe, folder)
    deadline = time.monotonic() + 240
    while not list(folder.glob("stages/student/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in {0, 1}
    assert b"run the same command" in output
    assert b"Traceback" not in output
    finish(start(recipe, folder))
    text = (folder / "log.jsonl").read_text()
    assert '"event": "resumed"' in text
