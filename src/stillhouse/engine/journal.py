"""An append-only journal of answers: nothing that has reached us is ever asked for twice.

One JSON line per finished item, flushed before the item counts as done and synchronised to
disk every N lines. Lines carry a checksum: a torn last line (the process died while
writing) is dropped, a damaged line in the middle is told with its number. A small side file
holds what is on its way, so that a restart can say how many requests may go out twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from stillhouse.errors import CheckpointError, RunFolderError
from stillhouse.teacher import Reply, Request

_KEY_BYTES = 64
_FSYNC_SECONDS = 2.0
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode  # made once: dumps makes one per line


class Price(NamedTuple):
    """Money per million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0


class Account(NamedTuple):
    """What the answers in a journal have used.

    Attributes:
        answers: finished requests.
        attempts: requests sent for them, failed ones included.
        prompt_tokens: as the server counted.
        completion_tokens: as the server counted.
        seconds: sum of latencies.
        cost: at the price asked with.
    """

    answers: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float


class Journal:
    """Answers on disk by key, appended one line at a time.

    Memory holds one key and one file position per line; answers are read back when asked
    for. Iteration goes in key order, so what is made from a journal does not depend on the
    order in which answers arrived.

    Args:
        path: the JSONL file; made when absent, its folder too.
        fsync_every: lines between two synchronisations to disk; seconds count too, so that
            slow answers are synchronised one by one (each line is flushed to the operating
            system at once, which survives a killed process, not a power cut).
        write: False opens it for reading only: no lock, no file is made or changed.

    Attributes:
        path: the JSONL file.
        uncertain: keys that were on their way when the last writer died: those requests
            may be sent twice, at most as many as were in flight at once.
        torn: a half-written last line was dropped on opening.

    Raises:
        RunFolderError: another process is writing to it.
        CheckpointError: a line in the middle is damaged.
    """

    def __init__(self, path: str | Path, *, fsync_every: int = 256, write: bool = True) -> None:
        self.path = Path(path)
        self.uncertain: tuple[str, ...] = ()
        self.torn = False
        self._fsync_every = max(1, fsync_every)
        self._unsynced = 0
        self._synced = time.monotonic()
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None
        self._places: dict[str, int] = {}
        self._used = [0, 0, 0.0, 0]  # prompt and completion tokens, seconds, attempts
        self._lock: IO[str] | None = None
        self._flight: _Flight | None = None
        self._file: IO[bytes] | None = None
        self._out = -1
        self._end = 0
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path.with_name(self.path.name + ".lock"))
        try:
            self._open(write)
        except BaseException:
            self.close()
            raise

    def _open(self, write: bool) -> None:
        if write:
            self._out = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if not self.path.exists():
            return
        self._file = self.path.open("rb")
        self._end = self._load(self._file)
        if not write:
            return
        os.ftruncate(self._out, self._end)
        self._flight = _Flight(self.path.with_name(self.path.name + ".flight"))
        self.uncertain = tuple(k for k in self._flight.left_over if k not in self._places)

    def _load(self, file: IO[bytes]) -> int:
        """Index every line; return where the sound part of the file ends."""
        position = 0
        for number, line in enumerate(file, 1):
            whole = line.endswith(b"\n")
            entry = _parse(line) if whole else None
            if entry is None:
                self.torn = not whole or not file.read(1)
                if self.torn:
                    break
                raise CheckpointError(
                    f"{self.path}: line {number} is damaged (its checksum does not fit). "
                    f"The other lines are untouched: delete line {number} to have that "
                    "request asked again, or restore the file"
                )
            self._index(entry, position)
            position += len(line)
        return position

    def _index(self, entry: Mapping[str, Any], position: int) -> None:
        usage = entry.get("usage") or {}
        self._places[entry["key"]] = position
        self._used[0] += int(usage.get("prompt_tokens") or 0)
        self._used[1] += int(usage.get("completion_tokens") or 0)
        self._used[2] += float(entry.get("latency") or 0.0)
        self._used[3] += int(entry.get("attempts") or 1)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def keys(self) -> list[str]:
        """All keys, sorted."""
        return sorted(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Entries in key order, one at a time."""
        for key in self.keys():
            yield self[key]

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The entry written under `key`.

        Raises:
            KeyError: it is not in the journal.
        """
        place = self._places[key]
        if self._file is None:
            raise CheckpointError(f"{self.path} is closed")
        self._file.seek(place)
        entry = _parse(self._file.readline())
        if entry is None:
            raise CheckpointError(f"{self.path}: the entry at byte {place} no longer reads")
        return entry

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Append an entry under `key` and flush it; the item counts as done afterwards.

        Args:
            key: 64 hexadecimal digits (sha256).
            value: fields JSON can hold. `usage`, `latency` and `attempts` enter the account.

        Raises:
            CheckpointError: the journal is open for reading only, or the disk is full.
        """
        if self._out < 0:
            raise CheckpointError(f"{self.path} is open for reading only")
        if len(key) != _KEY_BYTES:
            raise CheckpointError(f"a journal key has 64 characters, got {len(key)}: {key!r}")
        if key in self._places:
            return
        entry = {"key": key, **value}
        line = _line(entry)
        try:
            _write_whole(self._out, line)
        except OSError as error:
            # Half a line must not be followed by whole ones.
            with contextlib.suppress(OSError):
                os.ftruncate(self._out, self._end)
            raise CheckpointError(
                f"{self.path}: an answer could not be written ({error.strerror or error}); "
                "everything before it is kept. Make room and run again"
            ) from error
        self._index(entry, self._end)
        self._end += len(line)
        self._unsynced += 1
        late = time.monotonic() - self._synced >= _FSYNC_SECONDS
        if late or self._unsynced >= self._fsync_every:
            self._flush_soon()

    def put_reply(
        self,
        request: Request,
        draw: int,
        reply: Reply,
        *,
        attempts: int = 1,
        key: str | None = None,
    ) -> None:
        """Append the answer to a request, with the request itself and the raw reply.

        Args:
            request: what was asked.
            draw: which of several answers to it.
            reply: what came back.
            attempts: tries it took.
            key: `request.key(draw)` where the caller has it already.
        """
        value = {
            "record": request.record,
            "draw": draw,
            "request": request.canonical(),
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "usage": dict(reply.usage),
            "latency": round(reply.latency, 4),
            "attempts": attempts,
            "raw": dict(reply.raw),
        }
        if reply.logprobs is not None:
            value["logprobs"] = reply.logprobs
        self.put(key or request.key(draw), value)

    def reply(self, key: str) -> Reply:
        """The reply written under `key`.

        Raises:
            KeyError: it is not in the journal.
        """
        entry = self[key]
        return Reply(
            text=entry["text"],
            finish_reason=entry["finish_reason"],
            logprobs=entry.get("logprobs"),
            usage=entry["usage"],
            raw=entry["raw"],
            latency=entry["latency"],
        )

    @contextlib.contextmanager
    def sending(self, key: str) -> Iterator[None]:
        """Mark `key` as on its way while the block runs.

        A process killed inside the block leaves the mark; the next one finds the key in
        `uncertain` unless its answer was written.
        """
        if self._flight is None:
            raise CheckpointError(f"{self.path} is open for reading only")
        slot = self._flight.begin(key)
        try:
            yield
        except Exception:
            self._flight.end(slot)
            raise
        # Whatever else ends the block (cancelled, interrupted) leaves the mark: the request
        # may have been answered without our hearing of it.
        self._flight.end(slot)

    def account(self, price: Price | None = None) -> Account:
        """Tokens, seconds and money of all answers in the journal (free without a price)."""
        price = price or Price()
        prompt, completion, seconds, attempts = self._used
        return Account(
            answers=len(self),
            attempts=int(attempts),
            prompt_tokens=int(prompt),
            completion_tokens=int(completion),
            seconds=float(seconds),
            cost=(prompt * price.prompt + completion * price.completion) / 1e6,
        )

    def _flush_soon(self) -> None:
        """Force it onto the disk in a thread: who asks many questions must not wait for it."""
        if self._syncing is not None and not self._syncing.done():
            return  # the next line tries again
        self._settle()
        if self._syncer is None:
            self._syncer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._syncing = self._syncer.submit(os.fsync, self._out)
        self._unsynced = 0
        self._synced = time.monotonic()

    def _settle(self) -> None:
        """Wait for the thread, and tell what went wrong there."""
        begun, self._syncing = self._syncing, None
        if begun is not None:
            begun.result()

    def flush(self) -> None:
        """Force what was written onto the disk; it is there on return."""
        self._settle()
        if self._out >= 0 and self._unsynced:
            os.fsync(self._out)
        self._unsynced = 0
        self._synced = time.monotonic()

    def close(self) -> None:
        """Synchronise and release the lock; afterwards nothing can be read or written."""
        try:
            self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        if self._syncer is not None:
            self._syncer.shutdown()
            self._syncer = None
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._flight is not None:
            self._flight.close()
            self._flight = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Flight:
    """Keys on their way, in fixed slots of a small file: no growth, no synchronisation.

    What a killed process has written stays in the page cache, which is all that is needed.
    """

    def __init__(self, path: Path) -> None:
        left = path.read_bytes() if path.exists() else b""
        slots = [left[i : i + _KEY_BYTES] for i in range(0, len(left), _KEY_BYTES)]
        self.left_over = [s.decode("ascii", "replace") for s in slots if s.strip(b"\0 ")]
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._free: list[int] = []
        self._slots = 0

    def begin(self, key: str) -> int:
        if not self._free:
            self._free.append(self._slots)
            self._slots += 1
        slot = self._free.pop()
        os.pwrite(self._handle, key.encode("ascii"), slot * _KEY_BYTES)
        return slot

    def end(self, slot: int) -> None:
        os.pwrite(self._handle, b"\0" * _KEY_BYTES, slot * _KEY_BYTES)
        self._free.append(slot)

    def close(self) -> None:
        os.close(self._handle)
        self._handle = -1


def _lock(path: Path) -> IO[str]:
    """Hold `path` until closed; the system lets go of it when the process dies."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunFolderError(
            f"{path.with_suffix('')} is being written by another process (id {holder}): "
            "wait for it, stop it, or use another run folder"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _write_whole(handle: int, line: bytes) -> None:
    while line:
        line = line[os.write(handle, line) :]


def _line(entry: Mapping[str, Any]) -> bytes:
    text = _ENCODE(entry)
    check = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return f'{text[:-1]}, "crc": {check}}}\n'.encode("utf-8", "surrogatepass")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None when it is torn or damaged."""
    body, _, tail = line.rstrip(b"\n").rpartition(b', "crc": ')
    try:
        if not tail.endswith(b"}") or zlib.crc32(body + b"}") != int(tail[:-1]):
            return None
        entry = json.loads(body.decode("utf-8", "surrogatepass") + "}")
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "key" in entry else None
