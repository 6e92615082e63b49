"""Texts that are learnt from by their teacher's vectors: each once, each asked about once."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.batch import Source, Subset
from stillhouse.engine.job import Job
from stillhouse.errors import RecipeError
from stillhouse.method import MethodConfig
from stillhouse.parts.schedule import cycles
from stillhouse.recipe import StoreSpec
from stillhouse.stages.capture import Accept, Captured, captured
from stillhouse.teacher import Teacher
from stillhouse.teachers.stored import Stored

KINDS = {"documents": 0, "queries": 1}


class ComparedConfig(MethodConfig):
    """Settings of a baseline that learns vectors beside a method and takes them over from it."""

    shared: ClassVar[frozenset[str]] = frozenset({"cycles", "floor", "cache", "widths"})

    cycles: int = Field(
        0,
        ge=0,
        description="straight falls of the learning rate; 0: the schedule of the budget",
        json_schema_extra={"source": "as in what it is compared with"},
    )
    floor: float = Field(
        0.1,
        ge=0,
        le=1,
        description="the learning rate at the end of a cycle, as a share of its top",
        json_schema_extra={"source": "as in what it is compared with"},
    )
    cache: Literal["float32", "float16", "int8"] = Field(
        "float32",
        description="numbers of the teacher's vectors on disk",
        json_schema_extra={"source": "chosen here"},
    )
    widths: list[int] = Field(
        [16, 32, 64, 128, 256, 384],
        description="numbers of first coordinates that are judged",
        json_schema_extra={"source": "as in what it is compared with"},
    )

    def training(self) -> dict[str, Any]:
        """Arguments of `job.fit`: the cycles of the learning rate, if there are any."""
        return {"schedule": cycles(self.cycles, self.floor)} if self.cycles else {}


def distinct(job: Job) -> Job:
    """The job with every text of its training split once; itself where that is so already.

    Texts are compared letter by letter. Data without texts are left alone.
    """
    source = job.splits["train"]
    texts = _view(source, "text")
    if not isinstance(texts, list):
        return job
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        first.setdefault(text, place)
    if len(first) == len(texts):
        return job
    return _learning(job, Subset(source, torch.tensor(list(first.values()))))


def of_kind(job: Job, kind: Literal["documents", "queries"]) -> Job:
    """The job with the documents or the queries of its training split only.

    Raises:
        RecipeError: the data does not say which is which, or there is none of the kind.
    """
    source = job.splits["train"]
    kinds = _view(source, "kind")
    if not isinstance(kinds, Tensor):
        raise RecipeError(
            f"texts: {kind} needs data that says which texts are queries (the view 'kind'), and "
            f"'{job.splits.edition}' does not: leave out settings.texts"
        )
    rows = (kinds == KINDS[kind]).nonzero()[:, 0]
    if not len(rows):
        raise RecipeError(f"'{job.splits.edition}' holds no {kind} to learn from")
    return _learning(job, Subset(source, rows))


def _view(source: Source, name: str) -> Any:
    if isinstance(source, Subset):
        inner = _view(source.source, name)
        if isinstance(inner, list):
            return [inner[row] for row in source.rows.tolist()]
        return inner[source.rows] if isinstance(inner, Tensor) else None
    return getattr(source, "views", {}).get(name)


def _learning(job: Job, source: Source) -> Job:
    other = job.child()
    other.task = type(job.task)(job.splits.replaced(train=source))
    return other


def remembered(
    job: Job, dtype: Literal["float32", "float16", "int8"], accept: Accept | None = None
) -> Teacher:
    """The recipe's teacher, whatever it is, so that each text is asked about once.

    Args:
        job: whose training split is asked about.
        dtype: of the numbers on disk, where the recipe asks for no store itself.
        accept: see `captured`.

    Returns:
        A store that is made at `bind`; the recipe's own where it is one already.
    """
    teacher: Any = job.teacher()
    spec: Any = StoreSpec(dtype=dtype)
    if isinstance(teacher, Captured):
        teacher, spec = teacher.teacher, teacher.spec
    if isinstance(teacher, Stored):
        return teacher
    return captured(job, teacher, spec, accept=accept)
