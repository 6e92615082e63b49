"""Teacher outputs on disk: fixed records that describe themselves, written once, read fast.

A store is a folder:

    header.json          who made it, of what, in which form; carries its own sha256
    ids.bin              (N,) int64 sample ids, absent when they are 0..N-1
    records-00000.bin    raw records of fixed stride, one or more shards
    done-<writer>.a/.b   two alternating slots: bitmap of finished records, checksum per block

The record of sample position p in draw d is number d * N + p, so one epoch, which reads one
draw, stays within one stretch of the file. Ids are any 64-bit numbers; `key_of` makes one
from a tuple such as (query, passage).

A bit is set only after the bytes of its record are on the disk. The two slots are written in
place by turns and carry a sequence number and a checksum: a kill at any moment leaves at
least one whole slot, and finishing needs no further disk space, so that records survive a
disk that has run full.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as entry
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse._version import __version__
from stillhouse.engine.bitmap import Bytes, Finished, Rows, write_all
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.engine.records import DTYPES, Field, key_of, lay_out
from stillhouse.errors import CheckpointError, DataError, TeacherError, nearest
from stillhouse.teacher import Value

FORMAT = "stillhouse-store"
VERSION = 1
LAYOUTS = ("fixed",)

FLUSH_SECONDS = 5.0  # between flushes while writing
_BLOCK_BYTES = 1 << 18
_SHARD_BYTES = 1 << 32


@dataclass(frozen=True)
class Header:
    """What a store says of itself.

    Attributes:
        fields: what is kept of each sample.
        teacher: fingerprint of the teacher: weights, preprocessing, settings.
        data: fingerprint of the samples.
        preprocessing: fingerprint of what is done to a sample before the teacher sees it.
        records: number of records, samples times draws.
        samples: number of samples.
        draws: augmentations kept of each sample; 0 when samples are read as they are.
        views: seed of the augmentations, meaningful when `draws` is above 0.
        edition: the data's name with its edition.
        teacher_name: for people.
        shard_records: records per file.
        block_records: records per checksum.
        ids_sha: sha256 of ids.bin, empty when the ids are 0..N-1.
        layout: "fixed".
        made_by: version of the library.
        extra: anything else worth knowing.
    """

    fields: tuple[Field, ...]
    teacher: str
    data: str
    preprocessing: str
    records: int
    samples: int
    draws: int = 0
    views: int = 0
    edition: str = ""
    teacher_name: str = ""
    shard_records: int = 0
    block_records: int = 0
    ids_sha: str = ""
    layout: str = "fixed"
    made_by: str = __version__
    extra: Mapping[str, Any] = entry(default_factory=dict)

    def text(self) -> str:
        """The JSON file, its sha256 included."""
        body: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body |= _record_text(self.fields)
        body["sha256"] = _sha_of(body)
        return json.dumps(body, indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str, where: Path) -> Header:
        """Read the JSON file.

        Raises:
            CheckpointError: damaged, changed by hand, or written by a newer version.
        """
        try:
            body = json.loads(text)
            if not isinstance(body, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise CheckpointError(
                f"the header of the store {where} is damaged ({error}); "
                "delete the folder and capture again"
            ) from None
        if body.pop("format", None) != FORMAT:
            raise CheckpointError(f"{where} is not the header of a teacher store")
        version, layout = body.pop("version", None), body.get("layout")
        if version != VERSION or layout not in LAYOUTS:
            raise CheckpointError(
                f"the store {where.parent} has format version {version}, layout '{layout}'; "
                f"this version of Stillhouse reads version {VERSION}, layout {LAYOUTS[0]}: "
                "update Stillhouse, or delete the folder and capture again"
            )
        said = body.pop("sha256", None)
        if said != _sha_of({"format": FORMAT, "version": VERSION, **body}):
            raise CheckpointError(
                f"the header {where} does not match its own sha256: it was damaged or changed "
                "by hand; delete the folder and capture again"
            )
        fields = tuple(Field(**{**f, "shape": tuple(f["shape"])}) for f in body.pop("fields"))
        record = {name: body.pop(name, None) for name in ("stride", "columns")}
        # Stores of before the columns were told are read as long as their form is the same.
        told = record["columns"] is not None or any(f.dtype == "int8" for f in fields)
        if told and record != _record_text(fields):
            raise CheckpointError(
                f"the records of the store {where.parent} are laid out otherwise than this version "
                "of Stillhouse does it; delete the folder and capture again"
            )
        return cls(fields=fields, **body)

    def check(
        self,
        path: Path,
        *,
        teacher: str | None = None,
        data: str | None = None,
        preprocessing: str | None = None,
        views: int | None = None,
        draws: int | None = None,
        edition: str = "",
    ) -> None:
        """Refuse a store that was made of something else than the run wants.

        Args:
            path: of the store, for the message.
            teacher: the fingerprint that the run's teacher has; None is not checked.
            data: that of the run's samples.
            preprocessing: that of what happens to a sample.
            views: the run's seed of augmentations.
            draws: the run's number of augmentations of a sample; 0 for none.
            edition: the run's data, for the message.

        Raises:
            TeacherError: what differs, what the store has, and what to do.
        """
        again = "capture again into another folder, or change the recipe"
        if data is not None and data != self.data:
            raise TeacherError(
                f"the store {path} was made of other data: {self.edition or 'samples'} "
                f"({self.data[:12]}), the run reads {edition or 'samples'} ({data[:12]}); {again}"
            )
        if preprocessing is not None and preprocessing != self.preprocessing:
            raise TeacherError(
                f"the store {path} was made with other preprocessing "
                f"({self.preprocessing[:12]}, the run has {preprocessing[:12]}); {again}"
            )
        # A teacher's fingerprint covers its preprocessing, which is told more exactly above.
        if teacher is not None and teacher != self.teacher:
            raise TeacherError(
                f"the store {path} was made by another teacher: it holds answers of "
                f"{self.teacher_name or 'a teacher'} ({self.teacher[:12]}), the run has another "
                f"({teacher[:12]}); {again}"
            )
        if draws is not None and draws != self.draws:
            raise TeacherError(
                f"the store {path} holds {_draws_text(self.draws)}, the run reads "
                f"{_draws_text(draws)}; {again}"
            )
        if views is not None and self.draws and views != self.views:
            raise TeacherError(
                f"the store {path} holds other augmentations of the samples (their seed "
                f"is {self.views}, the run's is {views}); {again}"
            )


def _record_text(fields: Sequence[Field]) -> dict[str, Any]:
    """How a record is read without this library: byte offset, dtype and shape of each part."""
    places, stride = lay_out(fields)
    columns = [
        {
            "field": place.field.name,
            "column": place.column.name,
            "dtype": place.column.dtype,
            "shape": list(place.column.shape),
            "offset": place.offset,
        }
        for place in places
    ]
    return {"stride": stride, "columns": columns}


def _sha_of(body: Mapping[str, Any]) -> str:
    kept = {k: v for k, v in body.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class _Index:
    """From sample id to position."""

    def __init__(self, ids: Rows | None, count: int) -> None:
        self.count = count
        self.ids = ids
        self._order: Rows | None = None
        self._table: Rows | None = None
        if ids is None or count == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low >= 0 and high < 8 * count + 1024:
            self._table = np.full(high + 1, -1, dtype=np.int64)
            self._table[ids] = np.arange(count)
        else:
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]

    def positions(self, ids: Rows) -> Rows:
        """(B,) positions, -1 where the id is not known."""
        if self.ids is None:
            return np.where((ids >= 0) & (ids < self.count), ids, -1)
        if self._table is not None:
            inside = (ids >= 0) & (ids < len(self._table))
            return np.where(inside, self._table[np.where(inside, ids, 0)], -1)
        assert self._order is not None
        at = np.searchsorted(self._sorted, ids).clip(max=self.count - 1)
        return np.where(self._sorted[at] == ids, self._order[at], -1)

    def all(self) -> Rows:
        """The ids in the order of their positions."""
        return np.arange(self.count) if self.ids is None else self.ids


class Missing(NamedTuple):
    """Records that are not there yet: sample ids and draws, in the order of the file."""

    ids: Tensor
    draws: Tensor


class Store:
    """A teacher's outputs on disk; see the module's text for the files.

    Made by `Store.create` (which goes on with a store that was begun) and `Store.open`.

    Attributes:
        path: the folder.
        header: what the store says of itself.
    """

    def __init__(
        self, path: Path, header: Header, *, writer: str | None = None, wait: bool = False
    ) -> None:
        self.path = path
        self.header = header
        self.fields = {f.name: f for f in header.fields}
        self._places, self.stride = lay_out(header.fields)
        self._index = _Index(self._read_ids(), header.samples)
        self._blocks = -(-header.records // header.block_records)
        self._writer = writer
        self._lock: int | None = None
        self._files: list[int] = []
        self._pending: list[Rows] = []
        self._saved = time.monotonic()
        if writer is not None:
            self._take_lock(writer, wait)
        self._maps = self._map_shards()
        names = {p.name.rsplit(".", 1)[0] for p in path.glob("done-*.[ab]")}
        if writer is not None:
            names.add(f"done-{writer}")
        self._done = {n: Finished(path / n, header.records, self._blocks) for n in sorted(names)}
        self._checked = np.zeros(self._blocks, dtype=np.bool_)
        self._all_checked = False
        self._finished = self._count()

    # -- making and opening ------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        fields: Sequence[Field],
        ids: Tensor | int,
        *,
        teacher: str,
        data: str,
        preprocessing: str = "",
        draws: int = 0,
        views: int = 0,
        edition: str = "",
        teacher_name: str = "",
        extra: Mapping[str, Any] | None = None,
        shard_bytes: int = _SHARD_BYTES,
        writer: str = "0",
        wait: bool = False,
    ) -> Store:
        """Begin a store, or go on with the one that was begun at `path`.

        Args:
            path: a folder; made when absent.
            fields: what is kept of each sample.
            ids: (N,) distinct sample ids, or N for the ids 0..N-1.
            teacher: the teacher's fingerprint.
            data: the samples' fingerprint.
            preprocessing: fingerprint of what happens to a sample before the teacher.
            draws: augmentations of each sample; 0 when samples are read as they are.
            views: seed of the augmentations.
            edition: the data's name with its edition.
            teacher_name: for people.
            extra: anything else worth knowing.
            shard_bytes: largest file.
            writer: name of this process among several that write different records.
            wait: until another process that writes under this name has ended.

        Raises:
            TeacherError: there is a store at `path` of another teacher, data, preprocessing
                or form.
            CheckpointError: it is damaged, in use, or the disk has no room.
            DataError: no ids, or ids that occur twice.
        """
        folder = Path(path)
        numbers = None if isinstance(ids, int) else ids.detach().cpu().long().numpy()
        numbers = _plain(numbers)
        count = ids if isinstance(ids, int) else len(ids)
        _refuse_bad_ids(folder, numbers, count)
        _, stride = lay_out(fields)
        records = count * max(1, draws)
        block = max(1, _BLOCK_BYTES // stride)
        header = Header(
            fields=tuple(fields),
            teacher=teacher,
            data=data,
            preprocessing=preprocessing,
            records=records,
            samples=count,
            draws=draws,
            views=views if draws else 0,
            edition=edition,
            teacher_name=teacher_name,
            shard_records=max(1, shard_bytes // stride // block) * block,
            block_records=block,
            ids_sha="" if numbers is None else hashlib.sha256(numbers.tobytes()).hexdigest(),
            extra=dict(extra or {}),
        )
        if not (folder / "header.json").exists():
            _begin(folder, header, numbers, stride)
            return cls(folder, header, writer=writer, wait=wait)
        found = _read_header(folder)
        _refuse_difference(folder, found, header)
        store = cls(folder, found, writer=writer, wait=wait)
        store.repair()
        return store

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store for reading.

        Raises:
            CheckpointError: absent, damaged, truncated, or of a newer version.
        """
        folder = Path(path)
        return cls(folder, _read_header(folder))

    def _read_ids(self) -> Rows | None:
        if not self.header.ids_sha:
            return None
        path = self.path / "ids.bin"
        raw = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(raw).hexdigest() != self.header.ids_sha:
            raise CheckpointError(
                f"the list of sample ids {path} is "
                f"{'damaged' if raw else 'missing'}; delete the folder and capture again"
            )
        return np.frombuffer(raw, dtype=np.int64)

    def _take_lock(self, writer: str, wait: bool) -> None:
        handle = os.open(self.path / f"done-{writer}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(handle)
            raise CheckpointError(
                f"the store {self.path} is being written by another process; wait for it, or "
                "stop it and run the same command again"
            ) from None
        self._lock = handle

    def _map_shards(self) -> list[Bytes]:
        maps = []
        for number, rows in enumerate(_shard_rows(self.header)):
            path = self.path / _shard_name(number)
            size = path.stat().st_size if path.exists() else 0
            if size != rows * self.stride:
                if self._writer is None:
                    raise CheckpointError(
                        f"{path} holds {size:,} bytes where {rows * self.stride:,} are "
                        f"expected ({rows:,} records of {self.stride}): the file was cut short or "
                        "replaced; "
                        "run the capture again, only the lost records are asked again"
                    )
                _allocate(path, rows * self.stride)
            maps.append(_map_file(path, rows, self.stride))
        return maps

    # -- facts -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.header.records

    @property
    def draws(self) -> int:
        """Augmentations kept of each sample; 0 when samples are read as they are."""
        return self.header.draws

    @property
    def ids(self) -> Tensor:
        """(N,) the sample ids."""
        return torch.from_numpy(self._index.all().copy())

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the store."""
        return sum(p.stat().st_size for p in self.path.iterdir())

    @property
    def complete(self) -> bool:
        """Every record is there."""
        return self._finished == self.header.records

    @property
    def finished(self) -> int:
        """Number of records that are there."""
        return self._finished

    def _count(self) -> int:
        return int(np.unpackbits(self._bits()).sum())

    def _bits(self) -> Bytes:
        bits = np.zeros(-(-self.header.records // 8), dtype=np.uint8)
        for done in self._done.values():
            bits |= done.bits
        return bits

    def missing(self) -> Missing:
        """The records that are not there, in the order of the file."""
        bits = np.unpackbits(self._bits(), bitorder="little", count=self.header.records)
        rows = np.flatnonzero(bits == 0)
        draws, positions = np.divmod(rows, self.header.samples)
        return Missing(
            torch.from_numpy(self._index.all()[positions]), torch.from_numpy(draws.astype(np.int64))
        )

    def has(self, ids: Tensor, draw: int | Tensor = 0) -> Tensor:
        """(B,) bool: the records that are there."""
        rows = self._rows(ids, draw)
        return torch.from_numpy((rows >= 0) & self._has(np.maximum(rows, 0)))

    def _has(self, rows: Rows) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(rows), dtype=np.bool_)
        for done in self._done.values():
            found |= done.has(rows)
        return found

    def _rows(self, ids: Tensor, draw: int | Tensor) -> Rows:
        """(B,) record numbers, -1 for samples or draws that the store does not know."""
        positions = self._index.positions(ids.detach().cpu().numpy())
        if not self.header.draws:
            return positions
        if isinstance(draw, Tensor):
            number: Any = draw.detach().cpu().numpy().astype(np.int64)
        else:
            number = draw
        known = (positions >= 0) & (np.asarray(number) >= 0) & (number < self.header.draws)
        return np.where(known, number * self.header.samples + positions, -1)

    # -- checking ----------------------------------------------------------------------------

    def check(self, **wanted: Any) -> None:
        """Refuse a store that was made of something else than the run wants.

        Args:
            wanted: see `Header.check`.

        Raises:
            TeacherError: what differs, what the store has, and what to do.
        """
        self.header.check(self.path, **wanted)

    def verify(self) -> None:
        """Check every finished record against its block's checksum.

        Raises:
            CheckpointError: names the damaged blocks.
        """
        bad = [b for b in range(self._blocks) if not self._sound(b)]
        if bad:
            self._refuse_damage(bad)
        self._all_checked = True

    def repair(self) -> int:
        """Forget records whose bytes no longer match their checksum, so that they are redone.

        Returns:
            The number of records forgotten.

        Raises:
            CheckpointError: the store was not opened for writing.
        """
        self._own()
        lost = 0
        for name, done in self._done.items():
            with _free(self.path / f"{name}.lock", held=name == f"done-{self._writer}") as free:
                lost += self._forget_damaged(done) if free else 0
        self._all_checked, self._finished = True, self._count()
        return lost

    def _forget_damaged(self, done: Finished) -> int:
        lost = 0
        for block in range(self._blocks):
            rows = np.arange(*self._block_rows(block))
            kept = rows[done.has(rows)]
            if len(kept) and self._sum(kept) != int(done.sums[block]):
                lost += len(kept)
                done.forget(kept)
        if lost:
            done.save()
        return lost

    def _block_rows(self, block: int) -> tuple[int, int]:
        size = self.header.block_records
        return block * size, min((block + 1) * size, self.header.records)

    def _sound(self, block: int) -> bool:
        rows = np.arange(*self._block_rows(block))
        for done in self._done.values():
            kept = rows[done.has(rows)]
            if len(kept) and self._sum(kept) != int(done.sums[block]):
                return False
        return True

    def _sum(self, rows: Rows) -> int:
        """crc32 of records that all lie in one block, in the order of the file."""
        shard, first = divmod(int(rows[0]), self.header.shard_records)
        table = self._maps[shard]
        if int(rows[-1]) - int(rows[0]) + 1 == len(rows):
            return zlib.crc32(table[first : first + len(rows)].data)
        return zlib.crc32(np.take(table, rows - shard * self.header.shard_records, axis=0).data)

    def _refuse_damage(self, blocks: Sequence[int]) -> NoReturn:
        first, last = self._block_rows(blocks[0])[0], self._block_rows(blocks[-1])[1] - 1
        shard = first // self.header.shard_records
        raise CheckpointError(
            f"{len(blocks)} of {self._blocks} blocks of the store {self.path} do not match "
            f"their checksum (records {first:,} to {last:,}, first in {_shard_name(shard)}): the "
            "bytes were changed after they were written; run the capture again, only the "
            "damaged records are asked again"
        )

    # -- writing -----------------------------------------------------------------------------

    def write(self, ids: Tensor, values: Mapping[str, Tensor], draw: int | Tensor = 0) -> int:
        """Write records; those that are there already are left as they are.

        The bytes count once `flush` has run, which happens by itself every few seconds.

        Args:
            ids: (B,) sample ids.
            values: dense tensors (B, *shape) by field name, on any device.
            draw: augmentation number, one or (B,).

        Returns:
            The number of records written.

        Raises:
            TeacherError: unknown ids, missing fields, other shapes, numbers not finite.
            CheckpointError: the disk is full; what was written before is kept.
        """
        own = self._own()
        rows = self._rows(ids, draw)
        if (rows < 0).any():
            bad = ids[torch.from_numpy(rows < 0).to(ids.device)].tolist()
            raise TeacherError(
                f"the store {self.path} has no place for {len(bad)} of these samples "
                f"(ids {bad[:5]}, draw {draw if isinstance(draw, int) else 'several'})"
            )
        fresh = ~self._has(rows)
        if not _increasing(rows):
            first = np.zeros(len(rows), dtype=np.bool_)
            first[np.unique(rows, return_index=True)[1]] = True
            fresh &= first
        if not fresh.any():
            return 0
        if not fresh.all():
            keep = torch.from_numpy(np.flatnonzero(fresh))
            ids = ids[keep.to(ids.device)]
            draw = draw[keep.to(draw.device)] if isinstance(draw, Tensor) else draw
            values = {k: v[keep.to(v.device)] for k, v in values.items()}
            rows = rows[fresh]
        table = self._encode(ids, values, draw)
        self._put(rows, table)
        self._pending.append(rows)
        own.mark(rows)
        self._finished += len(rows)
        if time.monotonic() - self._saved > FLUSH_SECONDS:
            self.flush()
        return len(rows)

    def _own(self) -> Finished:
        if self._writer is None:
            raise CheckpointError(f"the store {self.path} was opened for reading only")
        return self._done[f"done-{self._writer}"]

    def _encode(self, ids: Tensor, values: Mapping[str, Tensor], draw: int | Tensor) -> Bytes:
        lacking = [name for name in self.fields if name not in values]
        if lacking:
            raise TeacherError(
                f"the store {self.path} keeps {lacking}, which the teacher did not give; it gave "
                f"{sorted(values)}"
            )
        encoded = {n: f.encode(values[n].detach(), ids, draw) for n, f in self.fields.items()}
        table: Tensor | None = None
        for owner, column, offset in self._places:
            value = encoded[owner.name][column.name].to(DTYPES[column.dtype])
            flat = value.reshape(len(ids), -1).contiguous().view(torch.uint8).cpu()
            if column.bytes == self.stride:
                return flat.numpy()
            if table is None:
                table = torch.zeros(len(ids), self.stride, dtype=torch.uint8)
            table[:, offset : offset + column.bytes] = flat
        assert table is not None
        return table.numpy()

    def _put(self, rows: Rows, table: Bytes) -> None:
        if not _increasing(rows):
            order = np.argsort(rows, kind="stable")
            rows, table = rows[order], table[order]
        if not self._files:
            names = [_shard_name(n) for n in range(len(self._maps))]
            self._files = [os.open(self.path / name, os.O_RDWR) for name in names]
        try:
            for shard, first, start, stop in _runs(rows, self.header.shard_records):
                part = np.ascontiguousarray(table[start:stop]).data.cast("B")
                write_all(self._files[shard], part, first * self.stride)
        except OSError as error:
            self._refuse_full(error)

    def _refuse_full(self, error: OSError) -> NoReturn:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise error
        with contextlib.suppress(OSError):
            self.flush()
        needed = (self.header.records - self.finished) * self.stride
        raise CheckpointError(
            f"the disk is full: {needed:,} bytes more are needed for the store {self.path}, "
            f"{shutil.disk_usage(self.path).free:,} are free; {self.finished:,} of "
            f"{self.header.records:,} records are kept: make room and run the same command again"
        ) from error

    def flush(self) -> None:
        """Bring what was written to the disk, then say that it is there."""
        self._saved = time.monotonic()
        if not self._pending:
            return
        own = self._own()
        rows = np.concatenate(self._pending)
        for shard in _distinct(rows // self.header.shard_records):
            os.fsync(self._files[int(shard)])
        for block in _distinct(rows // self.header.block_records):
            inside = np.arange(*self._block_rows(int(block)))
            own.sums[block] = self._sum(inside[own.has(inside)])
        own.save()
        self._pending.clear()
        self._saved = time.monotonic()

    def close(self) -> None:
        """Flush, and let other processes write."""
        if self._writer is None:
            return
        self.flush()
        if self._own().sequence:
            self._own().save()  # both slots then say the same: either may be damaged
        for handle in self._files:
            os.close(handle)
        self._files = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._writer = None

    def __contains__(self, key: tuple[Tensor, int | Tensor]) -> bool:
        """Whether all records of (ids, draw) are there; for `Job.map`."""
        return bool(self.has(*key).all())

    def put(self, key: tuple[Tensor, int | Tensor], value: Mapping[str, Tensor]) -> None:
        """Write the records of (ids, draw); for `Job.map`."""
        self.write(key[0], value, key[1])

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading -----------------------------------------------------------------------------

    def read(
        self,
        ids: Tensor,
        draw: int | Tensor = 0,
        *,
        names: Iterable[str] | None = None,
        device: torch.device | str | None = None,
        missing: str = "error",
    ) -> tuple[dict[str, Value], Tensor | None]:
        """The records of a batch: one gather, whatever the number of fields.

        Args:
            ids: (B,) sample ids.
            draw: augmentation number, one or (B,); ignored when samples are kept as they are.
            names: fields to return; all when None.
            device: where the values are wanted; bytes are moved in their stored form.
            missing: "error" refuses records that are not there, "mask" marks them.

        Returns:
            Values by field name, float32 (ids of classes int64), and a (B,) mask of the rows
            that are there, None when all are. Rows that are not there hold zeros.

        Raises:
            TeacherError: a record or a field is not there.
            CheckpointError: a block is damaged.
        """
        if self._pending:
            self.flush()
        rows = self._rows(ids, draw)
        valid = self._valid(rows, ids, draw, missing)
        if valid is not None:
            rows = np.where(valid, rows, 0)
        if not self._all_checked:
            self._check_blocks(rows if valid is None else rows[valid])
        raw = torch.from_numpy(self._gather(rows))
        if not len(raw):  # numpy's empty arrays have no strides to view other numbers by
            raw = torch.empty(raw.shape, dtype=raw.dtype)
        there = None if valid is None else torch.from_numpy(valid)
        if there is not None:
            raw[~there] = 0
        if device is not None and torch.device(device).type != "cpu":
            raw = raw.to(device, non_blocking=True)
            there = None if there is None else there.to(device, non_blocking=True)
        return self._decode(raw, names), there

    def _valid(
        self, rows: Rows, ids: Tensor, draw: int | Tensor, missing: str
    ) -> npt.NDArray[np.bool_] | None:
        known = rows >= 0
        if known.all() and (self.complete or self._has(rows).all()):
            return None
        valid = known & self._has(np.maximum(rows, 0))
        if missing == "mask":
            return valid
        bad = ids[torch.from_numpy(~valid).to(ids.device)].tolist()
        which = "" if not self.header.draws else f", draw {_draw_text(draw)}"
        why = (
            f"it keeps draws 0 to {self.header.draws - 1} of {self.header.samples:,} samples"
            if not known.all()
            else f"{self.finished:,} of {self.header.records:,} records are finished"
        )
        raise TeacherError(
            f"the store {self.path} lacks {len(bad)} records (sample ids {bad[:5]}"
            f"{', ...' if len(bad) > 5 else ''}{which}): {why}; finish the capture, or read "
            "with missing: mask"
        )

    def _check_blocks(self, rows: Rows) -> None:
        blocks = _distinct(rows // self.header.block_records)
        blocks = blocks[~self._checked[blocks]]
        bad = [int(b) for b in blocks if not self._sound(int(b))]
        if bad:
            self._refuse_damage(bad)
        self._checked[blocks] = True
        self._all_checked = bool(self._checked.all())

    def _gather(self, rows: Rows) -> Bytes:
        if len(self._maps) == 1:
            return np.take(self._maps[0], rows, axis=0)
        out = np.empty((len(rows), self.stride), dtype=np.uint8)
        shards, inside = np.divmod(rows, self.header.shard_records)
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            out[at] = np.take(self._maps[shard], inside[at], axis=0)
        return out

    def _decode(self, raw: Tensor, names: Iterable[str] | None) -> dict[str, Value]:
        wanted = list(self.fields) if names is None else list(names)
        for name in wanted:
            if name not in self.fields:
                raise TeacherError(
                    f"the store {self.path} keeps no '{name}'{nearest(name, self.fields)}"
                )
        columns: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
        for owner, column, offset in self._places:
            if owner.name in columns:
                part = raw[:, offset : offset + column.bytes].view(DTYPES[column.dtype])
                columns[owner.name][column.name] = part.reshape(len(raw), *column.shape)
        return {name: self.fields[name].decode(columns[name]) for name in wanted}


def _draw_text(draw: int | Tensor) -> str:
    if isinstance(draw, int):
        return str(draw)
    return f"{int(draw.min())} to {int(draw.max())}"


def _draws_text(draws: int) -> str:
    return f"{draws} augmentations of each sample" if draws else "samples as they are"


def _plain(ids: Rows | None) -> Rows | None:
    """None when the ids are 0..N-1, which need no file."""
    if ids is None or np.array_equal(ids, np.arange(len(ids))):
        return None
    return ids


def _refuse_bad_ids(folder: Path, ids: Rows | None, count: int) -> None:
    if count < 1:
        raise DataError(f"the store {folder} would be empty: there are no samples")
    if ids is None:
        return
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1]
        raise DataError(
            f"{len(twice)} sample ids occur more than once ({twice[:5].tolist()}): a store "
            "needs one id per sample"
        )


def _shard_name(number: int) -> str:
    return f"records-{number:05d}.bin"


def _shard_rows(header: Header) -> Iterator[int]:
    for start in range(0, header.records, header.shard_records):
        yield min(header.shard_records, header.records - start)


def _read_header(folder: Path) -> Header:
    path = folder / "header.json"
    if not path.exists():
        raise CheckpointError(f"there is no teacher store at {folder}: {path.name} is missing")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(
            f"the header of the store {path} is damaged (it is no text); delete the folder and "
            "capture again"
        ) from None
    return Header.parse(text, path)


def _begin(folder: Path, header: Header, ids: Rows | None, stride: int) -> None:
    """Make the files; the header comes last, so that a killed beginning counts for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("records-*.bin"), *folder.glob("done-*.[ab]")]:
        old.unlink()
    needed = header.records * stride
    try:
        # Not every file system can reserve room.
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for number, rows in enumerate(_shard_rows(header)):
            _allocate(folder / _shard_name(number), rows * stride)
        if ids is not None:
            write_atomic(folder / "ids.bin", ids.tobytes())
        write_atomic(folder / "header.json", header.text().encode())
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free = shutil.disk_usage(folder).free
        for made in folder.glob("records-*.bin"):
            made.unlink()
        raise CheckpointError(
            f"the disk has no room for the store {folder}: it needs {needed:,} bytes, "
            f"{free:,} are free; nothing was begun"
        ) from error


def _refuse_difference(folder: Path, found: Header, wanted: Header) -> None:
    found.check(
        folder,
        teacher=wanted.teacher,
        data=wanted.data,
        preprocessing=wanted.preprocessing,
        draws=wanted.draws,
        views=wanted.views,
        edition=wanted.edition,
    )
    if (found.samples, found.ids_sha) != (wanted.samples, wanted.ids_sha):
        raise TeacherError(
            f"the store {folder} holds {found.samples:,} other samples, the run reads "
            f"{wanted.samples:,}; capture into another folder"
        )
    if found.fields != wanted.fields:
        raise TeacherError(
            f"the store {folder} keeps {_fields_text(found.fields)}, the run wants "
            f"{_fields_text(wanted.fields)}; capture into another folder, or change the recipe"
        )


def _fields_text(fields: Sequence[Field]) -> str:
    parts = []
    for f in fields:
        how = f.dtype if f.form == "dense" else f"k {f.k}, temperature {f.temperature:g}"
        parts.append(f"{f.name} {f.shape} ({f.form}, {how})")
    return "; ".join(parts)


def _allocate(path: Path, size: int) -> None:
    """Make a file of `size` bytes and reserve its room, so that it is refused early."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(handle, size)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(handle, 0, size)
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _free(path: Path, *, held: bool) -> Iterator[bool]:
    """Whether a writer's lock is ours or can be had; no other process touches its slots then."""
    if held:
        yield True
        return
    with path.open("a+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _map_file(path: Path, rows: int, stride: int) -> Bytes:
    with path.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), rows * stride, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM") and rows * stride > memory_room():
        # What is read ahead would push out what is needed, 128 KiB for every record.
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=np.uint8).reshape(rows, stride)


def _increasing(rows: Rows) -> bool:
    """Whether no row occurs twice and all are in the order of the file."""
    return bool((rows[1:] > rows[:-1]).all())


def _distinct(numbers: Rows) -> Rows:
    """Sorted, each once; numpy's own way imports, on its first call, what takes 30 ms."""
    ordered = np.sort(numbers)
    keep = np.ones(len(ordered), dtype=np.bool_)
    keep[1:] = ordered[1:] != ordered[:-1]
    return ordered[keep]


def memory_room() -> int:
    """Bytes of memory that pages of files may fill: what is available, within a cgroup's limit."""
    room = [1 << 62]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        room.append(next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            home = Path("/sys/fs/cgroup") / ("memory" if controllers else "") / group.strip("/")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            if controllers in {"", "memory"}:
                with contextlib.suppress(OSError, ValueError):
                    room.append(int((home / name).read_text()))
    return min(room)


def _runs(rows: Rows, shard_records: int) -> Iterator[tuple[int, int, int, int]]:
    """Contiguous stretches of sorted rows: (shard, first row in it, start, stop)."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and first // shard_records == last // shard_records:
        yield first // shard_records, first % shard_records, 0, len(rows)
        return
    shards = rows // shard_records
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for start, stop in itertools.pairwise(edges):
        shard = int(shards[start])
        yield shard, int(rows[start]) - shard * shard_records, start, stop


__all__ = ["Field", "Header", "Missing", "Store", "key_of", "memory_room"]
