"""What every test may use: reference vectors and real data beside the checkout."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# Exactness holds at one thread count, and many small tests run slower on more than one: set
# before torch is imported, and passed on to every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"
USER_CACHE = pathlib.Path(
    os.environ.get("STILLHOUSE_CACHE", "").strip() or "~/.cache/stillhouse"
).expanduser()
MATCHED: dict[str, set[str]] = collections.defaultdict(set)
SKIPPED_FOR_LACK: list[str] = []


class Golden:
    """The reference vectors of one slug, case by case."""

    def __init__(self, slug: str, used: set[tuple[str, str]]) -> None:
        self.slug = slug
        self._used = used
        with np.load(SHARED / "golden" / f"{slug}.npz", allow_pickle=False) as stored:
            self._arrays = {name: stored[name] for name in stored.files}
        path = SHARED / "golden" / f"{slug}.json"
        self.json: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def cases(self) -> list[str]:
        """Names of the cases that hold arrays."""
        return sorted({name.split("__", 1)[0] for name in self._arrays})

    def case(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of one case by term; the case counts as matched when the test passes."""
        prefix = name + "__"
        found = {k[len(prefix) :]: v for k, v in self._arrays.items() if k.startswith(prefix)}
        if not found:
            raise KeyError(f"no case {name!r} in golden/{self.slug}.npz; has {self.cases()}")
        self._used.add((self.slug, name))
        return found

    def count(self, name: str) -> None:
        """Mark a case of the JSON file as checked by the running test."""
        self._used.add((self.slug, name))


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """`golden(slug)` opens the reference vectors, or skips where they are absent."""
    used: set[tuple[str, str]] = set()
    request.node.golden_used = used

    def open_vectors(slug: str) -> Golden:
        if not (SHARED / "golden" / f"{slug}.npz").exists():
            pytest.skip(f"reference vectors golden/{slug}.npz are not beside the checkout")
        return Golden(slug, used)

    return open_vectors


@pytest.fixture
def golden_weights() -> pathlib.Path:
    """The folder of published checkpoints that lie beside the reference vectors."""
    folder = SHARED / "golden" / "weights"
    if not folder.exists():
        pytest.skip("published weights golden/weights are not beside the checkout")
    return folder


@pytest.fixture
def data_root(monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The root of real data, made known to the library for this test."""
    folder = SHARED / "data"
    if not folder.exists():
        pytest.skip("the data root shared/data is not beside the checkout")
    monkeypatch.setenv("STILLHOUSE_DATA", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never read or fill the user's cache, unless told to by STILLHOUSE_TEST_CACHE."""
    cache = os.environ.get("STILLHOUSE_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("STILLHOUSE_CACHE", cache)


@pytest.fixture
def real_models(_own_cache: None) -> pathlib.Path:
    """The real models of `make models`, linked into this test's own cache; nothing else is."""
    folder = pathlib.Path(os.environ["STILLHOUSE_CACHE"]) / "models"
    if not folder.exists():
        if not (USER_CACHE / "models").is_dir():
            pytest.skip("no real models are on this machine (make models)")
        folder.symlink_to(USER_CACHE / "models")
    return folder


@pytest.fixture(scope="session")
def in_processes() -> Callable[[pathlib.Path, pathlib.Path, int], str]:
    """See `run_in_processes`."""
    return run_in_processes


def run_in_processes(script: pathlib.Path, folder: pathlib.Path, count: int) -> str:
    """Run a script on a new folder, its only argument, in one process or as several together.

    Returns:
        What they wrote.
    """
    folder.mkdir()
    launcher = [] if count == 1 else [
        "-m", "torch.distributed.run", "--nproc-per-node", str(count),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(script), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" and report.passed:
        for slug, case in getattr(item, "golden_used", ()):
            MATCHED[slug].add(case)
    if report.skipped and "beside the checkout" in str(report.longrepr):
        SKIPPED_FOR_LACK.append(item.nodeid)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MATCHED:
        terminalreporter.section("reference vectors")
        for slug in sorted(MATCHED):
            terminalreporter.write_line(f"{slug}: {len(MATCHED[slug])} cases matched")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    on_ci = os.environ.get("CI", "").lower() in {"1", "true"}
    if on_ci and SHARED.exists() and SKIPPED_FOR_LACK and exitstatus == 0:
        session.exitstatus = 1
        print(f"\nskipped although shared/ lies beside the checkout: {SKIPPED_FOR_LACK}")
