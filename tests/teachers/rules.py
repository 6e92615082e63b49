"""Rules served by the local server in tests."""

from __future__ import annotations


def upper(messages, body):
    return messages[-1]["content"].upper()


def seed(messages, body):
    return str(body["seed"])


async def slow(messages, body):
    return "async " + messages[-1]["content"]
