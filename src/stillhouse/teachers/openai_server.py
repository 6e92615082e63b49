"""A small OpenAI-compatible server on the loopback interface, with faults on request.

It serves one of: a rule (a Python function), a replay file, a local causal language model,
or an encoder; `/v1/chat/completions`, `/v1/embeddings` and `/v1/models` as far as each can.
Faults (HTTP 429 and 500, silence, broken connections, garbage, empty answers) are a function
of (seed, request, how often it was sent), so a run can be repeated. Every request is written
to the server's own log, from which tests learn what was really sent.

Run it as `python tools/openai_server.py --help` or
`python -m stillhouse.teachers.openai_server --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from aiohttp import web

from stillhouse.errors import StillhouseError, TeacherError

DEFAULT_RULE = "stillhouse.teachers.delete_rules:compress"
FAULTS = ("429", "500", "timeout", "drop", "garbage", "empty")


@dataclass(frozen=True)
class Faults:
    """Shares of requests that go wrong; their sum is at most 1.

    Attributes:
        shares: by kind, see `FAULTS`: "429" and "500" are HTTP statuses, "timeout" is
            silence for `hang` seconds, "drop" a connection broken off, "garbage" a body
            that is no completion, "empty" a completion without text.
        retry_after: seconds named in the header of a 429.
        hang: seconds of silence.
        seed: of the choice.
        always: a kind that every request gets.
    """

    shares: Mapping[str, float]
    retry_after: float = 0.0
    hang: float = 3600.0
    seed: int = 0
    always: str | None = None

    def kind(self, key: str, times: int) -> str | None:
        """The fault of the `times`-th sending of request `key`, None for none."""
        if self.always:
            return self.always
        name = f"{self.seed}:{key}:{times}".encode()
        digest = hashlib.blake2b(name, digest_size=8).digest()
        chance = int.from_bytes(digest, "little") / 2.0**64
        for kind in FAULTS:
            chance -= self.shares.get(kind, 0.0)
            if chance < 0:
                return kind
        return None


class Backend(Protocol):
    """What stands behind the server."""

    name: str

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """A choice: `{"message": ..., "finish_reason": ..., "usage": ...}`."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text."""
        ...


def _tokens(text: str) -> list[str]:
    return text.split()


def _choice(text: str, prompt: int, most: int | None) -> dict[str, Any]:
    """A completion by something that counts blanks for tokens, cut at `max_tokens`."""
    words = _tokens(text)
    cut = most is not None and len(words) > most
    said = " ".join(words[:most]) if cut else text
    return {
        "message": {"role": "assistant", "content": said},
        "finish_reason": "length" if cut else "stop",
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": min(len(words), most) if cut and most else len(words),
        },
    }


def _prompt_tokens(body: Mapping[str, Any]) -> int:
    return sum(len(_tokens(str(m.get("content", "")))) for m in body.get("messages", ()))


class Rule:
    """Answers by a function `f(messages, body, **options) -> str`, plain or async."""

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self.name = path
        self._function = partial(_function(path), **options)

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        said = self._function(body["messages"], body)
        text = await said if inspect.isawaitable(said) else said
        return _choice(text, _prompt_tokens(body), body.get("max_tokens"))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        raise TeacherError("a rule gives no embeddings: start the server with --encoder")


class Replay:
    """Answers from a JSONL file: a journal, or lines of `{"request": ..., "text": ...}`."""

    def __init__(self, path: Path) -> None:
        self.name = f"replay:{path.name}"
        self._answers: dict[str, list[dict[str, Any]]] = {}
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line)
                    key = _body_key({**entry["request"], "model": ""})
                    entry["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise TeacherError(
                        f"{path}: line {number} is not a recorded answer with 'request' and "
                        f"'text' ({error})"
                    ) from error
                self._answers.setdefault(key, []).append(entry)

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        found = self._answers.get(_body_key({**body, "model": ""}))
        if not found:
            raise web.HTTPNotFound(text="no recorded answer to this request")
        draws = {entry.get("draw", 0): entry for entry in found}
        entry = draws.get(int(body.get("seed") or 0), found[0])
        choice = _choice(entry["text"], _prompt_tokens(body), None)
        choice["finish_reason"] = entry.get("finish_reason", "stop")
        choice["usage"] = entry.get("usage") or choice["usage"]
        if entry.get("logprobs") is not None:
            choice["logprobs"] = {"content": entry["logprobs"]}
        return choice

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        raise TeacherError("a replay file gives no embeddings: start the server with --encoder")


class CausalLM:
    """A local causal language model, one request at a time."""

    def __init__(self, path: str) -> None:
        from stillhouse.teachers.local_speaker import LocalSpeaker

        self.name = path
        self._speaker = LocalSpeaker.load(path)
        self._turn = asyncio.Lock()

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        from stillhouse.teacher import Request

        request = Request(
            messages=tuple(body["messages"]),
            model=str(body.get("model", "")),
            temperature=float(body.get("temperature", 1.0)),
            top_p=float(body.get("top_p", 1.0)),
            max_tokens=int(body.get("max_tokens") or 256),
            seed=body.get("seed"),
            logprobs=body.get("top_logprobs") if body.get("logprobs") else None,
        )
        async with self._turn:
            reply = await asyncio.to_thread(self._speaker.answer, request, 0)
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.finish_reason,
            "usage": dict(reply.usage),
        }
        if reply.logprobs is not None:
            choice["logprobs"] = {"content": reply.logprobs}
        return choice

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        raise TeacherError("a language model gives no embeddings: start the server with --encoder")


class Encoder:
    """A local encoder with mean pooling and unit length, as sentence encoders are used."""

    def __init__(self, path: str) -> None:
        from stillhouse.teachers.local_speaker import LocalEncoder

        self.name = path
        self._encoder = LocalEncoder.load(path)
        self._turn = asyncio.Lock()

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        raise TeacherError("an encoder does not chat: start the server with --model or --rule")

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        async with self._turn:
            vectors = await asyncio.to_thread(self._encoder.embed, texts)
        rows: list[list[float]] = vectors.tolist()
        return rows


def _function(path: str) -> Callable[..., str | Awaitable[str]]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TeacherError(f"--rule {path}: no such function ({error})") from error
    if not callable(found):
        raise TeacherError(f"--rule {path}: not a function")
    function: Callable[..., str | Awaitable[str]] = found
    return function


def _body_key(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Server:
    """The routes, the faults, and the log."""

    def __init__(
        self,
        backend: Backend,
        *,
        faults: Faults,
        latency: float = 0.0,
        key: str = "",
        log: IO[str] | None = None,
    ) -> None:
        self.backend = backend
        self.faults = faults
        self.latency = latency
        self.key = key
        self.log = log
        self.sent: Counter[str] = Counter()
        self.number = 0
        self.busy = 0

    def app(self) -> web.Application:
        """The application; request bodies may hold 64 MB."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/embeddings", self.embeddings)
        app.router.add_get("/v1/models", self.models)
        return app

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The one model there is."""
        model = {"id": self.backend.name, "object": "model", "owned_by": "stillhouse"}
        return web.json_response({"object": "list", "data": [model]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A chat completion."""
        return await self._serve(request, self._complete)

    async def embeddings(self, request: web.Request) -> web.StreamResponse:
        """Embeddings of one text or several."""
        return await self._serve(request, self._embed)

    async def _serve(
        self,
        request: web.Request,
        answer: Callable[[dict[str, Any], str | None], Awaitable[dict[str, Any]]],
    ) -> web.StreamResponse:
        arrived = time.time()
        self.number += 1
        number = self.number
        self.busy += 1
        entry: dict[str, Any] = {"n": number, "time": arrived, "in_flight": self.busy}
        try:
            refused = self._refuse(request)
            if refused is not None:
                entry["status"] = refused.status
                return refused
            try:
                body = json.loads(await request.read())
                assert isinstance(body, dict)
            except (ValueError, AssertionError):
                entry["status"] = 400
                return _error(400, "the request body is not a JSON object")
            key = _body_key(body)
            self.sent[key] += 1
            fault = self.faults.kind(key, self.sent[key])
            entry.update(key=key, times=self.sent[key], fault=fault, status=200)
            if self.latency:
                await asyncio.sleep(self.latency)
            reply = await self._fail(fault, request) or await self._answer(body, fault, answer)
            entry["status"] = reply.status
            return reply
        except (asyncio.CancelledError, ConnectionError):
            entry["status"] = 0
            raise
        finally:
            self.busy -= 1
            if self.log is not None:
                self.log.write(json.dumps(entry) + "\n")
                self.log.flush()

    async def _answer(
        self,
        body: dict[str, Any],
        fault: str | None,
        answer: Callable[[dict[str, Any], str | None], Awaitable[dict[str, Any]]],
    ) -> web.StreamResponse:
        try:
            return web.json_response(await answer(body, fault))
        except StillhouseError as error:
            return _error(400, str(error))
        except (KeyError, TypeError, ValueError) as error:
            return _error(400, f"the request cannot be read: {error!r}")
        except web.HTTPException as error:
            return _error(error.status, error.text or "")

    def _refuse(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.key and self.key not in (given, request.headers.get("api-key", "")):
            return _error(401, f"invalid key: {given or '(none)'}")
        return None

    async def _fail(self, fault: str | None, request: web.Request) -> web.Response | None:
        if fault == "429":
            headers = {"Retry-After": f"{self.faults.retry_after:g}"}
            return _error(429, "slow down", headers)
        if fault == "500":
            return _error(500, "injected failure")
        if fault == "timeout":
            await asyncio.sleep(self.faults.hang)
            return _error(504, "injected silence")
        if fault == "drop":
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("injected drop")
        if fault == "garbage":
            return web.Response(text='{"choices": [{"messa', content_type="application/json")
        return None

    async def _complete(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        if not body["messages"]:
            raise TeacherError("'messages' is empty")
        choice = await self.backend.chat(body)
        usage = choice.pop("usage")
        if fault == "empty":
            choice["message"] = {"role": "assistant", "content": ""}
            choice["finish_reason"] = "stop"
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return {
            "id": f"chatcmpl-{self.number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.get("model") or self.backend.name,
            "choices": [{"index": 0, **choice}],
            "usage": usage,
        }

    async def _embed(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        texts = [body["input"]] if isinstance(body["input"], str) else list(body["input"])
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TeacherError("'input' must be a text or a list of texts")
        vectors = await self.backend.embed(texts)
        count = sum(len(_tokens(text)) for text in texts)
        return {
            "object": "list",
            "model": body.get("model") or self.backend.name,
            "data": [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = {"error": {"message": message, "type": "error", "code": status}}
    return web.json_response(body, status=status, headers=headers)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    cli = argparse.ArgumentParser(
        prog="openai_server", description="A small OpenAI-compatible server on 127.0.0.1."
    )
    what = cli.add_mutually_exclusive_group()
    what.add_argument("--rule", metavar="MODULE:FUNCTION", help=f"default: {DEFAULT_RULE}")
    what.add_argument("--replay", type=Path, metavar="JSONL", help="answers on file")
    what.add_argument("--model", metavar="PATH", help="a causal language model (chat)")
    what.add_argument("--encoder", metavar="PATH", help="an encoder (embeddings)")
    cli.add_argument("--options", default="{}", help="JSON object of options for the rule")
    cli.add_argument("--port", type=int, default=0, help="0 takes a free one, and prints it")
    cli.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    for kind in FAULTS:
        cli.add_argument(f"--{kind}", type=float, default=0.0, help=f"share of {kind} faults")
    cli.add_argument("--always", choices=FAULTS, help="one fault for every request")
    cli.add_argument("--retry-after", type=float, default=0.0, help="seconds told with a 429")
    cli.add_argument("--hang", type=float, default=3600.0, help="seconds of a timeout fault")
    cli.add_argument("--seed", type=int, default=0, help="of the faults")
    cli.add_argument("--key-env", metavar="NAME", help="demand the key in this variable")
    cli.add_argument("--log", type=Path, metavar="JSONL", help="one line per request")
    cli.add_argument(
        "--with-parent", action="store_true", help="stop when standard input is closed"
    )
    return cli


def backend_of(args: argparse.Namespace) -> Backend:
    """The backend the command line names."""
    if args.replay is not None:
        return Replay(args.replay)
    if args.model is not None:
        return CausalLM(args.model)
    if args.encoder is not None:
        return Encoder(args.encoder)
    return Rule(args.rule or DEFAULT_RULE, json.loads(args.options))


def server_of(args: argparse.Namespace, log: IO[str] | None) -> Server:
    """The server the command line describes.

    Raises:
        TeacherError: shares that do not add up, a key that is not set, a bad backend.
    """
    shares = {kind: float(getattr(args, kind)) for kind in FAULTS}
    if min(shares.values()) < 0 or sum(shares.values()) > 1:
        raise TeacherError(f"shares of faults lie in [0, 1] and add up to at most 1: {shares}")
    key = os.environ.get(args.key_env, "") if args.key_env else ""
    if args.key_env and not key:
        raise TeacherError(f"--key-env {args.key_env}: this variable is not set")
    faults = Faults(shares, args.retry_after, args.hang, args.seed, args.always)
    return Server(backend_of(args), faults=faults, latency=args.latency, key=key, log=log)


async def serve(server: Server, port: int, with_parent: bool) -> None:
    """Listen on 127.0.0.1 until cancelled (or until the parent is gone)."""
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    bound = runner.addresses[0][1]
    print(f"listening on http://127.0.0.1:{bound}/v1", flush=True)
    try:
        if with_parent:
            await _parent_gone()
        else:
            await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _parent_gone() -> None:
    """Return when standard input closes, as it does when the parent dies, however it dies."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.read(1024):
        pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; returns the exit code."""
    args = parser().parse_args(argv)
    with contextlib.ExitStack() as open_files:
        log = None
        if args.log is not None:
            args.log.parent.mkdir(parents=True, exist_ok=True)
            log = open_files.enter_context(args.log.open("a", encoding="utf-8"))
        try:
            server = server_of(args, log)
            asyncio.run(serve(server, args.port, args.with_parent))
        except KeyboardInterrupt:
            return 0
        except (StillhouseError, OSError) as error:
            print(f"openai_server: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
