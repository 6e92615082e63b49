"""Asking a teacher once and keeping what it says: capture into a store.

The teacher's forward pass is most of a step, so a store is the largest saving there is. The
capture is a stage: a killed one goes on, records that are there are never asked again, and
the same store serves every later run, seed and side of a comparison that depends on the same
teacher, data and form.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.batch import Batch, Joined, Source, read_rows, together
from stillhouse.clock import Views
from stillhouse.engine.checkpoint import write_atomic
from stillhouse.engine.job import Job
from stillhouse.engine.records import Field
from stillhouse.engine.store import Store
from stillhouse.errors import DataError, TeacherError
from stillhouse.teacher import Frozen, Knowledge, Teacher, Want
from stillhouse.teachers.live import ACCESS
from stillhouse.teachers.stored import Stored, augments

Accept = Callable[[dict[str, tuple[int, ...]]], None]


def captured(
    job: Job,
    teacher: Teacher,
    spec: Any,
    split: str | Sequence[str] = "train",
    *,
    kind: str = "capture",
    accept: Accept | None = None,
) -> Captured:
    """A teacher whose answers are kept on disk before the training that wants them.

    Args:
        job: of the run.
        teacher: asked once per record.
        spec: the recipe's `teacher.store`: path, form, k, temperature, dtype, draws, batch.
        split: whose samples are asked about; several are kept in one store.
        kind: of the stage.
        accept: told the shape of one row's answer by field before most is asked; may raise.
    """
    return Captured(job, teacher, spec, split, kind=kind, accept=accept)


def refuse_other_data(job: Job, spec: Any, split: str = "train") -> None:
    """Refuse the folder of a store of other data before a teacher is trained to fill it.

    Args:
        job: of the run.
        spec: the recipe's `teacher.store`.
        split: whose samples would be asked about.

    Raises:
        TeacherError: the folder holds a store of other data.
        CheckpointError: it holds a damaged one.
    """
    if spec.path is None:
        return
    path = Path(spec.path).expanduser()
    if (path / "header.json").exists():
        wanted = job.splits[split].fingerprint
        Store.open(path).check(data=wanted, edition=job.splits.edition)


class Captured:
    """A teacher that becomes a store when it learns, in `bind`, what is wanted of it.

    Args:
        job: of the run; the capture is a stage of it.
        teacher: asked where the store has gaps.
        spec: see `captured`.
        split: whose samples are asked about, beside those of the streams that are wanted.
        kind: of the stage.
        accept: see `captured`.

    Attributes:
        provides: what the teacher provides, without access to the module.
        stored: the finished store as a teacher; None before `bind`.
    """

    def __init__(
        self,
        job: Job,
        teacher: Teacher,
        spec: Any,
        split: str | Sequence[str] = "train",
        *,
        kind: str = "capture",
        accept: Accept | None = None,
    ) -> None:
        self.job, self.teacher, self.spec = job, teacher, spec
        self.splits = (split,) if isinstance(split, str) else tuple(split)
        self.provides = frozenset(teacher.provides) - ACCESS
        self.stored: Stored | None = None
        self.name = str(getattr(teacher, "name", type(teacher).__name__))
        self._kind, self._accept = kind, accept
        self._binds = 0
        self._first: Knowledge | None = None  # about the first block, which tells the shapes

    @property
    def fingerprint(self) -> str:
        """Of the teacher and of the form in which its answers are kept."""
        form = {k: v for k, v in vars(self.spec).items() if k not in {"path", "batch"}}
        text = json.dumps([self.teacher.fingerprint, form], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Capture what is wanted and not kept yet, then read from there.

        Raises:
            TeacherError: the method needs the module itself; the data are augmented anew in
                every epoch; or the store at the given path was made of something else.
            CheckpointError: the disk has no room.
        """
        for want in wants:
            if want.field in ACCESS:
                raise TeacherError(
                    f"the method needs '{want.field}' of the teacher itself, which a store cannot "
                    "give: leave out teacher.store"
                )
        self.splits = tuple(dict.fromkeys([*self.splits, *splits_of(wants)]))
        source = together(self.job.splits, self.splits)
        if not self.spec.draws and augments(source):
            raise TeacherError(
                f"the split '{self.split}' of '{self.job.splits.edition}' is augmented anew in "
                "every epoch, which no store can hold: read a finite number of augmentations "
                "(teacher: {store: {draws: 4}}), or switch them off in data.options"
            )
        # Each sample is asked about once, in whatever stream it will be read.
        plain = list(dict.fromkeys(want.within for want in wants))
        self.teacher.bind(plain, task)
        mover = getattr(self.teacher, "to", None)
        if mover is not None:
            mover(self.job.device)
        asked = [w for w in plain if w.field not in ACCESS]
        self._binds += 1
        store = self._store(source, asked)
        try:
            # Asked together: no process may write before all have opened what is there.
            if self.job.hardware.any(not store.complete):
                self._capture(store, source)
        finally:
            store.close()
            self._first = None
            closer = getattr(self.teacher, "close", None)
            if closer is not None:
                closer()
        self.job.hardware.barrier()
        self.stored = Stored(store.path)
        self.stored.bind(wants, task)

    # -- the store ---------------------------------------------------------------------------

    @property
    def split(self) -> str:
        """The splits that are kept, for messages and the store's header."""
        return "+".join(self.splits)

    def _store(self, source: Source, wants: Sequence[Want]) -> Store:
        shapes = self._shapes(source, wants)
        if self._accept is not None:
            self._accept(shapes)
        fields = self._fields(wants, shapes)
        hardware, spec = self.job.hardware, self.spec
        paths = getattr(getattr(self.teacher, "net", None), "taps", {})
        taps = {f.name: paths[f.name[4:]] for f in fields if f.name[4:] in paths}
        identity: dict[str, Any] = {
            "teacher": _hash([self.teacher.fingerprint, taps]),
            "data": source.fingerprint,
            "preprocessing": getattr(self.teacher, "preprocessing", ""),
            "draws": spec.draws or 0,
            "views": self.job.views().seed if spec.draws else 0,
        }
        path = self._path(identity, fields)

        def opened() -> Store:
            return Store.create(
                path,
                fields,
                ids_of(source),
                edition=self.job.splits.edition,
                teacher_name=self.name,
                extra={"split": self.split, "taps": taps},
                writer=str(hardware.rank),
                wait=spec.path is None,
                **identity,
            )

        # One process makes the files, the others open them.
        first = opened() if hardware.is_main else None
        hardware.barrier()
        return first or opened()

    def _path(self, identity: dict[str, Any], fields: Sequence[Field]) -> Path:
        if self.spec.path is not None:
            return Path(self.spec.path).expanduser()
        key = _hash([identity, [vars(f) for f in fields]])
        return self.job.cache / "stores" / f"{self.name.lower()}-{key[:20]}"

    def _shapes(self, source: Source, wants: Sequence[Want]) -> dict[str, tuple[int, ...]]:
        """Shapes of the answer about one row, by the want's key.

        A teacher that is to be asked once is asked about the whole first block, whose answer the
        capture then has already, and its shapes are remembered beside the stores.
        """
        keys = [want.key for want in wants]
        once = bool(getattr(self.teacher, "once", False))
        name = _hash(["shapes", self.fingerprint, source.fingerprint, keys])[:20]
        place = self.job.cache / "stores" / f"shapes-{name}.json"
        if once and (known := _remembered(place)) is not None:
            return known
        whole = once and self.job.hardware.world == 1 and not self.spec.draws
        answer = self._ask(
            source, torch.arange(min(self.spec.batch if whole else 1, len(source))), 0
        )
        shapes = {key: tuple(answer.tensor(key).shape[1:]) for key in keys if key in answer}
        if whole:
            self._first = answer
        if once and self.job.hardware.is_main:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(place, json.dumps(shapes).encode())
        return shapes

    def _fields(self, wants: Sequence[Want], shapes: dict[str, tuple[int, ...]]) -> list[Field]:
        fields: list[Field] = []
        for want in wants:
            if want.key not in shapes:
                continue
            shape = shapes[want.key]
            # Only logits are a distribution over classes.
            form = self.spec.form if want.field == "logits" else "dense"
            if form != "dense" and self.job.task.class_axis != -1:
                raise TeacherError(
                    f"form '{form}' keeps some classes of logits whose classes come last; those of "
                    f"{self.job.task.name} are maps {shape}: capture them with form: dense"
                )
            fields.append(
                Field(
                    want.key,
                    shape,
                    form=form,
                    dtype=self.spec.dtype,
                    k=self.spec.k if form != "dense" else 1,
                    temperature=self.spec.temperature if form != "dense" else 1.0,
                    seed=self.job.seed if form == "sample" else 0,
                )
            )
        if not fields:
            raise TeacherError("nothing is wanted of the teacher that a store could keep")
        return fields

    # -- asking ------------------------------------------------------------------------------

    def _capture(self, store: Store, source: Source) -> None:
        name = "capture" if self._binds == 1 else f"capture-{self._binds}"
        began, before = time.monotonic(), store.finished
        todo = len(store) - before
        progress = self.job.log.progress
        if progress is not None:
            progress.begin(name, len(store), before)

        ids = store.ids

        def ask(item: tuple[Tensor, int]) -> dict[str, Tensor]:
            first, self._first = self._first, None
            known = first if first is not None and int(item[0][0]) == 0 else None
            answer = known or self._ask(source, *item, ids)
            now = time.monotonic()
            if progress is not None and progress.due(now):
                progress.update(store.finished, len(store), {}, now)
            return {name: answer.tensor(name) for name in store.fields}

        # What was paid for is written down block by block.
        every = 1 if getattr(self.teacher, "remote", False) else 64
        items = self._items(store, source)
        self.job.map(name, items, ask, into=store, kind=self._kind, flush_every=every)
        if progress is not None:
            progress.end()
        seconds = time.monotonic() - began
        self.job.log.write(
            "capture",
            store=str(store.path),
            records=todo,
            bytes_per_record=round(store.nbytes / len(store), 2),
            seconds=round(seconds, 3),
        )

    def _items(
        self, store: Store, source: Source
    ) -> Iterator[tuple[tuple[Tensor, int], tuple[Tensor, int]]]:
        """Blocks of fixed rows, so that a resumed capture asks in the same company."""
        size = self.spec.batch
        rank, world = self.job.hardware.rank, self.job.hardware.world
        ids = store.ids
        blocks = list(enumerate(torch.split(torch.arange(len(source)), size)))
        for draw in range(max(1, self.spec.draws or 0)):
            for number, rows in blocks:
                if number % world == rank:
                    yield (ids[rows], draw), (rows, draw)

    def _ask(self, source: Source, rows: Tensor, draw: int, ids: Tensor | None = None) -> Knowledge:
        draws = self.spec.draws
        views = Views(self.job.views().seed, draw, draws) if draws else None
        batch: Batch = read_rows(source, rows, views, self.job.task.collate)
        if ids is not None and not torch.equal(batch["id"].cpu(), ids[rows]):
            raise DataError(
                f"the split '{self.split}' reads other sample ids than it declares "
                f"(positions {rows[:3].tolist()}: {batch['id'][:3].tolist()} instead of "
                f"{ids[rows][:3].tolist()}): a store would mix up its records"
            )
        # Nothing is differentiated here, so the cheaper mode is safe.
        with torch.inference_mode():
            return self.teacher.knowledge(batch.to(self.job.device))

    # -- reading -----------------------------------------------------------------------------

    def _read(self) -> Stored:
        if self.stored is None:
            raise TeacherError("the capture has not been made: bind comes before knowledge")
        return self.stored

    def reads(self, order: Any, views: int) -> None:
        """Check how the run will read; see `Stored.reads`."""
        self._read().reads(order, views)

    def knowledge(self, batch: Batch) -> Knowledge:
        """The batch's records; see `Stored.knowledge`."""
        return self._read().knowledge(batch)

    def guest(self) -> Frozen:
        """Always refused: the method would be given another teacher than the store's.

        Raises:
            TeacherError: always.
        """
        raise TeacherError("a stored teacher is no module: leave out teacher.store")

    def head_layer(self) -> nn.Linear:
        """The last linear layer of the teacher whose answers these are.

        Raises:
            TeacherError: that teacher is no module.
        """
        find = getattr(self.teacher, "head_layer", None)
        if find is None:
            raise TeacherError(f"the teacher {self.name} is no module with a last linear layer")
        layer: nn.Linear = find()
        return layer

    def to(self, device: torch.device | str) -> Captured:
        """Nothing is to be moved: the teacher is done when training begins."""
        return self


def splits_of(wants: Sequence[Want]) -> list[str]:
    """The splits that streams are read from: a stream bears its split's name, or "labelled".

    Returns:
        Without repetition; "train" for the stream "labelled".
    """
    named = [want.stream for want in wants if want.stream]
    return list(dict.fromkeys("train" if name == "labelled" else name for name in named))


def ids_of(source: Source) -> Tensor:
    """(N,) content ids of a source, in the order of its positions.

    Args:
        source: with `ids`; a subset of one; with `id_of`; else positions are ids.
    """
    ids = getattr(source, "ids", None)
    if isinstance(ids, Tensor) and len(ids) == len(source):
        return ids.long()
    if isinstance(source, Joined):
        return torch.cat([ids_of(part) for part in source.sources])
    rows, inner = getattr(source, "rows", None), getattr(source, "source", None)
    if isinstance(rows, Tensor) and inner is not None and len(rows) == len(source):
        return ids_of(inner)[rows]
    find = getattr(source, "id_of", None)
    if find is None:
        return torch.arange(len(source))
    return torch.tensor([int(find(i)) for i in range(len(source))])


def _remembered(place: Path) -> dict[str, tuple[int, ...]] | None:
    try:
        found = json.loads(place.read_bytes())
        return {str(key): tuple(int(n) for n in shape) for key, shape in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


__all__ = ["Captured", "captured", "ids_of", "refuse_other_data", "splits_of"]
