"""E4b: how much of what a store could save it does save."""

from __future__ import annotations

import os

from contest import HOME, ROOT, Bench, Row

ROW = "E4b"
ABOUT = """What a store of the teacher's outputs saves
Ours live beside ours from a store, whole recipes: ResNet-56 teaches ResNet-20 and ResNet-8 on
CIFAR-10 with crop and flip (160 images, batch 32, `draws: 4`), and MobileNetV2 labels images of
224 pixels for a small ConvNet. The ceiling is (t_teacher + t_student) / t_student of the live
training in the same process; the time of a step is the processor time that `run --profile` books,
of the quicker of two trainings of each kind, which take turns. Captured are all draws, once."""
CASES = ("resnet20", "resnet8", "labelling")


def measure(bench: Bench) -> Row:
    """Two rounds of the three cases in turn."""
    data = os.environ.get("STILLHOUSE_DATA", str(ROOT.parent / "shared" / "data"))
    sides = {c: [bench.python, HOME / "sides" / "e4b_run.py", c] for c in CASES}
    found = bench.interleaved(sides, 2, env={"STILLHOUSE_DATA": data}, warm=False)
    row = Row({})
    for case, rounds in found.items():
        row.add(f"{case}: speed-up / ceiling", [r["reached"] for r in rounds], ">= 0.9")
        row.add(f"{case}: speed-up", [r["speedup"] for r in rounds])
    row.figures["cost"] = [
        {
            "case": case,
            "ceiling": round(_median(rounds, "ceiling"), 2),
            "capture, in live epochs": round(_median(rounds, "capture_epochs"), 2),
            "break-even after epochs": round(_median(rounds, "break_even"), 2),
            "live, ms a step": round(_median(rounds, "live_ms"), 2),
            "student, ms a step": round(_median(rounds, "student_ms"), 2),
            "reading, ms a step": round(_median(rounds, "reading_ms"), 3),
            "bytes per sample and draw": round(_median(rounds, "bytes"), 1),
        }
        for case, rounds in found.items()
    ]
    row.notes.append(
        "The ceiling supposes that reading the store costs nothing. What reading takes is in the "
        "table: the floor of a step from the store is the student's own time and that. A ratio "
        "above 1 or further below it than reading explains is the other work of the machine."
    )
    row.versions = bench.versions(bench.python, "torchvision")
    return row


def _median(rounds: list[dict[str, float]], key: str) -> float:
    return sorted(r[key] for r in rounds)[len(rounds) // 2]
