"""Two processes reproduce one, within the conditions that are stated for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BODY = Path(__file__).parent / "process_body.py"


def run(folder: Path, processes: int) -> None:
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(BODY), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run(folder / "one", 1)
    run(folder / "two", 2)
    return folder


@pytest.mark.parametrize("kind", ["flat-sum", "flat-project", "ddp-sum", "fsdp-sum"])
def test_two_processes_equal_one(trained, kind):
    one = load_file(trained / "one" / kind / "end.safetensors")
    two = load_file(trained / "two" / kind / "end.safetensors")
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key


def test_in_double_precision_their_gradients_are_summed_in_it(trained):
    one = load_file(trained / "one" / "flat-float64" / "end.safetensors")
    two = load_file(trained / "two" / "flat-float64" / "end.safetensors")
    assert one["module.0.weight"].dtype == torch.float64
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=1e-13), key
