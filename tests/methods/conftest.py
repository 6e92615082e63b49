"""What tests of methods share: a training killed with SIGKILL that goes on; one process and two."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

Ends = list[dict[str, Tensor]]


@pytest.fixture
def one_and_two_processes(
    in_processes: Callable[[Path, Path, int], str], tmp_path: Path
) -> Callable[[str], Ends]:
    """`one_and_two_processes("dho")`: the ends of dho_processes.py, run in one and as two."""

    def ends(method: str) -> Ends:
        folders = {count: tmp_path / str(count) for count in (1, 2)}
        for count, folder in folders.items():
            in_processes(Path(__file__).parent / f"{method}_processes.py", folder, count)
        return [load_file(folder / "end.safetensors") for folder in folders.values()]

    return ends


@pytest.fixture
def kill_and_resume() -> Callable[..., int]:
    """See `killed`."""
    return killed


def killed(train: Callable[[], None], folder: Path, kills: int = 3) -> int:
    """Run `train` again and again, killed each time a while after a new checkpoint appears.

    Args:
        train: runs in a forked process, in this folder, and goes on from what lies there.
        folder: where its checkpoints appear.
        kills: how often it is killed; then it may end.

    Returns:
        How often it was killed before it ended.
    """
    done = 0
    for number in range(kills + 1):
        process = multiprocessing.get_context("fork").Process(target=_quiet, args=(train,))
        process.start()
        if number < kills and _grew(folder, process):
            time.sleep(0.003 * (number + 1))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                done += 1
        process.join(timeout=240)
        assert not process.is_alive()
        assert process.exitcode in {0, -signal.SIGKILL}
        if process.exitcode == 0:
            break
    return done


def _quiet(train: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    train()


def _grew(folder: Path, process: multiprocessing.Process) -> bool:
    before = {path.name for path in folder.rglob("step-*")}
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if {path.name for path in folder.rglob("step-*")} - before:
            return True
        time.sleep(0.001)
    return False
