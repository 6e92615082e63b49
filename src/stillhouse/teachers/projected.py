"""A teacher whose vectors go through a fixed projector; and data that brings answers along."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stillhouse.batch import Batch, Sample, Source, read_rows
from stillhouse.clock import Views
from stillhouse.errors import ModelError, TeacherError
from stillhouse.losses.chunked import wide
from stillhouse.teacher import Frozen, Knowledge, Teacher, Want
from stillhouse.teachers.live import weights_hash

EMBEDDING = Want("embedding")


class Projected:
    """The vectors of another teacher after a frozen module, with unit length.

    The module (weights and all) is part of the fingerprint, so that what is stored of one
    projector is never taken for that of another.

    Args:
        teacher: gives "embedding" (B, D).
        projector: of vectors (B, D); frozen here. None: only the length is changed.

    Attributes:
        provides: vectors only.
    """

    provides = frozenset({"vector"})

    def __init__(self, teacher: Teacher, projector: nn.Module | None) -> None:
        self.teacher = teacher
        self.projector = None if projector is None else Frozen(projector)
        self.name = f"projected-{getattr(teacher, 'name', type(teacher).__name__)}"

    @property
    def fingerprint(self) -> str:
        """Of the teacher and of the projector's weights."""
        own = "none" if self.projector is None else weights_hash(self.projector.module)
        return hashlib.sha256(f"projected|{self.teacher.fingerprint}|{own}".encode()).hexdigest()

    @property
    def preprocessing(self) -> str:
        """Of the teacher."""
        return str(getattr(self.teacher, "preprocessing", ""))

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Ask the teacher for its vectors.

        Raises:
            TeacherError: something else than vectors is wanted.
        """
        other = [want.field for want in wants if want.field != "embedding"]
        if other:
            raise TeacherError(f"a projected teacher gives 'embedding', not '{other[0]}'")
        self.teacher.bind([EMBEDDING], task)

    def knowledge(self, batch: Batch) -> Knowledge:
        """ "embedding" (B, width), float32, of unit length.

        Raises:
            TeacherError: the vectors do not fit the projector.
        """
        said = self.teacher.knowledge(batch)
        vectors = wide(said.tensor("embedding"))
        if self.projector is not None:
            own = next(self.projector.module.parameters(), vectors)
            vectors = vectors.to(own.dtype)
            try:
                vectors = self.projector.quiet(vectors)
            except ModelError as error:
                raise TeacherError(f"the vectors of {self.name}: {error}") from error
        return Knowledge({"embedding": F.normalize(vectors, dim=-1)}, said.valid)

    def guest(self) -> Frozen:
        """Always refused.

        Raises:
            TeacherError: always.
        """
        raise TeacherError("a projected teacher gives vectors only, no module")

    def to(self, device: torch.device | str) -> Projected:
        """Move the teacher and the projector."""
        mover = getattr(self.teacher, "to", None)
        if mover is not None:
            mover(device)
        if self.projector is not None:
            self.projector.to(device)
        return self


class Answered:
    """Data whose rows bring along what a teacher says about them, as a further view.

    So every part of a batch, and every process, holds the answers about its own rows.

    Args:
        source: the data.
        teacher: bound; a store, or asked anew at every reading.
        view: the name of the further view.
        want: what is read of the teacher's answer.
        collate: joins samples of data without a batched fast path.
        device: where the teacher is; the answers come back to where the rows are.
    """

    def __init__(
        self,
        source: Source,
        teacher: Teacher,
        view: str,
        want: Want = EMBEDDING,
        *,
        collate: Callable[[list[Sample]], Batch] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.teacher, self.view, self.want = source, teacher, view, want
        self.collate, self.device = collate, device

    @property
    def fingerprint(self) -> str:
        """Of the data and the teacher."""
        text = f"answered|{self.source.fingerprint}|{self.teacher.fingerprint}|{self.view}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, Generator | None]) -> Sample:
        views = None
        if item[1] is not None:
            views = Views(int(torch.randint(0, 1 << 31, (), generator=item[1])))
        batch = self.read(torch.tensor([int(item[0])]), views)
        return {key: value[0] for key, value in batch.items() if key not in ("id", "draw")}

    def id_of(self, index: int) -> int:
        """The content id of position `index`."""
        find = getattr(self.source, "id_of", None)
        return int(find(index)) if find is not None else index

    def read(self, rows: Tensor, views: Views | None) -> Batch:
        """As the source reads, with the teacher's answers.

        Raises:
            TeacherError: it has not spoken on a row.
        """
        batch = read_rows(self.source, rows, views, self.collate)
        said = self.teacher.knowledge(batch.to(self.device))
        if said.valid is not None and not bool(said.valid.all()):
            silent = batch["id"][~said.valid.cpu()][:3].tolist()
            raise TeacherError(f"the teacher has not spoken on the rows {silent}")
        batch[self.view] = said.tensor(self.want.key).to(batch.device)
        return batch
