"""E12: labelling by a model behind HTTP."""

from __future__ import annotations

from contest import HOME, Bench, Row, ratios

ROW = "E12"
ABOUT = """Labelling by a model behind HTTP
2,000 records, 32 requests in flight, against a local stub with 50 ms latency and 2 % failures
(answers of 4 kB; a process of its own). Ours journals every answer before it counts; the bare
client is 32 aiohttp workers that append to a file and ask again at once; distilabel runs its
OpenAI client in batches of 32, its start-up included in neither rate."""
IDEAL = 32 / 0.05


def measure(bench: Bench) -> Row:
    """Records per second, memory, and what a kill at half costs."""
    peer = bench.environment("distilabel==1.5.3", "requests", "openai", "aiohttp")
    sides = {
        "bare": [bench.python, HOME / "sides" / "e12_bare.py"],
        "ours": [bench.python, HOME / "sides" / "e12_ours.py"],
    }
    found = bench.interleaved(sides, 4, warm=False)
    beside = bench.interleaved(
        {"ours": sides["ours"], "distilabel": [peer, HOME / "sides" / "e12_distilabel.py"]},
        1,
        warm=False,
    )
    row = Row({})
    row.add("records a second / bare client", ratios(found, "ours", "bare", "rate"), ">= 0.95")
    row.add("records a second / distilabel", ratios(beside, "ours", "distilabel", "rate"), "> 1")
    row.add("records a second / ideal", [r["rate"] / IDEAL for r in found["ours"]])
    row.add("bare client / ideal", [r["rate"] / IDEAL for r in found["bare"]])
    ours = found["ours"]
    row.add("MiB of growth while 8 MB of answers came", [r["growth"] for r in ours], "<= 4")
    row.add("answers lost", [2000 - r["kept"] for r in ours], "== 0")
    row.add("after a kill at half: lost", [2000 - r["kept_after"] for r in ours], "== 0")
    twice = [float(r["answered_twice"]) for r in ours]
    row.add("after a kill at half: answered twice", twice, "<= 32")
    row.notes.append(
        "Answered twice are only requests that were in flight at the kill, at most 32; an answer "
        "that had reached the process is in its journal and is not asked for again."
    )
    row.versions = {
        **bench.versions(bench.python, "aiohttp"),
        **bench.versions(peer, "distilabel", "openai"),
    }
    return row
