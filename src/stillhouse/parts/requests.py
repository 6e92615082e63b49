"""Building requests to a chat model, and taking its answers out of their wrapping."""

from __future__ import annotations

import re
from typing import Any

from stillhouse.errors import DataError
from stillhouse.teacher import Request

_FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)


def chat(user: str, *, system: str | None = None, record: str = "", **settings: Any) -> Request:
    """A request of one user turn, after a system turn if there is one.

    Args:
        user: the question.
        system: the role the model is to play.
        record: what the request is about; part of its key, not sent.
        settings: further fields of `Request`.
    """
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": user})
    return Request(messages=tuple(turns), record=record, **settings)


def enclose(text: str, tag: str = "text") -> str:
    """`text` between tags on lines of their own, so that it cannot be taken for the task.

    Raises:
        DataError: the text holds the closing tag.
    """
    if f"</{tag}>" in text:
        raise DataError(f"the text to enclose holds </{tag}> itself: choose another tag")
    return f"<{tag}>\n{text}\n</{tag}>"


def unwrap(answer: str, tag: str = "text") -> str:
    """An answer without what models like to put round it: tags, code fences, blanks.

    Only wrapping that encloses the whole answer is removed; nothing inside is touched.
    """
    text = answer.strip()
    fenced = _FENCE.match(text)
    text = fenced.group(1).strip() if fenced else text
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.startswith(opening):
        text = text.removeprefix(opening).removesuffix(closing).strip()
    return text
