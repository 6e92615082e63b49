"""A large model behind an OpenAI-compatible server, asked asynchronously and never twice.

Works with whatever speaks `POST {base_url}/chat/completions` and `/embeddings`: OpenAI,
Azure-like gateways, vLLM, llama.cpp, Ollama, or `tools/openai_server.py`. The transport is
aiohttp, chosen by measurement: at 32 requests in flight and 50 ms latency httpx reached a
quarter to a half of its rate.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import torch
from torch import Tensor

from stillhouse.engine.journal import Journal, Price
from stillhouse.errors import RecipeError, TeacherError
from stillhouse.parts.text_spans import count_tokens
from stillhouse.teacher import Reply, Request
from stillhouse.teachers import asking
from stillhouse.teachers.asking import Bucket, Estimate, Patience, Question, Tally, TryAgain

_PASSING = frozenset({408, 409, 425, 429})
_CROWDED = frozenset({429, 503})
_ROOM = 0.5  # seconds
_QUOTA = "insufficient_quota"


class Endpoint:
    """A speaker behind an OpenAI-compatible server.

    Attributes:
        fingerprint: names the model, not the address, so that a server may move.

    Args:
        base_url: up to and including the version, such as "http://127.0.0.1:8000/v1".
        model: name sent with requests that name none.
        key_env: name of the environment variable that holds the key; None for no key. The
            key itself is never stored, logged or journalled.
        key_header: "Authorization" (sent as "Bearer <key>"), or a gateway's own such as
            "api-key" (sent bare).
        query: fields added to the URL, such as {"api-version": "2024-06-01"}.
        concurrency: requests in flight at once.
        rate: most requests per second, None for no limit.
        burst: how many may go at once under `rate`.
        timeout: seconds for one try, from sending to the last byte.
        patience: how failures are met.
        accept_empty: an empty answer is an answer; by default it is tried again.
        price: money per million tokens, for the account and the estimate.

    Raises:
        RecipeError: the address is not http(s).
        TeacherError: the environment variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "",
        key_env: str | None = None,
        key_header: str = "Authorization",
        query: Mapping[str, str] | None = None,
        concurrency: int = 32,
        rate: float | None = None,
        burst: int = 1,
        timeout: float = 120.0,
        patience: Patience | None = None,
        accept_empty: bool = False,
        price: Price | None = None,
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https"):
            raise RecipeError(
                f"an endpoint's base_url begins with http:// or https://, got {base_url!r}"
            )
        if concurrency < 1:
            raise RecipeError(f"concurrency must be at least 1, got {concurrency}")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.patience = patience or Patience()
        self.accept_empty = accept_empty
        self.price = price or Price()
        self.fingerprint = f"endpoint:{model}"
        self._key = _key_from(key_env)
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            bearer = key_header.lower() == "authorization"
            self._headers[key_header] = f"Bearer {self._key}" if bearer else self._key
        self._query = dict(query or {})
        self._bucket = Bucket(rate, burst)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places: asyncio.Semaphore | None = None

    # One question --------------------------------------------------------------------

    async def ask(self, request: Request, draw: int = 0) -> Reply:
        """The answer to one request, after as many tries as `patience` allows.

        Raises:
            TeacherError: refused for good, or no usable answer after all tries.
        """
        reply: Reply = await self._patiently(request.key(draw), lambda: self.attempt(request, draw))
        return reply

    async def attempt(self, request: Request, draw: int = 0) -> Reply:
        """One try.

        Args:
            request: sent with this endpoint's model when it names none.
            draw: added to the request's seed when it has one, so that draws differ.

        Raises:
            TryAgain: another try may succeed.
            TeacherError: it will not.
        """
        body = request.canonical()
        body["model"] = body["model"] or self.model
        if request.seed is not None:
            body["seed"] = request.seed + draw
        start = time.perf_counter()
        raw = await self._post("/chat/completions", body)
        reply = read_reply(raw, time.perf_counter() - start)
        if not reply.text and reply.finish_reason == "stop" and not self.accept_empty:
            raise TryAgain("empty answer")
        return reply

    async def embed(self, texts: Sequence[str], *, model: str = "", batch: int = 64) -> Tensor:
        """Embeddings of texts.

        Args:
            texts: N texts.
            model: the encoder's name at the endpoint (default: this endpoint's model).
            batch: texts per request.

        Returns:
            (N, dim) float32, in the order of `texts`.
        """

        async def part(start: int) -> Tensor:
            body = {"model": model or self.model, "input": list(texts[start : start + batch])}
            raw = await self._patiently(
                asking.body_key(body), lambda: self._post("/embeddings", body)
            )
            return read_embeddings(raw, len(body["input"]))

        if not texts:
            raise TeacherError("no text to embed")
        parts = await asyncio.gather(*(part(i) for i in range(0, len(texts), batch)))
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise TeacherError(f"{self.base_url} gave embeddings of different width: {widths}")
        return torch.cat(parts)

    async def _patiently(self, key: str, attempt: Callable[[], Any]) -> Any:
        for number in range(1, self.patience.attempts + 1):
            try:
                async with self._place():
                    await self._bucket.take()
                    return await attempt()
            except TryAgain as failure:
                most = self.patience.unreachable if failure.unreachable else 10**9
                if number >= min(self.patience.attempts, most):
                    raise TeacherError(
                        f"no usable answer after {number} tries: {failure.why}"
                    ) from failure
                delay = self.patience.delay(key, number, failure.after)
            await asyncio.sleep(delay)
        raise AssertionError("unreachable: the last try returns or raises")

    def _place(self) -> asyncio.Semaphore:
        self._here()
        assert self._places is not None
        return self._places

    # Many questions ------------------------------------------------------------------

    async def ask_all(
        self,
        questions: Iterable[Request | Question],
        journal: Journal,
        *,
        limit: int | None = None,
        shard: tuple[int, int] | None = None,
        progress: Callable[[Tally], None] | None = None,
    ) -> Tally:
        """Ask every question that `journal` does not hold; see `asking.ask_all`."""
        return await asking.ask_all(
            self.attempt,
            questions,
            journal,
            concurrency=self.concurrency,
            patience=self.patience,
            rate=self._bucket,
            limit=limit,
            shard=shard,
            progress=progress,
        )

    def label(
        self,
        questions: Iterable[Request | Question],
        journal: Journal,
        *,
        limit: int | None = None,
        shard: tuple[int, int] | None = None,
        progress: Callable[[Tally], None] | None = None,
    ) -> Tally:
        """`ask_all` from ordinary code, in an event loop of its own."""

        async def run() -> Tally:
            async with self:
                return await self.ask_all(
                    questions, journal, limit=limit, shard=shard, progress=progress
                )

        return asyncio.run(run())

    def estimate(
        self,
        questions: Iterable[Request | Question],
        *,
        count: Callable[[str], int] = count_tokens,
        expected: Callable[[Request], int] | None = None,
        journal: Journal | None = None,
        limit: int | None = None,
        shard: tuple[int, int] | None = None,
    ) -> Estimate:
        """A dry run at this endpoint's price; nothing is sent. See `asking.estimate`."""
        return asking.estimate(
            questions,
            count=count,
            price=self.price,
            expected=expected,
            journal=journal,
            limit=limit,
            shard=shard,
        )

    # The wire ------------------------------------------------------------------------

    async def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and read a JSON object, or say why not."""
        url = self.base_url + path
        payload = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        try:
            async with self._here().post(url, data=payload, params=self._query) as answer:
                content = await answer.read()
                status, headers = answer.status, answer.headers
        except TimeoutError as error:
            raise TryAgain(f"no answer within {self.timeout:g} s") from error
        except aiohttp.ClientConnectorError as error:
            why = error.strerror or type(error).__name__
            raise TryAgain(
                f"cannot connect to {self.base_url} ({self._clean(why)}): is the server "
                "running, and is the address right?",
                unreachable=True,
            ) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise TryAgain(f"connection broke off ({type(error).__name__})") from error
        if status == 200:
            return _object(content)
        self._refused(status, headers, content)
        raise AssertionError("unreachable: a refusal always raises")

    def _refused(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        said = self._clean(content.decode("utf-8", "replace"))[:300].strip()
        passing = status in _PASSING or status >= 500
        if passing and not (status == 429 and _QUOTA in said):
            after = _retry_after(headers.get("Retry-After"))
            if after is None and status in _CROWDED:
                after = _ROOM  # asked for patience without saying how much
            raise TryAgain(f"HTTP {status}", after=after)
        raise TeacherError(
            f"{self.base_url} refused a request for good: HTTP {status}"
            f"{_ADVICE.get(status, '')}. It said: {said or '(nothing)'}"
        )

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _here(self) -> aiohttp.ClientSession:
        """The session of the running event loop; a new loop gets a new one."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._loop is not loop:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                headers=self._headers,
            )
            self._loop = loop
            self._places = asyncio.Semaphore(self.concurrency)
        return self._session

    async def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(RuntimeError):
                await session.close()

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, model={self.model!r})"


_ADVICE = {
    400: " (the server does not accept this request)",
    401: " (the key is missing or wrong: name its environment variable in key_env)",
    403: " (the key may not do this)",
    404: " (no such path or model: base_url ends with the version, as in /v1)",
    413: " (the request is too large)",
    422: " (the server does not accept this request)",
    429: " (the quota is used up)",
}


def _key_from(name: str | None) -> str:
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise TeacherError(
            f"the environment variable {name} is not set, and the endpoint's key is read "
            f"from it: export {name}=... (keys are never read from a recipe)"
        )
    return key


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _object(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise TryAgain("the answer is not JSON") from error
    if not isinstance(raw, dict):
        raise TryAgain("the answer is not a JSON object")
    return raw


def read_reply(raw: Mapping[str, Any], latency: float = 0.0) -> Reply:
    """A chat completion as a `Reply`.

    Args:
        raw: the JSON object of `/chat/completions`.
        latency: seconds it took.

    Raises:
        TryAgain: it has no choice with a message.
    """
    try:
        choice = raw["choices"][0]
        message = choice["message"]
        text = message.get("content")
        refusal = message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TryAgain("the answer holds no message") from error
    if text is not None and not isinstance(text, str):
        raise TryAgain("the answer's message is not text")
    reason = choice.get("finish_reason") or "stop"
    logprobs = choice.get("logprobs")
    usage = raw.get("usage")
    return Reply(
        text=text or "",
        finish_reason="content_filter" if refusal and not text else str(reason),
        logprobs=logprobs.get("content") if isinstance(logprobs, dict) else None,
        usage=_counts(usage),
        raw=raw,
        latency=latency,
    )


def _counts(usage: object) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    return {str(k): v for k, v in usage.items() if isinstance(v, int)}


def read_embeddings(raw: Mapping[str, Any], count: int) -> Tensor:
    """`/embeddings` as (count, dim) float32, rows in the order asked.

    A vector is a list of numbers, or base64 of little-endian float32 as some servers send it.
    Rows without `index` stand as they came.

    Raises:
        TeacherError: another number of rows, rows of different length, numbers that are none, or
            an `index` that does not say one row each.
    """
    try:
        rows = list(raw["data"])
        if rows and all("index" in row for row in rows):
            rows.sort(key=lambda row: int(row["index"]))
            if [int(row["index"]) for row in rows] != list(range(len(rows))):
                raise ValueError("their indices are not 0, 1, 2 ...")
        vectors = torch.tensor([_vector(row["embedding"]) for row in rows], dtype=torch.float32)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else error
        raise TeacherError(f"the embeddings that came back cannot be read: {why}") from error
    if vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        raise TeacherError(f"asked for {count} embeddings, got shape {tuple(vectors.shape)}")
    if not bool(vectors.isfinite().all()):
        raise TeacherError("the embeddings that came back hold NaN or infinity")
    return vectors


def _vector(given: Any) -> list[float]:
    if not isinstance(given, str):
        return list(given)
    content = base64.b64decode(given, validate=True)
    return [number for (number,) in struct.iter_unpack("<f", content)]
