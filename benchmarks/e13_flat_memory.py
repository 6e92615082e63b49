"""E13: more data than memory."""

from __future__ import annotations

from contest import HOME, Bench, Row

ROW = "E13"
ABOUT = """More data than memory
A run over 4 GB (1.6 GB of images in a mapped file, 2.7 GB of stored teacher outputs) that may hold
1.5 GB: the capture writes the store, an epoch in random order reads both. In a memory cgroup
where this machine allows one (mapped pages then count too, and are given back under pressure);
the process's own memory is looked at before every batch either way."""


def measure(bench: Bench) -> Row:
    """One run; quick: a tenth of the data."""
    command = [bench.python, HOME / "sides" / "e13_flat.py"]
    said = bench.side([*command, "52428"] if bench.quick else command)
    row = Row({})
    row.add("MiB of growth while capturing", [said["capture_growth"]], "<= 64")
    row.add("MiB of growth while training", [said["train_growth"]], "<= 64")
    row.add("most memory of its own, MiB", [said["most"]], "<= 1430")
    row.add("GB written and read", [said["read_gb"]], ">= 0.4" if bench.quick else ">= 4")
    if said["cgroup"]:
        row.add("cgroup: most bytes charged / limit", [said["peak_gb"] / 1.5], "<= 1")
    else:
        row.notes.append("No memory cgroup could be made here; RssAnon alone was watched.")
    return row
