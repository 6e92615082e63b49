"""E6b: how many classes of a language model's answer must be kept."""

from __future__ import annotations

import os

from contest import HOME, ROOT, Bench, Row

ROW = "E6b"
ABOUT = """How many classes to keep of a language model's answer
Cosine between the exact gradient of forward KL and that of stored classes, on real logits:
SmolLM2-135M (49,152 classes) on 192 tokens of GSM8K and of plays, students cut from its own
layers without training ("near": three late layers left out; "far": half of the layers). In the
logits (mean over tokens) and in the head's weight. "tail" keeps the missing mass as one number."""
GOOD = 0.99


def measure(bench: Bench) -> Row:
    """One process; nothing is timed."""
    data = os.environ.get("STILLHOUSE_DATA", str(ROOT.parent / "shared" / "data"))
    models = bench.folder.parent / "models"
    folder = models / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    command = [bench.python, HOME / "sides" / "e6b_cosines.py", folder]
    said = bench.side(command, env={"STILLHOUSE_DATA": data})
    rows, default = said["rows"], said["default"]
    row = Row({})
    at = [r for r in rows if r["k"] == default]
    worst = min(r["topk_head"] for r in at)
    row.add(f"tail, k = {default}: head's gradient, worst case", [worst], f">= {GOOD}")
    row.add(f"tail, k = {default}: logits' gradient", [r["topk"] for r in at])
    row.add(f"truncated, k = {default}: head's gradient", [r["truncate_head"] for r in at])
    row.add(f"sampled, k = {default}: head's gradient", [r["sample_head"] for r in at])
    row.figures["cosine with the exact gradient (logits / head)"] = [
        {
            "text": r["text"],
            "student": r["student"],
            "k": r["k"],
            "bytes": r["bytes"],
            **{
                name: f"{r[form]:.3f} / {r[form + '_head']:.3f}"
                for form, name in (
                    ("topk", "tail"),
                    ("truncate", "truncated"),
                    ("sample", "sampled"),
                )
            },
        }
        for r in rows
    ]
    row.notes.append(
        f"The default is the least k whose gradient of the head, which is what moves, comes to "
        f"{GOOD} on both texts with both students. The criterion was set after a first look at the "
        "table; token by token the direction is worse, and 64 classes bring it to that."
    )
    row.figures["mean probability of the 16 likeliest classes"] = {
        r["text"]: round(r["mass16"], 3) for r in rows
    }
    row.versions = bench.versions(bench.python, "transformers")
    return row
