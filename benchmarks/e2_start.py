"""E2: how long the command line takes to answer."""

from __future__ import annotations

from contest import HOME, Bench, Row, ratios

ROW = "E2"
ABOUT = """Start of the command line and of the package
`stillhouse --help` and `stillhouse methods` beside a Typer program of one command that prints
a word (its --help would load Rich and take several times as long), started in turn, warm; the
import of the package beside that of an empty one; the start of TRL's command line and the
import of torchdistill, each in its own environment."""


def measure(bench: Bench) -> Row:
    """Ten warm starts of each."""
    stillhouse = bench.python.parent / "stillhouse"
    starter = [bench.python, "-S", HOME / "sides" / "e2_start_one.py"]
    trl = bench.environment("trl==1.16.0")
    torchdistill = bench.environment("torchdistill==1.1.5")
    quick = {
        "typer": [*starter, bench.python, HOME / "sides" / "e2_typer_program.py", "you"],
        "--help": [*starter, stillhouse, "--help"],
        "methods": [*starter, stillhouse, "methods"],
        "python": [*starter, bench.python, "-c", "pass"],
        "import": [*starter, bench.python, "-c", "import stillhouse"],
    }
    slow = {
        "--help": quick["--help"],
        "trl": [*starter, trl.parent / "trl", "--help"],
        "torchdistill": [*starter, torchdistill, "-c", "import torchdistill.core.distillation"],
    }
    found = bench.interleaved(quick, 10)
    beside = bench.interleaved(slow, 3)
    row = Row({})
    for name in ("--help", "methods"):
        row.add(f"{name} / one-command Typer program", ratios(found, name, "typer", "s"), "<= 1.3")
        row.add(f"{name}, seconds", [one["s"] for one in found[name]], "< 0.4")
    row.add("import stillhouse, seconds", [one["s"] for one in found["import"]], "< 0.3")
    row.add("--help / trl --help", ratios(beside, "--help", "trl", "s"), "< 1")
    row.add("--help / import torchdistill", ratios(beside, "--help", "torchdistill", "s"), "< 1")
    loaded = bench.side([bench.python, HOME / "sides" / "e2_loaded.py"])
    row.add("heavy modules after import stillhouse", [loaded["count"]], "== 0")
    row.figures["median seconds of a bare Python"] = sorted(x["s"] for x in found["python"])[
        len(found["python"]) // 2
    ]
    row.notes.append("The seconds are of this machine and in the table for their target only.")
    row.versions = {
        **bench.versions(bench.python, "typer", "rich"),
        **bench.versions(trl, "trl", "transformers"),
        **bench.versions(torchdistill, "torchdistill"),
    }
    return row
