"""Measuring side by side: environments of the peers, interleaved subprocesses, ratios.

Absolute times mean nothing on a shared machine. Every figure is a ratio of two sides that took
turns (A B C, A B C, ...), each in a fresh process and, where it is a peer, in an environment of
its own; the median over the rounds is reported with the smallest and the largest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
LIMIT = 1800.0


class SideFailed(RuntimeError):
    """A side of a contest ended with an error; the message holds the tail of what it said."""


@dataclass
class Row:
    """What an experiment found.

    Attributes:
        ratios: name to the median of ours over the other side's.
        targets: name of a ratio to "<= 1.03" or ">= 0.9".
        spread: name of a ratio to its least and greatest value over the rounds.
        notes: what a reader must know.
        figures: other numbers, for the record.
        versions: of what was compared with.
    """

    ratios: dict[str, float]
    targets: dict[str, str] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every target holds; a target without its ratio does not."""
        return all(holds(self.ratios.get(name), rule) for name, rule in self.targets.items())

    def add(self, name: str, rounds: Sequence[float], target: str | None = None) -> float:
        """Enter the median of a ratio over the rounds, with its spread and target."""
        value = statistics.median(rounds)
        self.ratios[name] = round(value, 4)
        self.spread[name] = [round(min(rounds), 4), round(max(rounds), 4)]
        if target is not None:
            self.targets[name] = target
        return value


def holds(value: float | None, rule: str) -> bool:
    """Whether a value keeps a rule such as "<= 1.03".

    Raises:
        ValueError: the rule is not of that form.
    """
    found = re.fullmatch(r"(<=|>=|<|>|==) *([0-9.eE+-]+)", rule)
    if found is None:
        raise ValueError(f"a target reads like '<= 1.03', found '{rule}'")
    if value is None:
        return False
    bound = float(found[2])
    kept = {
        "<=": value <= bound,
        ">=": value >= bound,
        "<": value < bound,
        ">": value > bound,
        "==": value == bound,
    }
    return kept[found[1]]


def ratios(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], ours: str, other: str, key: str
) -> list[float]:
    """`key` of one side over that of another, round by round."""
    return [float(a[key]) / float(b[key]) for a, b in zip(rounds[ours], rounds[other])]


class Bench:
    """What an experiment measures with.

    Args:
        quick: fewer rounds, to try an experiment out; the result says so.
        threads: of every side (OMP_NUM_THREADS).
    """

    def __init__(self, *, quick: bool = False, threads: int = 1) -> None:
        self.quick, self.threads = quick, threads
        self.python = Path(sys.executable)
        cache = os.environ.get("STILLHOUSE_CACHE") or str(Path.home() / ".cache" / "stillhouse")
        self.folder = Path(cache).expanduser() / "benchmarks"

    def rounds(self, count: int) -> int:
        """How many rounds to take: fewer when quick."""
        return min(count, 2) if self.quick else count

    def environment(self, *packages: str, alone: bool = False) -> Path:
        """The Python of an environment that holds these packages; made once.

        It sees our torch and torchvision through a path line, so that every side runs on one
        build; its own packages come first.

        Args:
            packages: requirements, such as "torchdistill==1.1.5".
            alone: without our packages behind its own.
        """
        key = hashlib.sha256(json.dumps([*packages, alone, sys.version]).encode()).hexdigest()[:8]
        name = re.sub(r"[^a-z0-9]+", "-", packages[0].lower()) if packages else "plain"
        home = self.folder / f"{name}-{key}"
        python = home / "bin" / "python"
        if (home / "made").exists():
            return python
        print(f"making the environment of {', '.join(packages)} ...", file=sys.stderr, flush=True)
        _said([self.python, "-m", "venv", "--clear", home])
        if not alone:
            lines = Path(sysconfig.get_paths()["purelib"])
            own = next((home / "lib").glob("python*/site-packages"))
            (own / "shared_torch.pth").write_text(f"{lines}\n", encoding="utf-8")
        _said([python, "-m", "pip", "install", "--quiet", *packages])
        (home / "made").write_text(" ".join(packages), encoding="utf-8")
        return python

    def versions(self, python: Path, *names: str) -> dict[str, str]:
        """Versions of packages in an environment."""
        code = (
            "import json, sys; from importlib.metadata import version; "
            "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
        )
        found: dict[str, str] = json.loads(_said([python, "-c", code, *names]).splitlines()[-1])
        return found

    def side(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        threads: int | None = None,
        limit: float = LIMIT,
    ) -> dict[str, Any]:
        """One fresh process; its last line of output is a JSON object.

        Raises:
            SideFailed: it ended with an error or said no JSON object.
        """
        began = time.perf_counter()
        said = _said(command, {**self.variables(threads), **(env or {})}, limit)
        wall = time.perf_counter() - began
        try:
            found = json.loads(said.strip().splitlines()[-1])
        except (IndexError, ValueError) as error:
            raise SideFailed(f"{_shown(command)} said no JSON object: {said[-300:]!r}") from error
        return {"wall": wall, **found}

    def variables(self, threads: int | None = None) -> dict[str, str]:
        """The environment variables of every side: fixed threads, no network, no telemetry."""
        count = str(threads or self.threads)
        return {
            **os.environ,
            # What is measured is the tree that this file lies in, whatever is installed.
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "WANDB_DISABLED": "true",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        }

    def interleaved(
        self,
        sides: Mapping[str, Sequence[str | Path]],
        rounds: int = 5,
        *,
        env: Mapping[str, str] | None = None,
        threads: int | None = None,
        warm: bool = True,
    ) -> dict[str, list[dict[str, Any]]]:
        """Sides in turn, `rounds` times; a first round is thrown away when `warm`.

        Returns:
            Side to what it said, round by round; "wall" is added.
        """
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(self.rounds(rounds) + int(warm)):
            for name, command in sides.items():
                said = self.side(command, env=env, threads=threads)
                if number or not warm:
                    found[name].append(said)
        return found


def _said(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    limit: float = LIMIT,
) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=limit, check=False
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise SideFailed(f"{_shown(words)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(Path(str(w)).name if "/" in str(w) else str(w) for w in command[:4])
