"""E7: what an iteration of data-set distillation costs."""

from __future__ import annotations

from contest import HOME, Bench, Row, ratios

from stillhouse import catalogue

ROW = "E7"
ABOUT = """Data-set distillation: time and memory of an iteration
One iteration over ten classes of generated 32x32 colour images, ConvNet-3 of width 16, 64 real
images per class, in this engine: NCFM (mosaics of four, 512 frequencies, matching and
calibration), NCFM with the released sizes (500 real images per class, all there are, and 4096
frequencies), DataDAM, DM and, for the paper's factors, trajectory matching (DATM, 10 unrolled
steps on all synthetic images, with and without the constant-memory form). Memory is the most that
the iterations add to the resident set, a process of its own for each."""
SIDES = ("ncfm", "ncfm-released", "ncfm-sampler", "dm", "datadam", "datm", "datm-constant-memory")
IPC = (1, 10)


def measure(bench: Bench) -> Row:
    """Every side's iteration beside NCFM's; trajectory matching where it is in the catalogue."""
    known = catalogue.entries()
    sides = [side for side in SIDES if side.partition("-")[0] in known]
    row = Row({})
    row.figures["an iteration"] = []
    for ipc in IPC:
        commands = {s: [bench.python, HOME / "sides" / "e7_side.py", s, str(ipc)] for s in sides}
        found = bench.interleaved(commands, 1, warm=False)
        for side in sides:
            row.figures["an iteration"].append(
                {
                    "side": side,
                    "images per class": ipc,
                    "seconds": round(min(r["s"] for r in found[side]), 3),
                    "MiB": round(min(r["mb"] for r in found[side]), 1),
                }
            )
            if side != "ncfm":
                for key, what in (("s", "time"), ("mb", "memory")):
                    name = f"{ipc} per class: {what} of {side} / ncfm"
                    row.add(name, ratios(found, side, "ncfm", key))
    if "datm" not in known:
        row.notes.append("trajectory matching is not in the catalogue, so it was not measured")
    row.notes.append(
        "The paper's factors (20 in time, 300 in memory) are of networks of width 128 on a GPU, "
        "against trajectory matching unrolled at its published sizes; these are one core's."
    )
    return row
