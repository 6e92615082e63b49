"""E4: the teacher's outputs kept on disk."""

from __future__ import annotations

from contest import HOME, Bench, Row, ratios

ROW = "E4"
ABOUT = """The teacher's outputs on disk
Knowledge distillation of small CNNs on 4,096 images of 100 classes, batch 64, one thread: ours
with `store=` (float16, one record file for all) and torchdistill 1.1.4 with `cache_output` (a
file for each sample). Our writing epoch is the capture and one epoch from the store together."""


def measure(bench: Bench) -> Row:
    """Live, writing and cached epochs of both."""
    peer = bench.environment("torchdistill==1.1.4")
    found = bench.interleaved(
        {
            "ours": [bench.python, HOME / "sides" / "e4_ours.py"],
            "torchdistill": [peer, HOME / "sides" / "e4_torchdistill.py"],
        },
        5,
        warm=False,
    )
    row = Row({})
    ours, theirs = found["ours"], found["torchdistill"]
    row.add("cached epoch", ratios(found, "ours", "torchdistill", "cached"), "<= 0.26")
    row.add("bytes per sample", ratios(found, "ours", "torchdistill", "bytes"), "<= 0.0667")
    row.add("our writing / our live epoch", [r["writing"] / r["live"] for r in ours], "<= 1.1")
    row.add("writing epoch", ratios(found, "ours", "torchdistill", "writing"))
    row.add("live epoch", ratios(found, "ours", "torchdistill", "live"))
    row.add("our cached / our live epoch", [r["cached"] / r["live"] for r in ours])
    row.add("its writing / its live epoch", [r["writing"] / r["live"] for r in theirs])
    row.add("its cached / its live epoch", [r["cached"] / r["live"] for r in theirs])
    row.figures["on disk"] = [
        {"side": name, "bytes per sample": round(r[0]["bytes"]), "files": r[0]["files"]}
        for name, r in found.items()
    ]
    row.versions = bench.versions(peer, "torchdistill")
    return row
