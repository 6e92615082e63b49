from __future__ import annotations

import errno
import gzip
import hashlib
import logging

import pytest
import torch

from stillhouse.data.cached import (
    cached_tensors,
    content_hash,
    load_tensors,
    save_tensors,
    tensors_hash,
    write_whole,
)
from stillhouse.errors import DataError

TENSORS = {"a": torch.arange(12, dtype=torch.uint8).view(3, 4), "b": torch.randn(5, 2)}


def test_round_trip_is_exact(tmp_path):
    save_tensors(tmp_path / "deep" / "t.safetensors", TENSORS)
    back = load_tensors(tmp_path / "deep" / "t.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("place", [-1, -30])
def test_a_flipped_byte_is_noticed(tmp_path, place):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.safetensors is damaged"):
        load_tensors(path)


def test_a_cut_file_is_noticed_and_made_again(tmp_path, caplog):
    path = tmp_path / "t.safetensors"
    made = []

    def make():
        made.append(1)
        return TENSORS

    cached_tensors(path, make)
    cached_tensors(path, make)
    assert len(made) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        again = cached_tensors(path, make)
    assert len(made) == 2
    assert "damaged" in caplog.text
    assert torch.equal(again["b"], TENSORS["b"])
    assert torch.equal(load_tensors(path)["b"], TENSORS["b"])


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        got = cached_tensors(tmp_path / "file" / "t.safetensors", lambda: TENSORS)
    assert torch.equal(got["a"], TENSORS["a"])
    assert "cannot write" in caplog.text


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fill(beside):
        beside.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"x\.bin: No space left on device"):
        write_whole(path, fill)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_content_hash_looks_inside_gz(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"words", 1))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"words", 9, mtime=5))
    assert content_hash(tmp_path / "a.gz") == content_hash(tmp_path / "b.gz")
    assert content_hash(tmp_path / "a.gz") == hashlib.sha256(b"words").hexdigest()
    (tmp_path / "c.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"c\.gz"):
        content_hash(tmp_path / "c.gz")


def test_tensors_hash_sees_shape_type_and_name():
    value = torch.zeros(4)
    seen = {
        tensors_hash({"a": value}),
        tensors_hash({"b": value}),
        tensors_hash({"a": value.view(2, 2)}),
        tensors_hash({"a": value.int()}),
        tensors_hash({"a": torch.zeros(0)}),
    }
    assert len(seen) == 5
