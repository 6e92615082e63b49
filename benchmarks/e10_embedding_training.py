"""E10: training on a teacher's vectors."""

from __future__ import annotations

import os
import statistics

from contest import HOME, ROOT, Bench, Row, ratios

ROW = "E10"
ABOUT = """Training a small encoder on a teacher's vectors
A BERT of two layers, 128 wide, with a linear layer to 384 and unit length, from the same random
weights, on 3,072 sentences of STS-B and the stored vectors of all-MiniLM-L6-v2: batch 64, AdamW
at a constant 1e-3, the l2 distance, 6 epochs, judged on the test pairs of STS-B. Ours is
`distill` with log, checkpoints and NaN guard; theirs `EmbedDistillLoss` with its Trainer, a log
every 50 steps and nothing saved. As their users run it they tokenise in every epoch; ours does in
the first and remembers. "tokenised before" has both without: theirs from a table, ours the epochs
after the first."""


def measure(bench: Bench) -> Row:
    """Interleaved; the vectors of E5, made when they are not there."""
    root = os.environ.get("STILLHOUSE_DATA", str(ROOT.parent / "shared/data"))
    env = {"STILLHOUSE_DATA": root}
    peer = bench.environment("sentence-transformers==6.2.0", "accelerate", "datasets")
    sides, home = HOME / "sides", bench.folder / "e5"
    if not (home / "ours" / "train" / "int8" / "header.json").exists():
        bench.side([bench.python, sides / "e5_ours.py", home / "ours"], env=env)
    if not (home / "peer" / "train").exists():
        bench.side([peer, sides / "e5_peer.py", home / "peer"], env=env)
    stores = {
        name: [bench.python, sides / "e10_ours.py", home / "ours", dtype]
        for name, dtype in (("ours", "float16"), ("int8", "int8"))
    }
    theirs = [peer, sides / "e10_peer.py", home / "peer"]
    found = bench.interleaved(
        {"ours": stores["ours"], "peer": theirs, "tokenised": [*theirs, "tokenised"]},
        2,
        env=env,
        warm=False,
    )
    beside = bench.side(stores["int8"], env=env)["spearman"]
    row = Row({})
    row.add("6 epochs, tokenising", ratios(found, "ours", "peer", "whole"), "< 1")
    row.add("an epoch, tokenised before", ratios(found, "ours", "tokenised", "epoch"), "< 1")
    ours = statistics.median(r["spearman"] for r in found["ours"])
    lost = statistics.median(r["spearman"] for r in found["peer"]) - ours
    row.add("Spearman lost to theirs", [lost], "<= 0.01")
    row.add("Spearman, int8 store off float16", [abs(beside - ours)], "<= 0.005")
    row.figures["after 6 epochs"] = [
        {
            "side": name,
            "Spearman, STS-B test": round(statistics.median(r["spearman"] for r in rounds), 4),
            "epoch / ours": round(
                statistics.median(r["epoch"] for r in rounds)
                / statistics.median(r["epoch"] for r in found["ours"]),
                3,
            ),
        }
        for name, rounds in found.items()
    ]
    row.notes.append(
        "The floor of both is the encoder's forward and backward, the same operations in the same "
        "torch; what differs is collation, the reading of vectors, the optimiser and the log."
    )
    row.versions = bench.versions(peer, "sentence-transformers", "datasets", "transformers")
    return row
