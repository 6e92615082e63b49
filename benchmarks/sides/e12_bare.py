"""E12, a bare client: 32 workers on one queue, aiohttp, answers appended to a file."""

import asyncio
import json
import tempfile

import aiohttp
from e12_case import CONCURRENCY, PROMPTS, RECORDS, Watch, counts, server


async def main(port, file):
    """Every prompt until it is answered."""
    queue = asyncio.Queue()
    for prompt in PROMPTS:
        queue.put_nowait(prompt)

    async def worker(session):
        while not queue.empty():
            prompt = queue.get_nowait()
            body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
            async with session.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=body
            ) as answer:
                if answer.status != 200:
                    queue.put_nowait(prompt)
                    continue
                file.write(json.dumps(await answer.json()) + "\n")

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(CONCURRENCY)))


with server() as port, tempfile.TemporaryFile("w") as file:
    watch = Watch()
    asyncio.run(main(port, file))
    print(json.dumps({"rate": RECORDS / watch.seconds(), **counts(port)}))
