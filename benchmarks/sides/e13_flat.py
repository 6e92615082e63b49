"""E13, around the run: makes the file of images and, where it may, a memory cgroup of 1.5 GB."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROWS, WIDTH = (int(sys.argv[1]), 1280) if len(sys.argv) > 1 else (524_288, 1280)
LIMIT = 1_500_000_000


def own_group(controller: str) -> str:
    """The cgroup that this process is in: "memory" for version 1, "" for version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.strip("/")
    return ""


def group() -> tuple[Path, str, str] | None:
    """A fresh memory cgroup below our own with the limit: its folder, peak file, process file."""
    places = (
        ("memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        ("", "memory.max", "memory.peak"),
    )
    for part, limit, peak in places:
        home = Path("/sys/fs/cgroup") / part / own_group(part)
        folder = home / f"stillhouse-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / limit).write_text(str(LIMIT))
        except OSError:
            if folder.exists():
                folder.rmdir()
            continue
        return folder, peak, "cgroup.procs"
    return None


home = Path(tempfile.mkdtemp())
made = group()
try:
    images = home / "images.u8"
    block = np.random.default_rng(0).integers(0, 256, (4096, 3, 32, 32), dtype=np.uint8)
    with images.open("wb") as file:
        for start in range(0, ROWS, 4096):
            file.write(memoryview(block[: ROWS - start]))
    command = [sys.executable, str(Path(__file__).with_name("e13_run.py"))]
    command += [str(images), str(home), str(ROWS), str(WIDTH)]

    def enter() -> None:
        """In the child, before it becomes the run."""
        if made is not None:
            (made[0] / made[2]).write_text(str(os.getpid()))

    done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run ended with {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["cgroup"] = made is not None
    if made is not None:
        found["peak_gb"] = int((made[0] / made[1]).read_text()) / 1e9
    print(json.dumps(found))
finally:
    shutil.rmtree(home, ignore_errors=True)
    if made is not None:
        made[0].rmdir()
