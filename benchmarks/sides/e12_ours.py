"""E12, ours: `Endpoint.label` into a journal."""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from e12_case import CONCURRENCY, PROMPTS, RECORDS, Watch, counts, resident, server

from stillhouse.engine.journal import Journal
from stillhouse.teacher import Request
from stillhouse.teachers.endpoint import Endpoint


def label(port: int, path: Path, stop_at: int | None = None) -> dict[str, float]:
    """Ask everything that the journal lacks; dies at `stop_at` answers."""
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", model="m", concurrency=CONCURRENCY)
    held = {}

    def watch(tally) -> None:
        if tally.answered // 200 not in held:
            held[tally.answered // 200] = resident()
        if stop_at is not None and tally.answered >= stop_at:
            os.kill(os.getpid(), signal.SIGKILL)

    questions = (Request(({"role": "user", "content": p},)) for p in PROMPTS)
    with Journal(path) as journal:
        clock = Watch()
        tally = endpoint.label(questions, journal, progress=watch)
        seconds = clock.seconds()
        kept = len(journal)
    early, late = held[min(held)], held[max(held)]
    return {
        "rate": RECORDS / seconds,
        "kept": kept,
        "growth": late - early,
        "asked": tally.attempts,
    }


if len(sys.argv) > 1:  # the process that is killed
    label(int(sys.argv[1]), Path(sys.argv[2]), RECORDS // 2)
with tempfile.TemporaryDirectory() as folder:
    with server() as port:
        found = {**label(port, Path(folder) / "whole.jsonl"), **counts(port)}
    with server() as port:
        import subprocess

        path = Path(folder) / "killed.jsonl"
        died = subprocess.run([sys.executable, __file__, str(port), str(path)], check=False)
        before = counts(port)
        again = label(port, path)
        after = counts(port)
    found |= {
        "died": died.returncode,
        "answered_before": before["answered"],
        "kept_after": again["kept"],
        "answered_twice": after["repeated"],
    }
    print(json.dumps(found))
