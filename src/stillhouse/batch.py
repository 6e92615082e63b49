"""What is read: batches, the sources they come from, the order of reading, the splits."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from stillhouse.clock import Views
from stillhouse.errors import DataError, nearest

Sample = dict[str, Any]
# What one step reads: (B,) int64 positions in a source, or `StreamRows` of several sources.
Rows = Any

_TOGETHER_BYTES = 1 << 18  # read at once it is still in the processor's cache when it is used
RESERVED = ("id", "draw", "rows", "of", "target", "weight", "mask")


class RowView:
    """A view that is no tensor: its rows are parts of something larger that comes along whole.

    Nodes of a graph are such: what is said of one depends on the others.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """What tells it from any other."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> RowView:
        """The rows at these places, (B,) int64, in this order."""
        raise NotImplementedError

    def narrow(self, start: int, stop: int) -> RowView:
        """Rows [start, stop)."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> RowView:
        """On a device; itself when it is there."""
        raise NotImplementedError


class Batch(dict[str, Any]):
    """Named views of B samples; nested batches are streams.

    Reserved keys: `id` (B,) int64 content ids; `draw` augmentation number (an integer, equal
    for all rows, or (B,)); `rows` positions in the global batch (a slice until rows are
    selected, then (B,) int64); `of` rows of the global batch; `target`; `weight`; `mask`.
    All other keys are views: "x" when there is only one. Values are tensors or lists with
    one entry per row.
    """

    @property
    def size(self) -> int:
        """Number of rows B."""
        ids = self.get("id")
        if ids is not None:
            return len(ids)
        streams = self.streams
        if streams:
            return sum(stream.size for stream in streams.values())
        for key, value in self.items():
            if key in {"rows", "of", "draw"}:
                continue
            if isinstance(value, Batch):
                return value.size
            if isinstance(value, (Tensor, list, RowView)) and not (
                isinstance(value, Tensor) and value.ndim == 0
            ):
                return len(value)
        raise DataError("a batch without rows: it holds no tensor or list")

    @property
    def streams(self) -> dict[str, Batch]:
        """The nested batches by name, when this batch holds nothing else; else empty.

        Streams have rows of their own, of different number: labelled and unlabelled samples.
        """
        nested = {k: v for k, v in self.items() if k not in {"rows", "of", "draw"}}
        whole = bool(nested) and all(isinstance(value, Batch) for value in nested.values())
        return nested if whole else {}

    @property
    def of(self) -> int:
        """Rows of the global batch this one is a part of (its own size when alone)."""
        if "of" in self:
            return int(self["of"])
        self._refuse_streams("has no rows of its own")
        return self.size

    @property
    def rows(self) -> Tensor:
        """(B,) positions of the rows in the global batch."""
        self._refuse_streams("has no rows of its own")
        rows = self.get("rows", slice(0, self.size))
        return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows

    @property
    def device(self) -> torch.device:
        """The device of the first tensor that is found."""
        for value in self.values():
            if isinstance(value, Tensor) or (isinstance(value, Batch) and len(value)):
                return value.device
        return torch.device("cpu")

    def view(self, path: str = "x") -> Any:
        """The view named by `path`; streams are walked with slashes ("unlabelled/x").

        Raises:
            DataError: no such view; the nearest are named.
        """
        if path in self:
            return self[path]
        found: Any = self
        for part in path.split("/"):
            if not isinstance(found, dict) or part not in found:
                known = [k for k in found if k not in RESERVED] if isinstance(found, dict) else []
                raise DataError(f"the batch has no view '{path}'{nearest(part, known)}")
            found = found[part]
        return found

    def select(self, rows: Tensor) -> Batch:
        """The rows whose numbers (int64) or flags (bool) are given, in that order."""
        self._refuse_streams("cannot be selected from by row")
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        chosen = {k: _take(v, rows) for k, v in self.items() if k not in {"rows", "of"}}
        return Batch(chosen, rows=self.rows[rows.cpu()], of=self.of)

    def split(self, pieces: int) -> list[Batch]:
        """`pieces` contiguous micro-batches of nearly equal size; empty ones are left out.

        Of streams each piece holds a share of every stream, which may be no row at all.
        """
        if pieces <= 1:
            return [self]
        streams = self.streams
        if streams:
            parts = [Batch() for _ in range(pieces)]
            for name, stream in streams.items():
                for piece, part in enumerate(parts):
                    start, stop = (stream.size * (piece + k) // pieces for k in (0, 1))
                    part[name] = stream.narrow(start, stop)
            return [part for part in parts if part.size > 0]
        size, start = self.size, 0
        parts = []
        for piece in range(pieces):
            stop = size * (piece + 1) // pieces
            if stop > start:
                parts.append(self.narrow(start, stop))
            start = stop
        return parts

    def cut(self, sizes: Sequence[int]) -> list[Batch]:
        """Consecutive pieces of these sizes, as views on the same memory, one call per view.

        For a batch as a source gives it: `rows` and `of` are left out.
        """
        whole = {k: _pieces(v, sizes) for k, v in self.items() if k not in {"rows", "of"}}
        return [Batch({k: v[n] for k, v in whole.items()}) for n in range(len(sizes))]

    def narrow(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) as a view on the same memory."""
        cut = {k: _cut(v, start, stop) for k, v in self.items() if k not in {"rows", "of"}}
        rows = self.get("rows", slice(0, self.size))
        if isinstance(rows, slice):
            rows = slice(rows.start + start, rows.start + stop)
        else:
            rows = rows[start:stop]
        return Batch(cut, rows=rows, of=self.of)

    def _refuse_streams(self, what: str) -> None:
        if "id" not in self and self.streams:
            names = ", ".join(f"'{name}'" for name in self.streams)
            raise DataError(f"a batch of streams {what}; take one of them: {names}")

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`; itself when it is there already."""
        target = torch.device(device)
        if target == self.device:
            return self
        moved = {
            k: v.to(target, non_blocking=True)
            if isinstance(v, Tensor) and k != "rows"
            else v.to(target)
            if isinstance(v, (Batch, RowView))
            else v
            for k, v in self.items()
        }
        return Batch(moved)


def _take(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        # Half the time of `value[rows]`, which steps of a millisecond feel.
        return value if value.ndim == 0 else value.index_select(0, rows.to(value.device))
    if isinstance(value, (Batch, RowView)):
        return value.select(rows)
    if isinstance(value, list):
        return [value[i] for i in rows.tolist()]
    return value


def _pieces(value: Any, sizes: Sequence[int]) -> Sequence[Any]:
    if isinstance(value, Tensor) and value.ndim:
        return torch.split(value, list(sizes))
    if isinstance(value, Batch):
        return value.cut(sizes)
    if isinstance(value, RowView):
        ends = list(itertools.accumulate(sizes))
        return [value.narrow(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if isinstance(value, list):
        ends = list(itertools.accumulate(sizes))
        return [value[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return [value] * len(sizes)


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value if value.ndim == 0 else value[start:stop]
    if isinstance(value, (Batch, RowView)):
        return value.narrow(start, stop)
    if isinstance(value, list):
        return value[start:stop]
    return value


@runtime_checkable
class Source(Protocol):
    """Any data. All augmentation uses the generator that is handed in.

    One geometric draw must serve every view, box and mask of a sample. A source may also
    offer `read(ids, views) -> Batch`, a batched fast path, which steps of a millisecond
    need, and `id_of(i)`, the content id of position i (the position when absent).
    """

    @property
    def fingerprint(self) -> str:
        """What tells this data, and how it is read, from any other."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """The sample at position `item[0]`; with a generator it is augmented by it."""
        ...


class TensorSource:
    """Samples that lie in memory as tensors, optionally augmented batch-wise.

    Args:
        views: name to tensor (N, ...) or list of N; `target` among them when labelled.
        augment: `augment(batch, views)` returns the batch with augmented views; it draws
            from `views.uniform(batch["id"], stream, n)` only.
        ids: (N,) content ids; positions when not given.
        name: what the data is called, part of the fingerprint.
        scale: uint8 views named "x" are divided by 255 on reading when True.

    Raises:
        DataError: no rows, or views of different length.
    """

    def __init__(
        self,
        views: Mapping[str, Any],
        *,
        augment: Callable[[Batch, Views], Batch] | None = None,
        ids: Tensor | None = None,
        name: str = "tensors",
        scale: bool = True,
    ) -> None:
        sizes = {k: len(v) for k, v in views.items()}
        if not sizes or min(sizes.values()) == 0:
            raise DataError(f"the data set '{name}' is empty (rows per view: {sizes})")
        if len(set(sizes.values())) > 1:
            raise DataError(f"the views of '{name}' differ in length: {sizes}")
        self.views = dict(views)
        self.augment = augment
        self.ids = torch.arange(len(self)) if ids is None else ids
        self.name = name
        self.scale = scale
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the content, the ids and the name of the augmentation."""
        if not self._fingerprint:
            self._fingerprint = _content_hash(self.name, self.views, self.ids, self.augment)
        return self._fingerprint

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        """One sample; augmented by the generator where there is one."""
        views = None
        if self.augment is not None and item[1] is not None:
            views = Views(int(torch.randint(0, 1 << 31, (), generator=item[1])))
        return {k: v[0] for k, v in self.read(torch.tensor([int(item[0])]), views).items()}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that is read; 0 when a reading is more than its rows, one by one."""
        if self.augment is not None or type(self).read is not TensorSource.read:
            return 0
        return sum(_row_bytes(v, self.scale) for v in self.views.values())

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """The samples at positions `rows`; augmented unless `views` is None."""
        batch = self._gather(rows)
        if self.augment is not None and views is not None:
            batch = self.augment(batch, views)
        return batch

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        return int(self.ids[index])

    def _gather(self, rows: Tensor) -> Batch:
        batch = Batch(id=_take(self.ids, rows))
        for name, value in self.views.items():
            taken = _take(value, rows)
            if self.scale and isinstance(taken, Tensor) and taken.dtype == torch.uint8:
                taken = taken.float().div_(255.0)
            batch[name] = taken
        return batch


def _row_bytes(value: Any, scale: bool) -> int:
    if not isinstance(value, Tensor):
        return 64
    widened = 4 if scale and value.dtype == torch.uint8 else 1
    return int(value[0].numel()) * value.element_size() * widened


def _content_hash(name: str, views: Mapping[str, Any], ids: Tensor, augment: Any) -> str:
    digest = hashlib.sha256(name.encode())
    digest.update(
        repr(getattr(augment, "fingerprint", getattr(augment, "__qualname__", ""))).encode()
    )
    for key in sorted(views):
        value = views[key]
        digest.update(key.encode())
        if isinstance(value, Tensor):
            digest.update(str((tuple(value.shape), value.dtype)).encode())
            # The memory itself, not a copy of it: the tensor may be a mapped file of many GB.
            flat = value.contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        else:
            for entry in value:
                digest.update(repr(entry).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()[:32]


class Subset:
    """Some samples of a source, by position; ids stay those of the source."""

    def __init__(self, source: Source, rows: Tensor) -> None:
        if len(rows) == 0:
            raise DataError("a subset without rows")
        self.source = source
        self.rows = rows.long()

    @property
    def fingerprint(self) -> str:
        """Of the source and the rows."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(self.rows.numpy().tobytes())
        return digest.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        return self.source[int(self.rows[int(item[0])]), item[1]]

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        inner = int(self.rows[index])
        find = getattr(self.source, "id_of", None)
        return int(find(inner)) if find is not None else inner

    @property
    def row_bytes(self) -> int:
        """Of the source; 0 where it does not say."""
        return int(getattr(self.source, "row_bytes", 0))

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """As the source reads; see `read_rows`."""
        return read_rows(self.source, self.rows[rows], views)


class Joined:
    """Several sources one after another, read as one; ids stay those of the sources.

    A view that one of them lacks (the target of unlabelled rows) is left out.

    Args:
        sources: at least one.

    Attributes:
        sources: as given.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        if not sources:
            raise DataError("nothing to join: no source is given")
        self.sources = list(sources)
        self._ends = torch.tensor([len(source) for source in self.sources]).cumsum(0)

    @property
    def fingerprint(self) -> str:
        """Of the sources, in order."""
        text = "|".join(source.fingerprint for source in self.sources)
        return hashlib.sha256(f"joined|{text}".encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        number = int(torch.searchsorted(self._ends, index, right=True))
        source = self.sources[number]
        return source, index - int(self._ends[number]) + len(source)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        source, index = self._place(int(item[0]))
        return source[index, item[1]]

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        source, own = self._place(int(index))
        find = getattr(source, "id_of", None)
        return int(find(own)) if find is not None else own

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """As the sources read, in the order of `rows`."""
        owner = torch.searchsorted(self._ends, rows, right=True)
        pieces, places = [], []
        for number, source in enumerate(self.sources):
            own = (owner == number).nonzero()[:, 0]
            if len(own):
                first = int(self._ends[number]) - len(source)
                pieces.append(read_rows(source, rows[own] - first, views))
                places.append(own)
        joined = _concatenated(pieces)
        return Batch({k: _take(v, torch.cat(places).argsort()) for k, v in joined.items()})


def together(splits: Mapping[str, Source], roles: Sequence[str]) -> Source:
    """The splits of these roles as one source: itself when there is one."""
    return splits[roles[0]] if len(roles) == 1 else Joined([splits[role] for role in roles])


def _concatenated(pieces: Sequence[Batch]) -> Batch:
    """Batches under one another: the views that all of them have."""
    if len(pieces) == 1:
        return pieces[0]
    joined = Batch()
    for name in [key for key in pieces[0] if all(key in piece for piece in pieces)]:
        values = [piece[name] for piece in pieces]
        if isinstance(values[0], Tensor) and values[0].ndim > 0:
            joined[name] = torch.cat(values)
        elif isinstance(values[0], list):
            joined[name] = [entry for value in values for entry in value]
        else:
            joined[name] = values[0]
    return joined


def read_rows(
    source: Source,
    rows: Tensor,
    views: Views | None,
    collate: Callable[[list[Sample]], Batch] | None = None,
) -> Batch:
    """Read positions `rows` of any source into a batch.

    Args:
        source: with or without the batched fast path.
        rows: (B,) positions.
        views: the chance of this reading; None reads without augmentation.
        collate: joins samples; default stacks tensors and lists the rest.

    Returns:
        The batch, with `id` and `draw` set.
    """
    fast = getattr(source, "read", None)
    if fast is not None:
        batch: Batch = fast(rows, views)
    else:
        find = getattr(source, "id_of", int)
        ids = [int(find(i)) for i in rows.tolist()]
        samples = [
            source[i, None if views is None else views.rng(number)]
            for i, number in zip(rows.tolist(), ids, strict=True)
        ]
        batch = (collate or stack)(samples)
        batch["id"] = torch.tensor(ids)
    batch["draw"] = 0 if views is None else views.draw
    return batch


def stack(samples: list[Sample]) -> Batch:
    """Join samples key by key: tensors and numbers are stacked, all else is listed."""
    batch = Batch()
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], Tensor):
            shapes = {tuple(v.shape) for v in values}
            batch[key] = torch.stack(values) if len(shapes) == 1 else values
        elif isinstance(values[0], (bool, int, float)):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


class Order(Protocol):
    """What is read in which epoch; pure, so that a resumed run reads the same.

    The loop gives the generator (an order knows no seed) and cuts the rows of a step into
    contiguous blocks by rank. `len` is the number of steps of an epoch and cheap.
    """

    source: Any

    def __len__(self) -> int: ...

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """The rows of each step of epoch `number`."""
        ...

    def read(self, rows: Rows, views: Views) -> Batch:
        """The batch of `rows`."""
        ...


class Shuffled:
    """Every sample once an epoch, in a new order each epoch.

    Args:
        source: the data.
        batch: rows of the global batch.
        drop_last: leave out a last batch that is not full.
        draws: number of different augmentations of a sample; None for a new one each epoch.
            Finite draws let a teacher's outputs for augmented views be stored.
        augment: False reads every sample as it is.
        shuffle: False keeps the source's order.
        collate: joins samples of sources without a batched fast path.

    Raises:
        DataError: the source is empty, or no full batch fits when `drop_last`.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        *,
        drop_last: bool = False,
        draws: int | None = None,
        augment: bool = True,
        shuffle: bool = True,
        collate: Callable[[list[Sample]], Batch] | None = None,
    ) -> None:
        if len(source) == 0:
            raise DataError("the training data is empty")
        if batch < 1:
            raise DataError(f"the batch size must be at least 1, not {batch}")
        if drop_last and len(source) < batch:
            raise DataError(
                f"drop_last leaves nothing: {len(source)} samples do not fill a batch of {batch}"
            )
        self.source = source
        self.batch = batch
        self.drop_last = drop_last
        self.draws = draws
        self.augment = augment
        self.shuffle = shuffle
        self.collate = collate

    def __len__(self) -> int:
        full, rest = divmod(len(self.source), self.batch)
        return full if self.drop_last or rest == 0 else full + 1

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """A permutation of all rows, cut into batches."""
        count = len(self.source)
        rows = torch.randperm(count, generator=rng()) if self.shuffle else torch.arange(count)
        return list(torch.split(rows, self.batch))[: len(self)]

    def read(self, rows: Rows, views: Views) -> Batch:
        """The samples at `rows`, augmented by the epoch's draw."""
        chance: Views | None = views
        if not self.augment:
            chance = None
        elif views.draws != self.draws:
            chance = Views(views.seed, views.epoch, self.draws)
        return read_rows(self.source, rows, chance, self.collate)

    @property
    def together(self) -> int:
        """How many small steps are read at once, which gives what reading them singly gives."""
        row = int(getattr(self.source, "row_bytes", 0))
        return max(1, _TOGETHER_BYTES // (row * self.batch)) if row else 1

    def read_together(self, steps: Sequence[Rows], views: Views) -> list[Batch]:
        """The batches of several steps: one gather, then views on it."""
        whole = self.read(torch.cat(list(steps)), views)
        return whole.cut([len(rows) for rows in steps])


class Without:
    """A shuffled order that leaves out some rows in some epochs, and reads all in the others.

    Rows that a queue was first filled with are held back until they have left it.

    Args:
        order: shuffled; its batch size, draws and so on hold throughout.
        rows: epoch (from 0) to the (n,) positions of the source that it leaves out.

    Raises:
        DataError: a position beyond the source, or an epoch in which no batch is left.
    """

    def __init__(self, order: Shuffled, rows: Mapping[int, Tensor]) -> None:
        self.order, self.source = order, order.source
        self.draws, self.augment, self.batch = order.draws, order.augment, order.batch
        self._kept: dict[int, Tensor] = {}
        for epoch, left_out in rows.items():
            kept = torch.ones(len(self.source), dtype=torch.bool)
            if len(left_out) and not 0 <= int(left_out.min()) <= int(left_out.max()) < len(kept):
                raise DataError(f"epoch {epoch} leaves out rows beyond the {len(kept)} of the data")
            kept[left_out] = False
            self._kept[epoch] = kept.nonzero()[:, 0]
            if len(self._within(epoch)) == 0 or not len(self._kept[epoch]):
                raise DataError(
                    f"epoch {epoch} leaves out {len(left_out)} of {len(kept)} rows, and the rest "
                    f"makes no batch of {order.batch}"
                )

    def __len__(self) -> int:
        return len(self.order)

    def steps_in(self, epochs: float) -> int:
        """Steps of so many epochs from the first on; they differ in length."""
        whole = int(epochs)
        steps = whole * len(self.order)
        steps += sum(
            len(self._within(epoch)) - len(self.order) for epoch in self._kept if epoch < whole
        )
        return steps + round((epochs - whole) * len(self._within(whole)))

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """A permutation of the epoch's rows, cut into batches."""
        kept = self._kept.get(number)
        if kept is None:
            return self.order.epoch(number, rng)
        return [kept[rows] for rows in self._within(number).epoch(number, rng)]

    def read(self, rows: Rows, views: Views) -> Batch:
        """The samples at `rows`."""
        return self.order.read(rows, views)

    def _within(self, epoch: int) -> Shuffled:
        """The order of the rows that an epoch keeps, as positions among them."""
        kept = self._kept.get(epoch)
        if kept is None or not len(kept):
            return self.order
        order = copy.copy(self.order)
        order.source = Subset(self.source, kept)
        return order


@dataclass(frozen=True)
class StreamRows:
    """What one step, or one process in it, reads of each stream.

    Attributes:
        rows: stream to (B,) int64 positions in its source; B differs between streams.
        passes: stream to how often it had been begun before: its augmentation number.
        starts: stream to the place of its first row in the stream's global batch.
        of: stream to the rows of its global batch.
    """

    rows: Mapping[str, Tensor]
    passes: Mapping[str, int]
    starts: Mapping[str, int]
    of: Mapping[str, int]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def block(self, rank: int, world: int) -> StreamRows:
        """The share of one process: a contiguous block of each stream.

        Raises:
            DataError: a stream has fewer rows than there are processes.
        """
        if world == 1:
            return self
        rows, starts = {}, {}
        for name, whole in self.rows.items():
            if len(whole) < world:
                raise DataError(
                    f"the stream '{name}' reads {len(whole)} rows in a step, too few for {world} "
                    "processes: give it a larger batch or more rows"
                )
            start, stop = (len(whole) * (rank + k) // world for k in (0, 1))
            rows[name], starts[name] = whole[start:stop], self.starts[name] + start
        return StreamRows(rows, self.passes, starts, self.of)


class Streams:
    """Several sources read side by side: labelled and unlabelled samples in one step.

    A batch holds a nested batch for each stream (`batch.view("unlabelled/x")`). Every stream
    goes through its own source in an order of its own, pass after pass. One of them drives: an
    epoch is one pass through it, and the others are cycled, begun anew in each epoch. Or the
    streams are zipped: an epoch ends where the shortest ends. A stream that is cycled gets new
    augmentations in every pass.

    The batches of a pass differ by one row at most; so 65 rows in batches of 64 are 33 and 32.

    Args:
        streams: name to (source, rows of its global batch).
        drive: the stream that drives, or "zip".
        drop_last: batches are full, and what is left over of a pass is not read in it.
        draws: number of different augmentations of a sample; None for a new one each pass.
        augment: False reads every sample as it is.
        collate: joins samples of sources without a batched fast path.

    Attributes:
        source: the sources joined, whose fingerprint stands for the data.

    Raises:
        DataError: no such stream; a source is empty; no full batch fits when `drop_last`.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[Source, int]],
        *,
        drive: str = "unlabelled",
        drop_last: bool = False,
        draws: int | None = None,
        augment: bool = True,
        collate: Callable[[list[Sample]], Batch] | None = None,
    ) -> None:
        if drive != "zip" and drive not in streams:
            raise DataError(
                f"no stream is called '{drive}', which is to drive{nearest(drive, streams)} "
                "(or 'zip')"
            )
        self.streams = {
            name: Shuffled(
                source, size, drop_last=drop_last, draws=draws, augment=augment, collate=collate
            )
            for name, (source, size) in streams.items()
        }
        self.drive, self.drop_last, self.draws, self.augment = drive, drop_last, draws, augment
        self.source = Joined([order.source for order in self.streams.values()])

    def __len__(self) -> int:
        if self.drive == "zip":
            return min(len(order) for order in self.streams.values())
        return len(self.streams[self.drive])

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[StreamRows]:
        """The rows of each step: passes through every stream, cut into batches."""
        chance, steps = rng(), len(self)
        batches: dict[str, list[tuple[int, Tensor]]] = {}
        for name, order in self.streams.items():
            passes = -(-steps // len(order))
            batches[name] = [
                (number * passes + again, rows)
                for again in range(passes)
                for rows in self._cut(order, torch.randperm(len(order.source), generator=chance))
            ][:steps]
        made = []
        for step in range(steps):
            taken = {name: read[step] for name, read in batches.items()}
            rows = {name: own for name, (_, own) in taken.items()}
            made.append(
                StreamRows(
                    rows,
                    {name: again for name, (again, _) in taken.items()},
                    dict.fromkeys(rows, 0),
                    {name: len(own) for name, own in rows.items()},
                )
            )
        return made

    def _cut(self, order: Shuffled, rows: Tensor) -> Sequence[Tensor]:
        if self.drop_last:
            return torch.split(rows, order.batch)[: len(order)]
        return torch.tensor_split(rows, len(order))

    def read(self, rows: StreamRows, views: Views) -> Batch:
        """A batch of nested batches, each with its place in the stream's global batch."""
        batch = Batch()
        for name, own in rows.rows.items():
            part = self.streams[name].read(own, Views(views.seed, rows.passes[name]))
            start = rows.starts[name]
            part["rows"], part["of"] = slice(start, start + len(own)), rows.of[name]
            batch[name] = part
        return batch


def read_block(order: Order, rows: Rows, views: Views, rank: int = 0, world: int = 1) -> Batch:
    """What one of several processes reads of a step: a contiguous block of it.

    Args:
        order: of the training.
        rows: of the step, as the order gives them.
        views: the chance of this reading.
        rank: of this process.
        world: number of processes.

    Returns:
        The batch with `rows` and `of`, its place in the global batch; of streams each has its
        own.
    """
    if isinstance(rows, StreamRows):
        return order.read(rows.block(rank, world), views)
    whole = len(rows)
    if isinstance(order, Whole):
        rank, world = 0, 1  # every process reads all of it
    start, stop = whole * rank // world, whole * (rank + 1) // world
    batch = order.read(rows[start:stop] if world > 1 else rows, views)
    batch["rows"], batch["of"] = slice(start, stop), whole
    return batch


class Whole:
    """All rows in every step, in the source's order: a graph whose nodes hang together.

    An epoch is one step. Several processes read the same, since the rows cannot be cut: they
    reproduce one process, and gain no time.

    Args:
        source: the data.
        collate: joins samples of sources without a batched fast path.
    """

    def __init__(
        self, source: Source, *, collate: Callable[[list[Sample]], Batch] | None = None
    ) -> None:
        if len(source) == 0:
            raise DataError("the training data is empty")
        self.source = source
        self.collate = collate

    def __len__(self) -> int:
        return 1

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """One step: all rows."""
        return [torch.arange(len(self.source))]

    def read(self, rows: Rows, views: Views) -> Batch:
        """The samples, as they are."""
        return read_rows(self.source, rows, None, self.collate)


class Draws:
    """No data: numbered rows, for objectives that draw by the clock.

    Args:
        rows: rows of the global batch.
        steps: steps of an epoch.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self.source = None
        self.count = rows
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """The same numbered rows in every step."""
        return [torch.arange(self.count)] * self.steps

    def read(self, rows: Rows, views: Views) -> Batch:
        """A batch with ids only."""
        return Batch(id=rows, draw=views.epoch)


class ByClass:
    """One class a step, class after class; several times over when there are phases.

    An epoch is `phases * classes` steps: all classes of phase 0, then all of phase 1, and so
    on. There is no data: objectives draw by the clock. A row's `id` is its class, its view
    "phase" the number of the phase.

    Args:
        classes: number of classes K.
        phases: how often an epoch goes through them.
        together: all classes of a phase in one step, K rows; an epoch has `phases` steps.
    """

    def __init__(self, classes: int, phases: int = 1, *, together: bool = False) -> None:
        if classes < 1 or phases < 1:
            raise DataError(f"{classes} classes in {phases} phases give no step")
        self.source = None
        self.classes, self.phases, self.together = classes, phases, together

    def __len__(self) -> int:
        return self.phases * (1 if self.together else self.classes)

    def epoch(self, number: int, rng: Callable[[], Generator]) -> Sequence[Rows]:
        """The same in every epoch; a row is phase * K + class."""
        rows = torch.arange(self.phases * self.classes)
        return list(torch.split(rows, self.classes if self.together else 1))

    def read(self, rows: Rows, views: Views) -> Batch:
        """A batch with classes and phases only."""
        phase = torch.div(rows, self.classes, rounding_mode="floor")
        return Batch(id=rows % self.classes, draw=views.epoch, phase=phase)


class Splits(Mapping[str, Source]):
    """The parts of a data set by role: train, val, test, unlabelled, transfer, full ...

    `full` is there where students see only a part of the training data: that part is their
    `train`, and whoever teaches is trained on `full`. `test` opens only inside `judging()`, so
    that nothing can be chosen by it.

    Args:
        sources: role to source.
        edition: the data's name with its edition, for reports ("cifar10 (jpeg copy)").
        about: what else a task may need to know (classes, channels, vocabulary ...).
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        edition: str = "",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._sources = dict(sources)
        self._open = 0
        self.edition = edition
        self.about: dict[str, Any] = dict(about or {})

    def __getitem__(self, role: str) -> Source:
        if role not in self._sources:
            raise DataError(f"the data has no split '{role}'{nearest(role, self._sources)}")
        if role == "test" and not self._open:
            raise DataError("the split 'test' opens only while a finished artifact is judged")
        return self._sources[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __contains__(self, role: object) -> bool:
        return role in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def open(self) -> list[str]:
        """The splits that may be read: "test" only while judging."""
        return [role for role in self if role != "test" or self._open]

    def peek(self, role: str) -> int:
        """Number of samples of a split, also of a closed one."""
        return len(self._sources[role])

    def fingerprint(self) -> str:
        """Of every split."""
        parts = sorted(f"{k}:{v.fingerprint}" for k, v in self._sources.items())
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]

    def of_teachers(self) -> Splits:
        """The splits as teachers are trained on them: `train` is all of it."""
        if "full" not in self._sources:
            return self
        whole = {role: source for role, source in self._sources.items() if role != "full"}
        found = Splits({**whole, "train": self._sources["full"]}, self.edition, self.about)
        found._open = self._open
        return found

    def replaced(self, **sources: Source) -> Splits:
        """The same splits with some of them exchanged, such as `train` for a part of it."""
        found = Splits({**self._sources, **sources}, self.edition, self.about)
        found._open = self._open
        return found

    def judging(self) -> Splits:
        """The same splits with `test` open; only judges call this."""
        opened = Splits(self._sources, self.edition, self.about)
        opened._open = 1
        return opened


def carve(source: Source, count: int, rng: Generator) -> tuple[Source, Source]:
    """Cut `count` random samples off a source, for validation.

    Returns:
        (the rest, the cut part), both in the source's order.
    """
    if not 0 < count < len(source):
        raise DataError(f"cannot carve {count} samples from {len(source)}")
    order = torch.randperm(len(source), generator=rng)
    return Subset(source, order[count:].sort().values), Subset(source, order[:count].sort().values)
