"""State files: what goes in comes out, damage is seen, a full disk loses nothing."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from stillhouse.engine.checkpoint import Rotation, pack, read_state, unpack, write_state
from stillhouse.engine.job import locked
from stillhouse.errors import CheckpointError, RunFolderError


def state():
    shared = torch.arange(6.0)
    return {
        "tensors": {
            "a": shared,
            "b": shared[:3],
            "half": torch.tensor([1.5], dtype=torch.bfloat16),
        },
        "numbers": [1, 2.5, float("inf"), 1e-320, True, None, "text"],
        3: ("pair", {"nested": []}),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
    }


def test_nested_state_round_trips():
    found = unpack(pack(state()))
    assert torch.equal(found["tensors"]["a"], torch.arange(6.0))
    assert torch.equal(found["tensors"]["b"], torch.arange(3.0))
    assert found["tensors"]["half"].dtype == torch.bfloat16
    assert found["numbers"] == state()["numbers"]
    assert [type(v) for v in found["numbers"]] == [type(v) for v in state()["numbers"]]
    assert found[3] == ("pair", {"nested": []})
    assert found["empty"].shape == (0, 4)
    assert int(found["scalar"]) == 7


def test_other_values_are_refused_with_their_place():
    with pytest.raises(CheckpointError, match=r"state\.a\[1\] is a set"):
        pack({"a": [1, {2}]})


@pytest.mark.parametrize("place", [0, 30, 90, -1])
def test_a_flipped_bit_is_seen(tmp_path, place):
    path = tmp_path / "x.state"
    write_state(path, state())
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(path)


def test_a_cut_file_is_seen(tmp_path):
    path = tmp_path / "x.state"
    write_state(path, state())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError):
        read_state(path)


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    rotation = Rotation(tmp_path)
    rotation.save(1, {"x": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*needs .* bytes.*untouched"):
        rotation.save(2, {"x": 2})
    monkeypatch.undo()
    assert rotation.latest()[0] == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000001.state"]


def test_rotation_keeps_the_newest_two(tmp_path):
    rotation = Rotation(tmp_path)
    for step in range(5):
        rotation.save(step, {"step": step})
    assert [int(p.stem.split("-")[1]) for p in rotation.files()] == [3, 4]


def test_a_folder_in_use_names_its_user(tmp_path):
    with locked(tmp_path / "run.lock"):
        second = locked(tmp_path / "run.lock")
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
            second.__enter__()
    with locked(tmp_path / "run.lock"):
        pass
