"""E9: answering for nodes by an MLP, by the GCN it learned from, and by PyG's GCN."""

from __future__ import annotations

import os

from contest import HOME, ROOT, Bench, Row

ROW = "E9"
ABOUT = """Answering for nodes: the MLP, its GCN teacher, PyG's GCN
Networks of two layers of 256 on Cora, Citeseer and a random graph of 50,000 nodes (degree 10, 128
features), all three in one process that gives them turns; PyG's GCN has our GCN's weights and gives
its answers. For the whole graph each runs once over all nodes, edges normalised beforehand. A
request names nodes: the networks that pass messages fetch the two-hop neighbourhood (PyG:
`k_hop_subgraph`; `NeighborLoader` needs a compiled package), the MLP gathers rows of features.
Ratios are medians over calls of the other's time over the MLP's, and over three processes. The
words of the citation graphs are sparse: ours multiply them as such, PyG reads them dense."""
CASES = ("cora", "citeseer", "50000")


def measure(bench: Bench) -> Row:
    """Three processes of each graph, in turns."""
    data = os.environ.get("STILLHOUSE_DATA", str(ROOT.parent / "shared" / "data"))
    sides = {c: [bench.python, HOME / "sides" / "e9_serving.py", c] for c in CASES}
    found = bench.interleaved(sides, 3, env={"STILLHOUSE_DATA": data}, warm=False)
    row, table = Row({}), []
    for case, rounds in found.items():
        name = case if not case.isdigit() else f"{int(case):,} nodes"
        for kind in rounds[0]["times"]:
            for other, title in (("gcn", "its GCN"), ("pyg", "PyG's GCN")):
                own = [r["times"][kind][other]["ratio"] for r in rounds]
                target = "> 1" if kind != "graph" else None
                row.add(f"{name}, {kind}: {title} / MLP", own, target)
            for side in rounds[0]["times"][kind]:
                times = [r["times"][kind][side] for r in rounds]
                middle = sorted(times, key=lambda t: t["p50"])[len(times) // 2]
                table.append(
                    {
                        "graph": name,
                        "answers for": kind,
                        "by": {"gcn": "GCN", "pyg": "PyG's GCN"}.get(side, side.upper()),
                        "ms, median": round(middle["p50"], 3),
                        "ms, p95": round(middle["p95"], 3),
                        "over the MLP": round(middle["ratio"], 2),
                    }
                )
    row.figures["serving"] = table
    row.notes.append(
        "What a request saves grows with the neighbourhood, so with the degree and the depth; "
        "what the whole graph saves is the passing of messages alone."
    )
    row.versions = bench.versions(bench.python, "torch_geometric")
    return row
