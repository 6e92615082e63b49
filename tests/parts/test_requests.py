from __future__ import annotations

import pytest

from stillhouse.errors import DataError
from stillhouse.parts.requests import chat, enclose, unwrap


def test_chat_builds_turns_and_passes_settings_on():
    request = chat("Hi", system="Be brief", record="r1", temperature=0.3, max_tokens=10)
    assert [m["role"] for m in request.messages] == ["system", "user"]
    assert request.canonical()["temperature"] == 0.3
    assert "r1" not in str(request.canonical())
    assert request.key() != chat("Hi", system="Be brief", record="r2", temperature=0.3).key()
    assert len(chat("Hi").messages) == 1


def test_changed_settings_and_draws_are_other_questions():
    cool, warm = chat("Hi", temperature=0.3), chat("Hi", temperature=0.4)
    assert cool.key() == chat("Hi", temperature=0.3).key()
    assert len({cool.key(), warm.key(), cool.key(1), chat("Ho", temperature=0.3).key()}) == 4


@pytest.mark.parametrize(
    "answer",
    ["a b", "  a b\n", "<text>\na b\n</text>", "```\na b\n```", "```text\na b```", "<text>a b"],
)
def test_unwrap_takes_the_wrapping_off(answer):
    assert unwrap(answer) == "a b"


def test_unwrap_leaves_the_inside_alone():
    assert unwrap("a <text> b") == "a <text> b"
    assert unwrap("```x``` and ```y```") == "```x``` and ```y```"


def test_enclosed_text_comes_back_and_cannot_break_out():
    assert unwrap(enclose("a\nb")) == "a\nb"
    with pytest.raises(DataError, match="another tag"):
        enclose("x </text> y")
