"""E5: a teacher's vectors on disk."""

from __future__ import annotations

import os

from contest import HOME, ROOT, Bench, Row

ROW = "E5"
ABOUT = """A teacher's vectors on disk
all-MiniLM-L6-v2 (384 numbers) on 3,072 sentences of STS-B: our store in float32, float16 and int8
beside the Arrow file that `dataset.map(teacher.encode)` of sentence-transformers leaves, the
column of vectors alone (float32, as `encode` returns them). Whole files, headers included. Each
store's vectors are judged on the test pairs of STS-B. Reading is of batches of 64 in random order
into a tensor."""


def data() -> dict[str, str]:
    """Where STS-B lies."""
    return {"STILLHOUSE_DATA": os.environ.get("STILLHOUSE_DATA", str(ROOT.parent / "shared/data"))}


def measure(bench: Bench) -> Row:
    """One capture on each side; bytes do not vary."""
    peer = bench.environment("sentence-transformers==6.2.0", "accelerate", "datasets")
    home = bench.folder / "e5"
    ours = bench.side([bench.python, HOME / "sides" / "e5_ours.py", home / "ours"], env=data())
    theirs = bench.side([peer, HOME / "sides" / "e5_peer.py", home / "peer"], env=data())
    row = Row({})
    row.add("float16 store / Arrow bytes", [ours["float16 bytes"] / theirs["bytes"]], "<= 0.51")
    row.add("int8 store / Arrow bytes", [ours["int8 bytes"] / theirs["bytes"]], "<= 0.27")
    for dtype in ("float16", "int8"):
        off = abs(ours[f"{dtype} spearman"] - ours["float32 spearman"])
        row.add(f"{dtype}: Spearman's distance from float32", [off], "<= 0.005")
    gap = abs(ours["float32 spearman"] - theirs["spearman"])
    row.add("both teachers: Spearman's distance", [gap], "<= 0.001")
    row.add("reading / reading Arrow", [ours["float16 read"] / theirs["read"]], "< 1")
    row.add("capture / map and save", [ours["capture"] / theirs["capture"]])
    row.figures["on disk"] = [
        {
            "form": dtype,
            "bytes per vector": round(ours[f"{dtype} bytes"], 1),
            "Spearman, STS-B test": round(ours[f"{dtype} spearman"], 5),
            "reading / Arrow": round(ours[f"{dtype} read"] / theirs["read"], 3),
        }
        for dtype in ("float32", "float16", "int8")
    ] + [
        {
            "form": "Arrow float32",
            "bytes per vector": round(theirs["bytes"], 1),
            "Spearman, STS-B test": round(theirs["spearman"], 5),
            "reading / Arrow": 1,
        }
    ]
    row.notes.append(
        "Floor: 384 vectors of int8 are 384 bytes, with scale and zero point 388, of float16 768; "
        "what is above is the header, the bitmap of finished records and the file of ids."
    )
    row.versions = bench.versions(peer, "sentence-transformers", "datasets", "transformers")
    return row
