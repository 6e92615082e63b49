"""E12, the server: an OpenAI-compatible stub with 50 ms latency and 2 % failures.

It counts what it has answered, by prompt, and says so at /count. Its own code, not ours, so that
no side meets a friend.
"""

import asyncio
import collections
import random
import sys

from aiohttp import web

LATENCY, FAILURES, LENGTH = 0.05, 0.02, 4000
answered, calls = collections.Counter(), 0
chance = random.Random(0)


async def complete(request):
    """One answer, or HTTP 500."""
    global calls
    calls += 1
    body = await request.json()
    fails = chance.random() < FAILURES
    await asyncio.sleep(LATENCY)
    if fails:
        return web.Response(status=500, text="try again")
    prompt = body["messages"][-1]["content"]
    answered[prompt] += 1
    text = f"{prompt} {'word ' * (LENGTH // 5)}"
    return web.json_response(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body.get("model", ""),
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {"prompt_tokens": 8, "completion_tokens": 800, "total_tokens": 808},
        }
    )


async def count(request):
    """What was answered so far."""
    repeated = sum(n - 1 for n in answered.values())
    return web.json_response(
        {"calls": calls, "answered": sum(answered.values()), "repeated": repeated}
    )


async def main():
    """Serve on a free port, which is said on the first line, until the input closes."""
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/count", count)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


asyncio.run(main())
