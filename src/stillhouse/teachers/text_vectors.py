"""Teachers that turn texts into vectors and are nothing else: functions, arrays, endpoints."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stillhouse.batch import Batch
from stillhouse.errors import StillhouseError, TeacherError
from stillhouse.teacher import Frozen, Knowledge, Want, answered
from stillhouse.teachers.endpoint import Endpoint
from stillhouse.teachers.function import failed, source_of

Embed = Callable[[list[str]], Any]
VECTOR = "embedding"


class TextVectors:
    """A teacher over any function from texts to vectors: `encode` of a library, your own.

    Attributes:
        once: a capture asks about no text a second time, not even to learn the width.

    Args:
        embed: `embed(texts)` returns (B, D) numbers: an array, a tensor, or lists.
        fingerprint: stands for all its answers depend on, in stores and stamps; none: the text
            of the file it is in.
        name: for messages.
        view: of a batch that holds the texts.

    Raises:
        TeacherError: no fingerprint, and no source to take it from.
    """

    provides = frozenset({"vector"})
    once = True

    def __init__(
        self, embed: Embed, *, fingerprint: str = "", name: str = "", view: str = "text"
    ) -> None:
        self.embed, self.view = embed, view
        self.name = name or str(getattr(embed, "__qualname__", type(embed).__name__))
        identity = fingerprint or source_of(embed, self.name)
        text = f"text-vectors|{self.name}|{identity}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._wants: tuple[Want, ...] = ()

    def bind(self, wants: Sequence[Want], task: Any) -> None:
        """Check that nothing but vectors is wanted.

        Raises:
            TeacherError: something else is.
        """
        for want in wants:
            if want.field != VECTOR and not want.optional:
                raise TeacherError(
                    f"the method needs '{want.field}' of the teacher, and {self.name} gives "
                    "vectors of texts only: give the teacher as a model"
                )
        self._wants = tuple(want for want in wants if want.field == VECTOR)

    def knowledge(self, batch: Batch) -> Knowledge:
        """The vectors of the batch's texts.

        Raises:
            TeacherError: another number of vectors, or no numbers.
        """
        return answered(self._wants, batch, self._answer)

    def _answer(self, batch: Batch, wants: Sequence[Want]) -> Knowledge:
        texts = list(batch.view(self.view))
        try:
            with torch.no_grad():
                found = self.vectors(texts)
        except StillhouseError:
            raise
        except Exception as error:
            raise failed(self.name, error) from error
        vectors = self._tensor(found, len(texts))
        keys = [want.key for want in wants] or [VECTOR]
        return Knowledge(dict.fromkeys(keys, vectors.to(batch.device)))

    def vectors(self, texts: list[str]) -> Any:
        """(B, D) vectors of texts, in any form."""
        return self.embed(texts)

    def _tensor(self, found: Any, count: int) -> Tensor:
        try:
            tensor = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
            tensor = tensor.detach().float()
        except (TypeError, ValueError) as error:
            raise TeacherError(f"{self.name} gave no array of vectors: {error}") from error
        if tensor.ndim != 2 or len(tensor) != count or not tensor.shape[1]:
            raise TeacherError(
                f"{self.name} gave {tuple(tensor.shape)} for {count} texts; one vector per text "
                "is needed, (texts, width)"
            )
        return tensor

    def guest(self) -> Frozen:
        """Always refused: there is no module.

        Raises:
            TeacherError: always.
        """
        raise TeacherError(f"{self.name} is no module: give the teacher as a model")


def known_vectors(texts: Sequence[str], vectors: ArrayLike, *, name: str = "array") -> TextVectors:
    """A teacher over vectors that were made before: an array, or a memory map of a .npy file.

    Args:
        texts: N texts, as they were sent.
        vectors: (N, D) numbers, read row by row.
        name: for messages.

    Raises:
        TeacherError: another number of vectors than texts.
    """
    table: Any = vectors if isinstance(vectors, (np.ndarray, Tensor)) else np.asarray(vectors)
    if table.ndim != 2 or len(table) != len(texts):
        raise TeacherError(
            f"{len(texts)} texts need as many vectors (texts, width), not {tuple(table.shape)}"
        )
    place = {text: number for number, text in enumerate(texts)}

    def embed(asked: list[str]) -> Any:
        lost = [text for text in asked if text not in place]
        if lost:
            raise TeacherError(
                f"{len(lost)} of {len(asked)} texts have no vector in the {name}, such as "
                f"{lost[0][:60]!r}: give those of all texts, letter by letter as they are read"
            )
        rows = [place[text] for text in asked]
        return table[rows]

    digest = hashlib.sha256(repr(list(texts)).encode())
    for start in range(0, len(table), 4096):
        digest.update(np.ascontiguousarray(np.asarray(table[start : start + 4096])).data)
    return TextVectors(embed, fingerprint=digest.hexdigest(), name=name)


class EndpointVectors(TextVectors):
    """An encoder behind an OpenAI-compatible `/embeddings`, asked in batches.

    What it answers is to be kept (`teacher: {store: ...}`; some methods do so by themselves):
    then every text is asked about once.

    Attributes:
        remote: answers cost time and money: a capture writes each block down at once.

    Args:
        speaking: opens the endpoint, and the local server behind it if it has one; entered at
            the first question, left by `close`.
        fingerprint: names the model, not the address.
        name: for messages.
    """

    remote = True

    def __init__(
        self,
        speaking: Callable[[], AbstractContextManager[Endpoint]],
        *,
        fingerprint: str,
        name: str = "endpoint",
    ) -> None:
        super().__init__(self.vectors, fingerprint=fingerprint, name=name)
        self._speaking = speaking
        self._open: ExitStack | None = None
        self._endpoint: Endpoint | None = None

    def vectors(self, texts: list[str]) -> Tensor:
        """(B, D) from the endpoint; an empty text, which some refuse, is sent as a space."""
        if self._endpoint is None:
            self._open = ExitStack()
            self._endpoint = self._open.enter_context(self._speaking())
            atexit.register(self.close)
        endpoint, sent = self._endpoint, [text or " " for text in texts]

        async def ask() -> Tensor:
            async with endpoint:
                return await endpoint.embed(sent)

        return asyncio.run(ask())

    def close(self) -> None:
        """Stop the server, if one was started; the next question starts it again."""
        opened, self._open, self._endpoint = self._open, None, None
        if opened is not None:
            atexit.unregister(self.close)
            opened.close()
