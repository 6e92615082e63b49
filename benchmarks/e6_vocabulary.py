"""E6: divergences over large vocabularies."""

from __future__ import annotations

from contest import HOME, Bench, Row, ratios

ROW = "E6"
ABOUT = """Divergences over large vocabularies: memory and time
Loss and gradient of 512 tokens (one in eight masked) of width 512 over 32,000 and 128,256
classes, float32, one thread: ours under `losses.chunked` with 128 tokens at a time, TRL's dense
divergence, the chunked loss of its stable trainer, Liger's chunked loss without compilation.
Memory is the most that one forward and backward adds to the resident set, the gradients of the
heads included; a process of its own for each."""
CLASSES = (32_000, 128_256)
PEERS = {"TRL dense": "e6_trl_dense", "TRL chunked": "e6_trl_chunked", "Liger": "e6_liger"}
FORMS = ("forward", "reverse", "jsd", "total-variation", "skewed_forward", "topk-tail")


def measure(bench: Bench) -> Row:
    """JSD with beta 1/2 against the peers; the other divergences beside it."""
    peer = bench.environment("trl==1.16.0", "liger-kernel==0.8.5")
    row = Row({})
    for classes in CLASSES:
        _against_peers(bench, row, peer, classes)
    _identity(bench, row)
    sides = {f: [bench.python, HOME / "sides" / "e6_ours.py", f, str(CLASSES[0])] for f in FORMS}
    found = bench.interleaved(sides, 1, warm=False)
    row.figures[f"ours, {CLASSES[0]:,} classes"] = [
        {
            "divergence": form,
            "MiB": round(found[form][0]["mb"]),
            "time / JSD": round(found[form][0]["s"] / found["jsd"][0]["s"], 2),
        }
        for form in FORMS
    ]
    row.versions = bench.versions(peer, "trl", "liger-kernel", "transformers")
    return row


def _against_peers(bench: Bench, row: Row, peer: object, classes: int) -> None:
    sides = {"ours": [bench.python, HOME / "sides" / "e6_ours.py", "jsd", str(classes)]}
    for name, file in PEERS.items():
        sides[name] = [peer, HOME / "sides" / f"{file}.py", "jsd", str(classes)]
    found = bench.interleaved(sides, 2 if classes < 100_000 else 1, warm=False)
    for name in PEERS:
        limit = "<= 0.33" if name == "TRL dense" else "<= 1"
        row.add(f"{classes:,}: memory / {name}", ratios(found, "ours", name, "mb"), limit)
        row.add(f"{classes:,}: time / {name}", ratios(found, "ours", name, "s"), "<= 1")
    row.figures.setdefault("JSD(0.5)", []).extend(
        {
            "classes": classes,
            "side": name,
            "MiB": round(min(r["mb"] for r in rounds)),
            "loss": f"{rounds[0]['loss']:.6f}",
        }
        for name, rounds in found.items()
    )


def _identity(bench: Bench, row: Row) -> None:
    """Identical models, and the gradient beside the dense one."""
    said = bench.side([bench.python, HOME / "sides" / "e6_exact.py"])
    row.add("largest loss of identical models", [said["identical"]], "== 0")
    row.add("largest gradient error beside dense", [said["gradient"]], "<= 1e-5")
    row.add("padded vocabulary: largest difference", [said["padded"]], "<= 1e-6")
    row.figures["exactness, by divergence"] = said["rows"]
