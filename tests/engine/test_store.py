"""The store: what is written comes back, survives kills and full disks, and refuses strangers."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.engine.records import Field, key_of
from stillhouse.engine.store import Store, memory_room
from stillhouse.errors import CheckpointError, DataError, TeacherError
from stillhouse.losses.logits import kl, topk_kl
from stillhouse.teacher import TopK

LOGITS = Field("logits", (10,), dtype="float32")


def made(
    path: Path,
    fields: tuple[Field, ...] = (LOGITS,),
    ids: torch.Tensor | int = 100,
    **more: object,
) -> Store:
    settings = {"teacher": "t" * 32, "data": "d" * 32, "preprocessing": "p" * 32, **more}
    return Store.create(path, fields, ids, **settings)  # type: ignore[arg-type]


def values(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def filled(path: Path, fields: tuple[Field, ...] = (LOGITS,), count: int = 100) -> dict:
    data = {f.name: values(count, *f.shape, seed=i) * 3 for i, f in enumerate(fields)}
    with made(path, fields, count) as store:
        store.write(torch.arange(count), data)
    return data


# -- what is written comes back ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_values_come_back_as_their_dtype_holds_them(tmp_path: Path, dtype: str):
    fields = (
        Field("logits", (10,), dtype=dtype),
        Field("tap:low", (3, 2, 2), dtype=dtype),
        Field("score", (), dtype=dtype),
    )
    data = filled(tmp_path, fields)
    ids = torch.tensor([7, 3, 99, 3])
    read, valid = Store.open(tmp_path).read(ids)
    assert valid is None
    for name, value in data.items():
        expected = value[ids].to(getattr(torch, dtype)).float()
        assert read[name].dtype == torch.float32
        assert torch.equal(read[name], expected)


@pytest.mark.parametrize("shift", [0.0, 40.0, -300.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_int8_keeps_each_vector_within_half_a_step_of_its_own_range(size: float, shift: float):
    field = Field("embedding", (384,), dtype="int8")
    data = values(100, 384) * size + shift
    data[3] = shift  # no range at all
    columns = field.encode(data, torch.arange(100), 0)
    assert columns["value"].abs().max() <= 127
    read = field.decode(columns)
    assert isinstance(read, torch.Tensor)
    assert read.dtype == torch.float32
    span = data.amax(1) - data.amin(1)
    # zero is rounded to 11 bits, which lengthens its farther side; scale is rounded up
    rounded = data.abs().amax(1) * 2.0**-11
    step = (span / 2 + rounded) / 127 * (1 + 2.0**-10) + 2.0**-24
    ours = (read - data).abs().amax(1)
    assert (ours <= step * 0.5 + data.abs().amax(1) * 2.0**-22).all()
    # the zero point pays where the numbers lie on one side
    plain = data.abs().amax(1) / 254
    assert shift == 0 or size != 1.0 or (ours[4:] < 0.3 * plain[4:]).all()


def test_int8_takes_a_byte_per_number_and_four_per_vector(tmp_path: Path):
    field = Field("embedding", (384,), dtype="int8")
    data = filled(tmp_path, (field,))["embedding"]
    store = Store.open(tmp_path)
    read, _ = store.read(torch.arange(100))
    assert ((read["embedding"] - data).abs() <= (data.amax(1) - data.amin(1))[:, None] / 500).all()
    assert store.stride == 384 + 2 + 2


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((), ()),
        ((10,), ()),
        ((7, 96), (7,)),
        ((5, 8, 8), (5,)),
        ((3, 2, 2), ()),
        ((2, 4, 4, 5), (2,)),
    ],
)
def test_int8_shares_a_scale_among_at_least_64_numbers(
    tmp_path: Path, shape: tuple[int, ...], groups: tuple[int, ...]
):
    field = Field("tap:low", shape, dtype="int8")
    assert [c.shape for c in field.columns()] == [groups, groups, shape]
    # groups of very different size, each with its own scale
    size = 5.0 ** torch.arange(math.prod(groups)).reshape(groups).float() if groups else 1.0
    data = values(20, *shape)
    data = data * (size.reshape(*groups, *[1] * (len(shape) - len(groups))) if groups else 1.0)
    with made(tmp_path, (field, LOGITS), 20) as store:
        store.write(torch.arange(20), {"tap:low": data, "logits": values(20, 10)})
    read, _ = Store.open(tmp_path).read(torch.arange(20))
    assert read["tap:low"].shape == data.shape
    off = (read["tap:low"] - data).abs().reshape(20, *groups, -1).amax(-1)
    grouped = data.reshape(20, *groups, -1)
    assert (
        off <= (grouped.amax(-1) - grouped.amin(-1)) / 500 + grouped.abs().amax(-1) * 1e-5
    ).all()


def test_int8_tells_what_it_cannot_hold():
    field = Field("logits", (70,), dtype="int8")
    data = values(2, 70)
    data[1, 3] = -1e9
    with pytest.raises(TeacherError, match=r"reaches from -1e\+09 .* float32 or bfloat16"):
        field.encode(data, torch.arange(2), 0)
    data[1, 3] = -math.inf
    with pytest.raises(TeacherError, match="minus infinity"):
        field.encode(data, torch.arange(2), 0)


def test_the_header_tells_how_a_record_is_read(tmp_path: Path):
    fields = (Field("embedding", (70,), dtype="int8"), LOGITS)
    data = filled(tmp_path, fields)
    header = json.loads((tmp_path / "header.json").read_text())
    raw = np.fromfile(tmp_path / "records-00000.bin", dtype=np.uint8).reshape(100, header["stride"])
    found = {}
    for column in header["columns"]:
        size = np.dtype(column["dtype"]).itemsize * math.prod(column["shape"])
        part = np.ascontiguousarray(raw[:, column["offset"] :][:, :size]).view(column["dtype"])
        found[column["field"], column["column"]] = part.reshape(100, *column["shape"])
    assert np.array_equal(found["logits", "value"], data["logits"].numpy())
    scale, zero = (found["embedding", n].astype(np.float32) for n in ("scale", "zero"))
    read = zero[:, None] + scale[:, None] * found["embedding", "value"]
    stored = Store.open(tmp_path).read(torch.arange(100))[0]["embedding"]
    assert np.allclose(read, stored.numpy(), atol=1e-6)


def test_int8_records_of_another_layout_are_refused(tmp_path: Path):
    filled(tmp_path, (Field("embedding", (70,), dtype="int8"),))
    path = tmp_path / "header.json"
    body = json.loads(path.read_text())
    for change in ({"stride": 80}, {"columns": None, "stride": None}):
        old = {k: v for k, v in {**body, **change}.items() if v is not None and k != "sha256"}
        old["sha256"] = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(old))
        with pytest.raises(CheckpointError, match="laid out otherwise"):
            Store.open(tmp_path)


def test_topk_keeps_the_largest_and_exactly_the_missing_mass(tmp_path: Path):
    field = Field("logits", (1000,), form="topk", k=16, temperature=2.0)
    data = filled(tmp_path, (field,))["logits"]
    read, _ = Store.open(tmp_path).read(torch.arange(100))
    top = read["logits"]
    assert isinstance(top, TopK)
    assert top.temperature == 2.0
    logp = torch.log_softmax(data / 2.0, -1)
    assert torch.equal(top.ids, logp.topk(16).indices)
    assert torch.allclose(top.logp, logp.topk(16).values, atol=4e-3)
    missing = 1.0 - logp.topk(16).values.exp().double().sum(-1)
    assert torch.allclose(top.rest.exp().double(), missing, rtol=4e-3)
    # ids as two bytes, log-probabilities as two, and the mass: 66 bytes instead of 2,000
    assert Store.open(tmp_path).stride == 16 * 4 + 2


def test_ids_above_the_signed_range_survive_in_two_bytes(tmp_path: Path):
    field = Field("logits", (50_000,), form="truncate", k=2)
    logits = torch.zeros(1, 50_000)
    logits[0, 49_999], logits[0, 32_768] = 9.0, 8.0
    with made(tmp_path, (field,), 1) as store:
        store.write(torch.tensor([0]), {"logits": logits})
    top = Store.open(tmp_path).read(torch.tensor([0]))[0]["logits"]
    assert top.ids.tolist() == [[49_999, 32_768]]
    assert torch.isinf(top.rest).all()


def test_four_byte_ids_for_large_vocabularies(tmp_path: Path):
    field = Field("logits", (70_000,), form="topk", k=2)
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999] = 9.0
    with made(tmp_path, (field,), 1) as store:
        store.write(torch.tensor([0]), {"logits": logits})
    assert Store.open(tmp_path).read(torch.tensor([0]))[0]["logits"].ids[0, 0] == 69_999


def test_topk_loss_approaches_the_dense_one(tmp_path: Path):
    field = Field("logits", (1000,), form="topk", k=64)
    data = filled(tmp_path, (field,))["logits"]
    student = values(100, 1000, seed=9)
    top = Store.open(tmp_path).read(torch.arange(100))[0]["logits"]
    exact, kept = kl(student, data), topk_kl(student, top)
    assert 0 < float(kept) <= float(exact) * 1.01
    assert torch.allclose(topk_kl(data, top), torch.tensor(0.0), atol=2e-3)


def test_sampled_classes_are_unbiased_and_a_function_of_seed_id_and_draw(tmp_path: Path):
    logits = values(1, 20, seed=3) * 2
    student = values(1, 20, seed=4)
    exact = float((logits.softmax(-1) * (logits.log_softmax(-1) - student.log_softmax(-1))).sum())
    count = 4000
    many = logits.expand(count, 20)
    for proposal in (1.0, 0.8):
        field = Field("logits", (20,), form="sample", k=64, proposal=proposal, seed=5)
        encoded = field.encode(many, torch.arange(count), 0)
        top = field.decode({"ids": encoded["ids"].to(torch.int16), "logp": encoded["logp"]})
        assert isinstance(top, TopK)
        assert top.weights is not None
        assert torch.allclose(top.weights.sum(-1), torch.ones(count))
        found = float(topk_kl(student.expand(count, 20), top, tail="sample"))
        assert abs(found - exact) < 0.02 * max(1.0, abs(exact))
    again = field.encode(many[:3], torch.tensor([5, 6, 7]), 0)["ids"]
    assert torch.equal(again, encoded["ids"][5:8])
    assert not torch.equal(field.encode(many[:3], torch.tensor([5, 6, 7]), 1)["ids"], again)


def test_sampling_never_draws_what_has_no_probability():
    field = Field("logits", (6,), form="sample", k=200)
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, 0.0, -math.inf]]).expand(50, 6)
    ids = field.encode(logits, torch.arange(50), 0)["ids"]
    assert set(ids.unique().tolist()) == {1, 3, 4}


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([5, 900, 3, 12]),
        torch.tensor([2**40, -7, 5, 2**62]),
        torch.arange(4),
    ],
)
def test_any_64_bit_ids(tmp_path: Path, ids: torch.Tensor):
    data = values(4, 10)
    with made(tmp_path, ids=ids) as store:
        store.write(ids.flip(0), {"logits": data.flip(0)})
        assert store.complete
    store = Store.open(tmp_path)
    assert torch.equal(store.ids, ids)
    assert torch.equal(store.read(ids)[0]["logits"], data)
    with pytest.raises(TeacherError, match="lacks 1 records"):
        store.read(torch.tensor([int(ids[0]), 77]))


def test_keys_of_tuples_are_distinct_and_stable():
    one = key_of(["q1", "q1", "q2"], ["p1", "p2", "p1"])
    assert len(one.unique()) == 3
    assert torch.equal(one, key_of(["q1", "q1", "q2"], ["p1", "p2", "p1"]))


def test_draws_are_kept_apart(tmp_path: Path):
    ids = torch.tensor([4, 9, 2])
    with made(tmp_path, ids=ids, draws=3, views=11) as store:
        for draw in range(3):
            store.write(ids, {"logits": values(3, 10, seed=draw)}, draw)
    store = Store.open(tmp_path)
    mixed = store.read(ids, torch.tensor([2, 0, 1]))[0]["logits"]
    expected = torch.stack([values(3, 10, seed=d)[i] for i, d in enumerate([2, 0, 1])])
    assert torch.equal(mixed, expected)
    with pytest.raises(TeacherError, match="draws 0 to 2"):
        store.read(ids, 3)


def test_a_store_of_plain_samples_has_no_draws(tmp_path: Path):
    data = filled(tmp_path)["logits"]
    assert torch.equal(Store.open(tmp_path).read(torch.tensor([1]), 17)[0]["logits"], data[1:2])


def test_shards_hold_what_one_file_would(tmp_path: Path):
    field = Field("logits", (3000,), dtype="float32")
    data = values(200, 3000)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    with made(tmp_path / "many", (field,), 200, shard_bytes=700_000) as store:
        store.write(ids[:150], {"logits": data[ids[:150]]})
        store.write(ids[150:], {"logits": data[ids[150:]]})
    assert len(list((tmp_path / "many").glob("records-*.bin"))) > 2
    asked = torch.tensor([0, 199, 63, 64, 65, 120])
    assert torch.equal(Store.open(tmp_path / "many").read(asked)[0]["logits"], data[asked])


def test_stores_larger_than_the_memory_are_not_read_ahead(tmp_path: Path, monkeypatch):
    assert 1 << 20 < memory_room() < 1 << 62
    data = filled(tmp_path)["logits"]
    told = []

    class Told(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            told.append(advice)

    monkeypatch.setattr(mmap, "mmap", Told)
    for room, advised in ((4000, []), (3999, [(mmap.MADV_RANDOM,)])):
        monkeypatch.setattr("stillhouse.engine.store.memory_room", lambda room=room: room)
        store = Store.open(tmp_path)
        assert told == advised
        assert torch.equal(store.read(torch.arange(100))[0]["logits"], data)


def test_only_the_asked_fields_are_decoded(tmp_path: Path):
    filled(tmp_path, (LOGITS, Field("tap:low", (4,))))
    read, _ = Store.open(tmp_path).read(torch.tensor([0]), names=["tap:low"])
    assert list(read) == ["tap:low"]
    with pytest.raises(TeacherError, match="keeps no 'tap:lo'; did you mean 'tap:low'"):
        Store.open(tmp_path).read(torch.tensor([0]), names=["tap:lo"])


# -- writing, resuming ------------------------------------------------------------------------


def test_missing_records_are_refused_or_masked(tmp_path: Path):
    data = values(100, 10)
    with made(tmp_path) as store:
        store.write(torch.arange(40), {"logits": data[:40]})
    store = Store.open(tmp_path)
    assert (store.finished, store.complete) == (40, False)
    with pytest.raises(TeacherError, match=r"lacks 2 records .*\[40, 99\].*40 of 100"):
        store.read(torch.tensor([1, 40, 99]))
    read, valid = store.read(torch.tensor([1, 40, 99]), missing="mask")
    assert valid is not None
    assert valid.tolist() == [True, False, False]
    assert torch.equal(read["logits"], torch.cat([data[1:2], torch.zeros(2, 10)]))
    assert store.missing().ids.tolist() == list(range(40, 100))


def test_writing_twice_changes_nothing(tmp_path: Path):
    with made(tmp_path) as store:
        assert store.write(torch.arange(10), {"logits": values(10, 10)}) == 10
        assert store.write(torch.arange(5, 15), {"logits": values(10, 10, seed=1)}) == 5
        twice = torch.tensor([20, 20])
        assert store.write(twice, {"logits": values(2, 10, seed=2)}) == 1
        assert store.finished == 16
        read = store.read(torch.tensor([0, 9, 10, 20]))[0]["logits"]
    first, second, third = values(10, 10), values(10, 10, seed=1), values(2, 10, seed=2)
    assert torch.equal(read, torch.stack([first[0], first[9], second[5], third[0]]))


def test_a_store_goes_on_where_it_was(tmp_path: Path):
    data = values(100, 10)
    with made(tmp_path) as store:
        store.write(torch.arange(40), {"logits": data[:40]})
    with made(tmp_path) as store:
        left = store.missing().ids
        assert left.tolist() == list(range(40, 100))
        store.write(left, {"logits": data[left]})
    assert torch.equal(Store.open(tmp_path).read(torch.arange(100))[0]["logits"], data)


def test_several_writers_fill_one_store(tmp_path: Path):
    data = values(100, 10)
    with made(tmp_path, writer="0") as one, made(tmp_path, writer="1") as two:
        one.write(torch.arange(0, 100, 2), {"logits": data[0::2]})
        two.write(torch.arange(1, 100, 2), {"logits": data[1::2]})
    store = Store.open(tmp_path)
    assert store.complete
    store.verify()
    assert torch.equal(store.read(torch.arange(100))[0]["logits"], data)


def test_one_writer_at_a_time(tmp_path: Path):
    with made(tmp_path), pytest.raises(CheckpointError, match="being written by another"):
        made(tmp_path)
    made(tmp_path).close()


WIDE = Field("logits", (500,), dtype="float32")


def wave(rows: torch.Tensor) -> torch.Tensor:
    return torch.sin(rows[:, None].float() * torch.arange(1, 501)[None])


def fill_in_a_fork(path: Path) -> int:
    """A process of its own that fills the store; forked, so that a kill costs no new import."""
    child = os.fork()
    if child:
        return child
    failed = 1
    try:
        torch.set_num_threads(1)
        with made(path, (WIDE,), 20_000) as store:
            missing = store.missing().ids
            for start in range(0, len(missing), 64):
                rows = missing[start : start + 64]
                store.write(rows, {"logits": wave(rows)})
                if int(rows[0]) % 1024 < 64:
                    store.flush()
        failed = 0
    finally:
        os._exit(failed)  # whatever happens, the child does not go on as a second test run


def test_killed_at_any_moment_nothing_finished_is_lost_or_wrong(tmp_path: Path):
    finished, wait = [0], 0.005
    while len(finished) < 10 or finished[-1] == 0:
        child = fill_in_a_fork(tmp_path)
        time.sleep(wait)
        wait *= 1.3
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (tmp_path / "header.json").exists():
            store = Store.open(tmp_path)
            store.verify()
            finished.append(store.finished)
    assert finished == sorted(finished)
    assert os.waitpid(fill_in_a_fork(tmp_path), 0)[1] == 0
    store = Store.open(tmp_path)
    assert store.complete
    assert torch.equal(store.read(torch.arange(20_000))[0]["logits"], wave(torch.arange(20_000)))


def test_a_beginning_that_was_killed_counts_for_nothing(tmp_path: Path):
    (tmp_path / "records-00000.bin").write_bytes(b"x" * 17)
    (tmp_path / "done-0.a").write_bytes(b"rubbish")
    with made(tmp_path) as store:
        assert store.finished == 0
    with pytest.raises(TeacherError, match="lacks 1 records"):
        Store.open(tmp_path).read(torch.tensor([0]))


def test_a_full_disk_is_told_and_what_was_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = values(100, 10)
    real, room = os.pwrite, [60 * 40]

    def full(handle: int, content: memoryview, offset: int) -> int:
        # the disk holds the records of 60 samples; slots that exist are overwritten freely
        if len(content) % 40 == 0:
            if room[0] < len(content):
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= len(content)
        return real(handle, content, offset)

    store = made(tmp_path)
    store.write(torch.arange(10), {"logits": data[:10]})
    store.flush()
    monkeypatch.setattr(os, "pwrite", full)
    store.write(torch.arange(10, 50), {"logits": data[10:50]})
    with pytest.raises(CheckpointError, match=r"disk is full: 2,000 bytes more .*50 of 100") as e:
        store.write(torch.arange(50, 100), {"logits": data[50:]})
    assert "run the same command again" in str(e.value)
    monkeypatch.undo()
    os.close(store._lock or -1)
    with made(tmp_path) as again:
        assert again.finished == 50
        left = again.missing().ids
        again.write(left, {"logits": data[left]})
    assert torch.equal(Store.open(tmp_path).read(torch.arange(100))[0]["logits"], data)


def test_no_room_at_the_beginning_is_told_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def none(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", none, raising=False)
    with pytest.raises(CheckpointError, match=r"no room .* needs 4,000 bytes"):
        made(tmp_path)
    assert not list(tmp_path.glob("records-*"))


def test_bad_values_are_refused_and_not_stored(tmp_path: Path):
    store = made(tmp_path)
    bad = values(4, 10)
    bad[2, 3] = math.nan
    with pytest.raises(TeacherError, match=r"NaN or infinity in 'logits' for 1 samples \(ids \[2"):
        store.write(torch.arange(4), {"logits": bad})
    with pytest.raises(TeacherError, match=r"\(7,\) per sample.*made for \(10,\)"):
        store.write(torch.arange(4), {"logits": values(4, 7)})
    with pytest.raises(TeacherError, match="which the teacher did not give"):
        store.write(torch.arange(4), {"embedding": values(4, 7)})
    with pytest.raises(TeacherError, match=r"no place for 1 of these samples \(ids \[100\]"):
        store.write(torch.tensor([100]), {"logits": values(1, 10)})
    assert store.finished == 0
    store.close()
    half = made(tmp_path / "half", (Field("logits", (10,), dtype="float16"),))
    with pytest.raises(TeacherError, match="more than float16 holds"):
        half.write(torch.arange(4), {"logits": values(4, 10) * 1e6})


# -- strangers and damage ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"teacher": "u" * 32}, "made by another teacher"),
        ({"data": "e" * 32}, "made of other data"),
        ({"preprocessing": "q" * 32}, "other preprocessing"),
        ({"draws": 2}, "holds samples as they are, the run reads 2 augmentations"),
        ({"ids": 99}, "holds 100 other samples"),
        ({"fields": (Field("logits", (10,)),)}, r"keeps logits \(10,\) \(dense, float32\)"),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(tmp_path: Path, changed: dict, told: str):
    filled(tmp_path)
    with pytest.raises(TeacherError, match=told):
        made(tmp_path, **changed)


def test_other_augmentations_are_refused(tmp_path: Path):
    made(tmp_path, draws=2, views=3).close()
    with pytest.raises(TeacherError, match=r"other augmentations .*seed is 3, the run's is 4"):
        made(tmp_path, draws=2, views=4)


def test_absent_damaged_and_newer_headers(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no teacher store at"):
        Store.open(tmp_path / "nowhere")
    filled(tmp_path)
    path = tmp_path / "header.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(CheckpointError, match=r"header of the store .* is damaged"):
        Store.open(tmp_path)
    path.write_text(whole.replace("float32", "float16"))
    with pytest.raises(CheckpointError, match="does not match its own sha256"):
        Store.open(tmp_path)
    body = json.loads(whole)
    path.write_text(json.dumps({**body, "version": 2}))
    with pytest.raises(CheckpointError, match="format version 2"):
        Store.open(tmp_path)
    path.write_text(json.dumps({**body, "layout": "ragged"}))
    with pytest.raises(CheckpointError, match="layout 'ragged'"):
        Store.open(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="it is no text"):
        Store.open(tmp_path)


def test_a_truncated_file_is_told_and_mended_by_capturing_again(tmp_path: Path):
    data = filled(tmp_path)["logits"]
    records = tmp_path / "records-00000.bin"
    os.truncate(records, 1000)
    with pytest.raises(CheckpointError, match=r"holds 1,000 bytes where 4,000 are expected"):
        Store.open(tmp_path)
    with made(tmp_path) as store:
        left = store.missing().ids
        assert len(left) > 0
        store.write(left, {"logits": data[left]})
    assert torch.equal(Store.open(tmp_path).read(torch.arange(100))[0]["logits"], data)


def test_a_flipped_bit_is_found_on_reading_and_only_its_block_is_redone(tmp_path: Path):
    field = Field("logits", (5000,), dtype="float32")
    data = filled(tmp_path, (field,), 100)["logits"]
    with (tmp_path / "records-00000.bin").open("r+b") as file:
        file.seek(20_000 * 50 + 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    store = Store.open(tmp_path)
    assert torch.equal(store.read(torch.tensor([0, 1]))[0]["logits"], data[:2])
    with pytest.raises(CheckpointError, match=r"1 of \d+ blocks .* do not match their checksum"):
        store.read(torch.tensor([0, 50]))
    with pytest.raises(CheckpointError, match="checksum"):
        store.verify()
    with made(tmp_path, (field,)) as again:
        left = again.missing().ids
        assert 50 in left
        assert len(left) == again.header.block_records
        again.write(left, {"logits": data[left]})
    assert torch.equal(Store.open(tmp_path).read(torch.arange(100))[0]["logits"], data)


def test_one_damaged_progress_slot_is_survived_two_are_told(tmp_path: Path):
    data = filled(tmp_path)["logits"]
    (tmp_path / "done-0.a").write_bytes(b"rubbish")
    assert torch.equal(Store.open(tmp_path).read(torch.arange(100))[0]["logits"], data)
    (tmp_path / "done-0.b").write_bytes(b"rubbish too")
    with pytest.raises(CheckpointError, match=r"both progress files done-0\.a and \.b"):
        Store.open(tmp_path)


def test_a_damaged_list_of_ids_is_told(tmp_path: Path):
    ids = torch.tensor([4, 9, 2])
    made(tmp_path, ids=ids).close()
    (tmp_path / "ids.bin").write_bytes(b"12345678" * 3)
    with pytest.raises(CheckpointError, match=r"list of sample ids .* is damaged"):
        Store.open(tmp_path)


def test_ids_twice_and_no_ids_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"1 sample ids occur more than once \(\[3\]"):
        made(tmp_path, ids=torch.tensor([3, 3, 4]))
    with pytest.raises(DataError, match="would be empty"):
        made(tmp_path, ids=torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"form": "top"}, "in no form 'top'; did you mean 'topk'"),
        ({"dtype": "float8"}, "in no dtype 'float8'; did you mean 'float"),
        ({"form": "topk", "k": 10}, "leaves nothing out of 10 classes"),
        ({"form": "topk", "k": 0}, "k of at least 1"),
        ({"form": "topk", "k": 2, "temperature": 0.0}, "must be above 0"),
    ],
)
def test_impossible_fields_are_refused(settings: dict, told: str):
    with pytest.raises(TeacherError, match=told):
        Field("logits", (10,), **settings)


# -- speed and size ---------------------------------------------------------------------------


def test_a_pass_over_4096_samples_of_100_classes_takes_well_under_half_a_second(tmp_path: Path):
    field = Field("logits", (100,), dtype="float16")
    with made(tmp_path, (field,), 4096) as store:
        for rows in torch.arange(4096).split(64):
            store.write(rows, {"logits": values(len(rows), 100)})
    store = Store.open(tmp_path)
    began = time.perf_counter()
    for rows in torch.randperm(4096).split(64):
        store.read(rows)
    assert time.perf_counter() - began < 0.25
    assert store.nbytes / 4096 < 202  # a fifteenth of one .pt file per sample (3,270 bytes)


def resident() -> int:
    """Bytes of this process that are not maps of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_reading_holds_no_more_memory_than_the_batch(tmp_path: Path):
    field = Field("logits", (4000,), dtype="float16")
    with made(tmp_path, (field,), 8192) as store:
        for rows in torch.arange(8192).split(512):
            store.write(rows, {"logits": values(len(rows), 4000)})
    store = Store.open(tmp_path)
    store.read(torch.arange(64))
    before = resident()
    for rows in torch.randperm(8192).split(64):
        store.read(rows)
    assert len(store) * store.stride > 60e6
    assert resident() - before < 20e6


def test_no_rows_are_read_as_no_rows(tmp_path: Path):
    """A process may hold no row of a short last batch."""
    fields = [Field("embedding", (3,), dtype="float32")]
    with Store.create(tmp_path / "s", fields, torch.arange(4), data="d", teacher="t") as store:
        store.put((torch.arange(4), 0), {"embedding": torch.randn(4, 3)})
        store.flush()
        values, valid = store.read(torch.zeros(0, dtype=torch.int64))
    assert values["embedding"].shape == (0, 3)
    assert valid is None
