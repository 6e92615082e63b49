"""Asking a language model once about fixed texts, and keeping what it says token by token."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Batch, Source, read_rows
from stillhouse.engine.job import Job
from stillhouse.engine.records import Field
from stillhouse.engine.store import Store
from stillhouse.errors import TeacherError
from stillhouse.parts.token_rows import predicting, prefix_keys
from stillhouse.teacher import Frozen, Knowledge, Teacher, Want
from stillhouse.teachers.cascade import Cascade
from stillhouse.teachers.live import ACCESS
from stillhouse.teachers.stored_tokens import FIELD, StoredTokens

_LOGITS = 1 << 26  # numbers of the logits of one question


class CapturedTokens:
    """A causal language model that becomes a store of its answers in `bind`.

    Where the method needs the teacher itself, for texts that did not exist before the step, it
    becomes a cascade of the store and the model.

    Args:
        job: of the run; the capture is a stage of it.
        teacher: asked where the store has gaps.
        spec: the recipe's `teacher.store`.
        split: whose rows are kept.
        kind: of the stage.

    Attributes:
        provides: what the teacher provides.
        answers: the finished store as a teacher, or the cascade; None before `bind`.
    """

    def __init__(
        self, job: Job, teacher: Teacher, spec: Any, split: str = "train", *, kind: str = "capture"
    ) -> None:
        if spec.draws:
            raise TeacherError("texts are not augmented: leave out teacher.store.draws")
        self.job, self.teacher, self.spec, self.split = job, teacher, spec, split
        self.task: Any = job.task
        self.provides = frozenset(teacher.provides)
        self.answers: StoredTokens | Cascade | None = None
        self.name = str(getattr(teacher, "name", type(teacher).__name__))
        self._kind = kind

    @property
    def fingerprint(self) -> str:
        """Of the teacher and of the form in which its answers are kept."""
        form = {k: v for k, v in vars(self.spec).items() if k not in {"path", "batch"}}
        return _hash([self.teacher.fingerprint, form])

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Capture what is not kept yet, then read from there.

        Raises:
            TeacherError: something else than logits is wanted of each text.
            CheckpointError: the disk has no room.
        """
        itself = any(want.field in ACCESS for want in wants)
        for want in wants:
            if want.field not in {FIELD, *ACCESS} and not want.optional:
                raise TeacherError(
                    f"a store of texts keeps logits, the method wants '{want.field}': leave out "
                    "teacher.store"
                )
        self.teacher.bind([Want(FIELD)], task)
        mover = getattr(self.teacher, "to", None)
        if mover is not None:
            mover(self.job.device)
        source = self.job.splits[self.split]
        blocks = list(self._blocks(source))
        store = self._store(source, blocks)
        try:
            if self.job.hardware.any(not store.complete):
                self._capture(store, source, blocks)
        finally:
            store.close()
        self.job.hardware.barrier()
        if itself:
            kept = StoredTokens(store.path, missing="mask")
            self.answers = Cascade(kept, self.teacher)
        else:
            self.answers = StoredTokens(store.path)
        self.answers.bind(wants, task)

    # -- what is kept ------------------------------------------------------------------------

    def _blocks(self, source: Source) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows asked about at once, the prefixes that are new in them, and where those stand."""
        longest = int(self.task.about["input"]["length"])
        size = self.task.vocabulary.size
        count = max(1, min(self.spec.batch, _LOGITS // max(1, longest * size)))
        known = set[int]()
        for rows in torch.split(torch.arange(len(source)), count):
            batch = self._read(source, rows)
            at = predicting(batch["response_mask"])
            keys = prefix_keys(batch["tokens"], batch["attention_mask"])
            fresh = torch.zeros_like(at)
            places = at.nonzero()
            new = []
            for place, key in zip(places.tolist(), keys[at].tolist(), strict=True):
                if key not in known:
                    known.add(key)
                    new.append(place)
            if new:
                fresh[tuple(torch.tensor(new).T)] = True
                yield rows, keys[fresh], fresh

    def _read(self, source: Source, rows: Tensor) -> Batch:
        return read_rows(source, rows, None, self.task.collate)

    def _store(self, source: Source, blocks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Store:
        spec, hardware, size = self.spec, self.job.hardware, self.task.vocabulary.size
        thin = spec.form != "dense"
        field = Field(
            FIELD,
            (size,),
            form=spec.form,
            dtype=spec.dtype,
            k=spec.k if thin else 1,
            temperature=spec.temperature if thin else 1.0,
            seed=self.job.seed if spec.form == "sample" else 0,
        )
        identity = {
            "teacher": self.teacher.fingerprint,
            "data": source.fingerprint,
            "preprocessing": self.task.tokens.fingerprint,
        }
        path = self.job.cache / "stores" / f"{self.name.lower()}-tokens-"
        path = path.with_name(path.name + _hash([identity, vars(field)])[:20])
        if spec.path is not None:
            path = Path(spec.path).expanduser()

        def opened() -> Store:
            return Store.create(
                path,
                [field],
                torch.cat([keys for _, keys, _ in blocks]),
                edition=self.job.splits.edition,
                teacher_name=self.name,
                extra={"split": self.split, "records": "prefixes"},
                writer=str(hardware.rank),
                wait=spec.path is None,
                **identity,
            )

        first = opened() if hardware.is_main else None
        hardware.barrier()
        return first or opened()

    def _capture(
        self, store: Store, source: Source, blocks: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        began, before = time.monotonic(), store.finished
        progress = self.job.log.progress
        if progress is not None:
            progress.begin("capture", len(store), before)

        def ask(item: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
            rows, fresh = item
            batch = self._read(source, rows).to(self.job.device)
            with torch.inference_mode():
                logits = self.teacher.knowledge(batch).tensor(FIELD)
            now = time.monotonic()
            if progress is not None and progress.due(now):
                progress.update(store.finished, len(store), {}, now)
            return {FIELD: logits[fresh.to(logits.device)]}

        rank, world = self.job.hardware.rank, self.job.hardware.world
        items = (
            ((keys, 0), (rows, fresh))
            for number, (rows, keys, fresh) in enumerate(blocks)
            if number % world == rank
        )
        self.job.map("capture", items, ask, into=store, kind=self._kind)
        if progress is not None:
            progress.end()
        self.job.log.write(
            "capture",
            store=str(store.path),
            records=len(store) - before,
            bytes_per_record=round(store.nbytes / len(store), 2),
            seconds=round(time.monotonic() - began, 3),
        )

    # -- as a teacher ------------------------------------------------------------------------

    def knowledge(self, batch: Batch) -> Knowledge:
        """What is kept, or a cascade's answers."""
        if self.answers is None:
            raise TeacherError("the capture has not been made: bind comes before knowledge")
        return self.answers.knowledge(batch)

    def guest(self) -> Frozen:
        """The teacher's module, where the method needs it.

        Raises:
            TeacherError: the method did not say so.
        """
        if self.answers is None:
            raise TeacherError("the capture has not been made: bind comes before guest")
        return self.answers.guest()

    def to(self, device: torch.device | str) -> CapturedTokens:
        """Move the teacher, where it is asked live."""
        if isinstance(self.answers, Cascade):
            self.answers.to(device)
        return self


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
