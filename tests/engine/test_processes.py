"""Two processes reproduce one, within the conditions that are stated for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

BODY = Path(__file__).parent / "process_body.py"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, in_processes: Callable[[Path, Path, int], str]
) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    in_processes(BODY, folder / "one", 1)
    in_processes(BODY, folder / "two", 2)
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
