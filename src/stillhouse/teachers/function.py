"""A teacher that is any function from a batch to tensors."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable as Function
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.errors import StillhouseError, TeacherError, nearest
from stillhouse.models.loading import imported
from stillhouse.teacher import Frozen, Knowledge, Teacher, TopK, Value, Want, answered
from stillhouse.teachers.live import ACCESS

_KINDS = {"logits": "logits", "embedding": "vector"}


class Callable:
    """A teacher over a function, such as an encoder with its own preprocessing.

    Args:
        function: `function(batch)` returns, by field name ("logits", "embedding", ...), a
            tensor (B, ...) or a `TopK`. It is called without gradient and must answer the
            same for the same rows.
        fields: the names it returns, for checks before training; None: found by asking once.
        fingerprint: stands for all its answers depend on, in stores and stamps; give another
            when the function changes.
        name: for messages.

    Raises:
        TeacherError: no fingerprint.
    """

    def __init__(
        self,
        function: Function[[Batch], Mapping[str, Value]],
        *,
        fields: Iterable[str] | None = None,
        fingerprint: str,
        name: str = "",
    ) -> None:
        self.function = function
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        if not fingerprint:
            raise TeacherError(
                f"the function {self.name} needs a fingerprint, a text that changes when its "
                "answers do: without it a store could not tell who made it"
            )
        self.fields = None if fields is None else frozenset(fields)
        kinds = {_KINDS.get(f.rpartition(":")[2], "scores") for f in self.fields or ()}
        self.provides = frozenset(kinds or {"scores", "vector", "logits"})
        self.fingerprint = hashlib.sha256(f"function|{fingerprint}".encode()).hexdigest()
        self._wants: tuple[Want, ...] | None = None

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check every want against the declared fields.

        Raises:
            TeacherError: a field that is not declared, or access to a module.
        """
        for want in wants:
            if want.field in ACCESS:
                raise TeacherError(
                    f"the method needs '{want.field}' of the teacher, which the function "
                    f"{self.name} cannot give: give the teacher as a model"
                )
            key = want.within.key
            if self.fields is not None and key not in self.fields and not want.optional:
                raise TeacherError(
                    f"the function {self.name} does not give '{key}'{nearest(key, self.fields)}"
                )
        self._wants = tuple(wants)

    def knowledge(self, batch: Batch) -> Knowledge:
        """What the function answers, without gradient; it is called for each stream apart.

        Raises:
            TeacherError: no mapping of tensors, another number of rows, a want not answered.
        """
        return answered(self._wants or (), batch, self._answer)

    def _answer(self, batch: Batch, wants: Sequence[Want]) -> Knowledge:
        try:
            with torch.no_grad():
                answer = self.function(batch)
        except StillhouseError:
            raise
        except Exception as error:
            raise failed(f"the function {self.name}", error) from error
        if not isinstance(answer, Mapping):
            raise TeacherError(
                f"the function {self.name} returned {type(answer).__name__}; a mapping from field "
                "names to tensors is needed (a function from strings to vectors calls its first "
                "parameter `texts`)"
            )
        values = {key: self._checked(key, value, batch) for key, value in answer.items()}
        if self._wants is None:
            return Knowledge(values)
        kept: dict[str, Value] = {}
        for want in wants:
            if want.key in values:
                kept[want.key] = values[want.key]
            elif not want.optional:
                raise TeacherError(
                    f"the function {self.name} did not give '{want.key}'{nearest(want.key, values)}"
                )
        return Knowledge(kept)

    def _checked(self, key: str, value: Value, batch: Batch) -> Value:
        if isinstance(value, TopK):
            return value
        if not isinstance(value, Tensor):
            raise TeacherError(
                f"the function {self.name} gave {type(value).__name__} as '{key}'; a tensor is "
                "needed"
            )
        if value.ndim == 0 or len(value) != batch.size:
            raise TeacherError(
                f"the function {self.name} gave '{key}' of shape {tuple(value.shape)} for a batch "
                f"of {batch.size} rows"
            )
        return value.detach().to(batch.device, non_blocking=True)

    def guest(self) -> Frozen:
        """Always refused: a function is no module.

        Raises:
            TeacherError: always.
        """
        raise TeacherError(f"the function {self.name} is no module: give the teacher as a model")


def failed(name: str, error: Exception) -> TeacherError:
    """What a user's own function has raised, by the function's name."""
    return TeacherError(f"{name} failed with {type(error).__name__}: {error}")


def import_callable(reference: str, *, fingerprint: str | None = None) -> Teacher:
    """The teacher that a recipe names as `callable: package.module:function`.

    A function from a batch to its fields; or, where its first parameter is called `texts` or
    `sentences`, from a list of strings to an array of vectors.

    Args:
        reference: the function; or a factory without parameters that returns one, or a
            teacher of any kind.
        fingerprint: from the recipe; else the text of the function's file stands for it.

    Raises:
        ModelError: no such function.
        TeacherError: no fingerprint, and no source to take it from.
    """
    found: Any = imported(reference, "teacher")
    made = found() if _is_factory(found) else found
    if hasattr(made, "knowledge"):
        teacher: Teacher = made
        return teacher
    identity = fingerprint or source_of(found, reference)
    if _reads_texts(made):
        from stillhouse.teachers.text_vectors import TextVectors

        return TextVectors(made, fingerprint=f"{reference}|{identity}", name=reference)
    declared = getattr(made, "fields", None)
    return Callable(made, fields=declared, fingerprint=f"{reference}|{identity}", name=reference)


def _reads_texts(function: Any) -> bool:
    """Whether the first parameter's name says texts, not a batch."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return bool(names) and names[0] in ("texts", "sentences")


def _is_factory(found: Any) -> bool:
    parameters = inspect.signature(found).parameters.values()
    return not any(
        p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters
    ) and not any(p.kind is p.VAR_POSITIONAL for p in parameters)


def source_of(found: Any, reference: str) -> str:
    """A hash of the file that something is defined in.

    Raises:
        TeacherError: it has no source.
    """
    try:
        path = inspect.getsourcefile(found) or ""
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (OSError, TypeError) as error:
        raise TeacherError(
            f"the teacher '{reference}' has no source to tell its version by: add "
            "teacher: {fingerprint: ...}"
        ) from error
