"""A teacher that is asked once, where every step reads the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillhouse.batch import Batch
from stillhouse.errors import TeacherError
from stillhouse.teacher import Knowledge, Want


class Once:
    """Keeps what a teacher said of a batch that never changes, such as a whole graph.

    Args:
        teacher: asked for the first batch after `bind`; whatever else is asked of this object
            goes to it.
    """

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self._said: Knowledge | None = None
        self._rows = 0

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """As the teacher's; what was said before is forgotten."""
        self._said = None
        self.teacher.bind(wants, task)

    def knowledge(self, batch: Batch) -> Knowledge:
        """What the teacher said of the first batch.

        Raises:
            TeacherError: the batch has another number of rows.
        """
        if self._said is None:
            self._said, self._rows = self.teacher.knowledge(batch), batch.size
        elif batch.size != self._rows:
            raise TeacherError(
                f"the teacher was asked about {self._rows} rows once and for all; a batch of "
                f"{batch.size} is another"
            )
        return self._said

    def __getattr__(self, name: str) -> Any:
        if name == "teacher":
            raise AttributeError(name)
        return getattr(self.teacher, name)
