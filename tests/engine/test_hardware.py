"""What a run computes with, and how memory is kept between its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from stillhouse.engine.hardware import has_glibc

# glibc's defaults, said aloud: it then leaves off moving them by what was freed before.
DEFAULT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
FAULTS = """
import json, resource, sys
import torch
from stillhouse.engine.hardware import Hardware
torch.set_num_threads(1)
if sys.argv[1] == "ours":
    Hardware(accelerator="cpu")

net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 24, 3), torch.nn.ReLU(), torch.nn.Conv2d(24, 24, 3), torch.nn.ReLU()
)
x = torch.ones(32, 3, 32, 32)

def forward():
    with torch.no_grad():
        for _ in range(5):
            net(x)

forward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
forward()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def faults(who: str, **more: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, who],
        env={**{k: v for k, v in os.environ.items() if "MALLOC" not in k}, **more},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout))


@pytest.mark.skipif(not has_glibc(), reason="only glibc is asked")
def test_freed_activations_are_not_faulted_in_again():
    plain = faults("plain", **DEFAULT)
    assert plain > 2000  # 11 MB in pages of 4 KB, and again in each of five forwards
    assert faults("ours") < plain / 10


@pytest.mark.skipif(not has_glibc(), reason="only glibc is asked")
def test_a_setting_of_ones_own_is_left_alone():
    assert faults("ours", **DEFAULT) > 2000
