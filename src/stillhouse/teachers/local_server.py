"""Start the local OpenAI-compatible server beside a run, and stop it with the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from stillhouse.errors import TeacherError


class LocalServer:
    """A context manager that runs `stillhouse.teachers.openai_server` as a process.

    The process ends with the block, and also when this process is killed: it watches its
    standard input.

    Attributes:
        url: base URL of the running server, such as "http://127.0.0.1:40001/v1".

    Args:
        settings: command-line settings by name, such as {"rule": "package.module:function",
            "options": {...}, "latency": 0.05, "500": 0.1, "seed": 1, "log": path}; lists
            and mappings are passed as JSON.
        wait: seconds to wait until it listens (a language model takes its time to load).

    Raises:
        TeacherError: it did not start; the message holds what it said.
    """

    def __init__(self, wait: float = 180.0, **settings: Any) -> None:
        self.url = ""
        self._wait = wait
        self._arguments = arguments(settings)
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> LocalServer:
        self._errors = tempfile.TemporaryFile("w+")
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stillhouse.teachers.openai_server", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # an interrupt of the run must not stop it first
        )
        assert self._process.stdout is not None
        alarm = threading.Timer(self._wait, self._process.kill)
        alarm.start()
        line = self._process.stdout.readline()
        alarm.cancel()
        if not line.startswith("listening on "):
            self._process.wait()
            said = self._said()
            self._stop()
            raise TeacherError(f"the local server did not start: {said or 'it said nothing'}")
        self.url = line.removeprefix("listening on ").strip()
        return self

    def _said(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read().strip()[-2000:]

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings by name as command-line arguments of the server."""
    given = ["--with-parent"]
    for name, value in settings.items():
        if value is None or value is False:
            continue
        given.append("--" + name.replace("_", "-"))
        if value is not True:
            given.append(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    return given
