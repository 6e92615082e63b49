"""Which records of a store are finished, in a form that a kill at any moment leaves whole.

Two slots are written in place by turns, each with a sequence number and a checksum: one of
them is always whole, and saying that a record is finished needs no further disk space.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stillhouse.errors import CheckpointError

Rows = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_VERSION = 1
_MAGIC = b"STLHDONE"
_SLOT = struct.Struct("<8sIIQQQ")  # magic, version, crc32 of the rest, sequence, records, blocks


class Finished:
    """The bitmap and the checksums of one writer, in two alternating slots."""

    def __init__(self, base: Path, records: int, blocks: int) -> None:
        self.base = base
        self.records = records
        self.bits: Bytes = np.zeros(-(-records // 8), dtype=np.uint8)
        self.sums: npt.NDArray[np.uint32] = np.zeros(blocks, dtype=np.uint32)
        self.sequence = 0
        self.damaged: list[str] = []
        best = max((self._read(name) for name in "ab"), key=lambda slot: slot[0])
        if best[0]:
            self.sequence, self.bits, self.sums = best
        elif len(self.damaged) == 2:
            raise CheckpointError(
                f"both progress files {base.name}.a and .b of the store {base.parent} are "
                "damaged, so it is not known which records are whole; delete the folder and "
                "capture again"
            )

    def _path(self, name: str) -> Path:
        return self.base.with_name(f"{self.base.name}.{name}")

    def _read(self, name: str) -> tuple[int, Bytes, npt.NDArray[np.uint32]]:
        nothing = (0, self.bits, self.sums)
        try:
            raw = self._path(name).read_bytes()
        except FileNotFoundError:
            return nothing
        expected = _SLOT.size + self.bits.nbytes + self.sums.nbytes
        if len(raw) == expected:
            magic, version, crc, sequence, records, blocks = _SLOT.unpack_from(raw)
            right = (magic, version) == (_MAGIC, _VERSION) and zlib.crc32(raw[16:]) == crc
            if right and (records, blocks) == (self.records, len(self.sums)):
                start = _SLOT.size
                bits = np.frombuffer(raw, np.uint8, self.bits.size, start).copy()
                sums = np.frombuffer(raw, np.uint32, self.sums.size, start + bits.size).copy()
                return sequence, bits, sums
        self.damaged.append(name)
        return nothing

    def has(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of the records are finished."""
        found: npt.NDArray[np.uint8] = (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1
        return found.astype(np.bool_)

    def mark(self, rows: Rows) -> None:
        """Set the bits of records; they count once saved."""
        np.bitwise_or.at(self.bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))

    def forget(self, rows: Rows) -> None:
        """Clear the bits of records."""
        keep = ~np.left_shift(1, rows & 7).astype(np.uint8)
        np.bitwise_and.at(self.bits, rows >> 3, keep)

    def save(self) -> None:
        """Write the older slot, whole, and wait until it is on the disk."""
        self.sequence += 1
        tail = struct.pack("<QQQ", self.sequence, self.records, len(self.sums))
        tail += self.bits.tobytes() + self.sums.tobytes()
        head = struct.pack("<8sII", _MAGIC, _VERSION, zlib.crc32(tail))
        handle = os.open(self._path("ab"[self.sequence % 2]), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            write_all(handle, memoryview(head + tail), 0)
            os.fsync(handle)
        finally:
            os.close(handle)


def write_all(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a full disk raises here, where a memory map would kill."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
