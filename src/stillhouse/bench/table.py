"""`docs/results.md`: every recorded claim and its verdict, made from `results/*.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.bench import results as recorded
from stillhouse.bench.results import Results, number_of
from stillhouse.bench.show import difference, sense
from stillhouse.report.figures import number, with_interval

HEAD = """# Measured results

Made by `python -m stillhouse.bench.table` from `results/*.json`; do not edit. Each verdict
follows from paired differences over seeds and their 95% t interval: *supported* when the
interval lies wholly beyond the claim's margin in its favour, *not supported* when it lies
wholly at or beyond it against, else *inconclusive*; *not measured* when one of its sides was left
out. Sides share data, splits, models, initial weights, batches and steps. *Stale* means that the
method's file has changed since. A further case of a method is named by its folder:
`ffg2m: citeseer` is `results/citeseer/ffg2m.json`.
"""

NOT_MEASURED = "not measured"
VERDICTS = ("supported", "not supported", "inconclusive", NOT_MEASURED)


def read_all(folder: Path | str) -> dict[str, Results]:
    """All results in a folder by their titles, those of one method behind each other.

    `<id>.json` has the method's name as its title. A folder inside holds a further case and names
    it: `citeseer/ffg2m.json` is "ffg2m: citeseer", which tells other data, models or budgets apart
    alike.

    Raises:
        CheckpointError: one of them is damaged.
    """
    home = Path(folder)
    found = {}
    for path in sorted(home.rglob("*.json"), key=lambda path: (path.stem, path.parent)):
        case = "/".join(path.relative_to(home).parts[:-1])
        results = recorded.read(path)
        found[f"{results.method}: {case}" if case else results.method] = results
    return found


def markdown(found: Mapping[str, Results], hashes: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        found: results by title, see `read_all`.
        hashes: file hash of each method as it is now; a method that is not in it is not
            called stale. None: as the catalogue has them.
    """
    if hashes is None:
        from stillhouse import catalogue

        hashes = {
            name: recorded.file_hash(entry.file) for name, entry in catalogue.entries().items()
        }
    parts = [HEAD, _overview(found, hashes)]
    for title, results in found.items():
        parts.append(_section(results, title, _is_stale(results, hashes)))
    return "\n".join(part for part in parts if part)


def write(folder: Path | str = "results", out: Path | str = "docs/results.md") -> Path:
    """Write the page made of all results in `folder`.

    Raises:
        CheckpointError: results that are damaged, or a disk that refuses.
    """
    from stillhouse.engine.checkpoint import write_atomic

    place = Path(out)
    write_atomic(place, markdown(read_all(folder)).encode())
    return place


def _is_stale(results: Results, hashes: Mapping[str, str]) -> bool:
    return hashes.get(results.method, results.file_hash) != results.file_hash


def _overview(found: Mapping[str, Results], hashes: Mapping[str, str]) -> str:
    if not found:
        return "No results are recorded yet.\n"
    lines = [
        f"| method | {' | '.join(VERDICTS)} | measured |",
        f"|---|{'--:|' * len(VERDICTS)}---|",
    ]
    for title, results in found.items():
        told = [_verdict(results, claim) for claim in results.claims]
        counts = [told.count(verdict) for verdict in VERDICTS]
        mark = " (stale)" if _is_stale(results, hashes) else ""
        cells = [_cell(title), *map(str, counts), _cell(results.date[:10] + mark)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(results: Results, claim: Mapping[str, Any]) -> str:
    """Of a claim; a side that was not run says nothing, not even that it is inconclusive."""
    sides = [side for side in (claim["ours"], claim["than"]) if number_of(side) is None]
    return str(claim["verdict"]) if all(s in results.sides for s in sides) else NOT_MEASURED


def _section(results: Results, title: str, stale: bool) -> str:
    lines = [f"## {_cell(title)}{' (stale)' if stale else ''}", ""]
    data = ", ".join(
        dict.fromkeys(str(d.get("edition") or d.get("name") or "") for d in results.data)
    )
    about = [f"Seeds {results.seeds}", data, results.hardware, results.date[:10]]
    lines += ["; ".join(_cell(a) for a in about if a) + ".", ""]
    if results.claims:
        lines += ["| claim | verdict | difference [95%] | compared |", "|---|---|---|---|"]
    for claim in results.claims:
        reason = f" ({claim['reason']})" if claim.get("reason") else ""
        verdict = f"**{_verdict(results, claim)}**{reason}"
        told = (claim["text"], verdict, difference(claim), sense(claim))
        lines.append(f"| {' | '.join(_cell(str(c)) for c in told)} |")
    metrics = results.metrics()[:5]
    lines += ["", f"| side | {' | '.join(map(_cell, metrics))} | seconds |"]
    lines.append(f"|---|{'--:|' * (len(metrics) + 1)}")
    for side in results.sides:
        cells = [with_interval(results.summary(side, metric)) for metric in metrics]
        seconds = number(results.summary(side, "seconds").mean)
        lines.append(f"| {' | '.join(map(_cell, (side, *cells, seconds)))} |")
    if results.note:
        lines += ["", _cell(results.note)]
    if results.command:
        command = " ".join(results.command.split()).replace("`", "'")
        lines += ["", f"    {command}"]
    return "\n".join(lines) + "\n"


_MARKUP = re.compile(r"([\\`|<>\[\]_])")


def _cell(text: str) -> str:
    """Text that cannot break a table or become markup; bold that we set ourselves stays."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    print(write())
