"""Run the experiments: `python benchmarks/run.py [E1 E2 ...]`; all of them by default.

Each writes its row into results.json as soon as it is done, and docs/performance.md is made anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME))

from contest import ROOT, Bench, Row  # noqa: E402 - found beside this file
from performance_page import write_page  # noqa: E402

RESULTS = HOME / "results.json"


def experiments() -> dict[str, ModuleType]:
    """Row name to the module of each file `e*.py`, in order of their names."""
    found: dict[str, ModuleType] = {}
    for path in sorted(HOME.glob("e*_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[module.ROW] = module
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(row: str) -> tuple[int, str]:
    digits = "".join(c for c in row if c.isdigit())
    return int(digits or 0), row


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def record(row: Row, name: str, *, quick: bool, seconds: float, threads: int) -> dict[str, Any]:
    """A row as it stands in results.json."""
    packages = ("stillhouse", "torch", "numpy")
    ours = {p: version(p) for p in packages}
    command = f"python benchmarks/run.py {name}" + (" --quick" if quick else "")
    return {
        "ratios": row.ratios,
        "targets": row.targets,
        "met": row.met,
        "command": command,
        "versions": {"python": platform.python_version(), **ours, **row.versions},
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "spread": row.spread,
        "notes": row.notes,
        "figures": row.figures,
        "hardware": f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}",
        "seconds": round(seconds),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for. Returns 1 when a side failed, 0 otherwise, met or not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="names of rows, such as E1; all by default")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--table", action="store_true", help="only write docs/performance.md anew")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to try a row out")
    parser.add_argument("--threads", type=int, default=1, help="of every side")
    asked = parser.parse_args(arguments)
    known = experiments()
    if asked.list:
        for name, module in known.items():
            print(f"{name:5} {module.ABOUT.splitlines()[0]}")
        return 0
    unknown = [row for row in asked.rows if row not in known]
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}; known: {', '.join(known)}")
    failed = 0
    for name in [] if asked.table else asked.rows or list(known):
        bench = Bench(quick=asked.quick, threads=asked.threads)
        began = time.perf_counter()
        try:
            row = known[name].measure(bench)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = 1
            continue
        results = _results()  # read again: another row may have been written meanwhile
        results[name] = record(
            row,
            name,
            quick=asked.quick,
            seconds=time.perf_counter() - began,
            threads=asked.threads,
        )
        results = dict(sorted(results.items(), key=lambda item: _order(item[0])))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        verdict = "met" if row.met else "missed"
        print(f"{name}: {verdict}; " + ", ".join(f"{k} {v:g}" for k, v in row.ratios.items()))
    write_page(ROOT / "docs" / "performance.md", _results(), known)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
