"""What every side of E12 asks, and the server it asks."""

import json
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

RECORDS, CONCURRENCY, LATENCY = 2000, 32, 0.05
PROMPTS = [f"say what you know about number {i}" for i in range(RECORDS)]


@contextmanager
def server():
    """The stub in a process of its own; gives its port."""
    command = [sys.executable, str(Path(__file__).with_name("e12_stub.py"))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(10)


def counts(port: int) -> dict[str, int]:
    """What the server has answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/count") as answer:
        return json.load(answer)


def resident() -> float:
    """MiB that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) / 1024


class Watch:
    """Wall time."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.began
