"""`docs/results.md`: every recorded claim and its verdict, made from `results/*.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse.bench import results as recorded
from stillhouse.bench.results import Results
from stillhouse.bench.show import difference, sense
from stillhouse.report.figures import number, with_interval

HEAD = """# Measured results

Made by `python -m stillhouse.bench.table` from `results/*.json`; do not edit. Each verdict
follows from paired differences over seeds and their 95% t interval: *supported* when the
interval lies wholly beyond the claim's margin in its favour, *not supported* when it lies
wholly at or beyond it against, else *inconclusive*. Sides share data, splits, models, initial
weights, batches and steps. *Stale* means that the method's file has changed since.
"""


def read_all(folder: Path | str) -> list[Results]:
    """All results in a folder, by method; those of folders inside it are further cases.

    Raises:
        CheckpointError: one of them is damaged.
    """
    paths = sorted(
        Path(folder).rglob("*.json"), key=lambda path: (path.name, len(path.parts), str(path))
    )
    return [recorded.read(path) for path in paths]


def markdown(found: Sequence[Results], hashes: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        found: results, those of one method behind each other.
        hashes: file hash of each method as it is now; a method that is not in it is not
            called stale. None: as the catalogue has them.
    """
    if hashes is None:
        from stillhouse import catalogue

        hashes = {
            name: recorded.file_hash(entry.file) for name, entry in catalogue.entries().items()
        }
    parts = [HEAD, _overview(found, hashes)]
    for results, title in zip(found, _titles(found), strict=True):
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


def _titles(found: Sequence[Results]) -> list[str]:
    """The method of each; a further case of it is told by its data, or else by its recipe."""
    titles: list[str] = []
    seen: dict[str, set[str]] = {}
    for results in found:
        method = results.method
        data = " and ".join(dict.fromkeys(str(d.get("name") or "") for d in results.data))
        before = seen.setdefault(method, set())
        title, recipe = method, _recipe_of(results)
        if method in titles:
            title = f"{method}: {recipe}" if data in before and recipe else f"{method} on {data}"
        before.add(data)
        titles.append(title)
    return titles


def _recipe_of(results: Results) -> str:
    """The name of the recipe in a command, without the method's; "" for the method's own."""
    named = re.search(r"--recipe (\S+)", results.command)
    return Path(named[1]).stem.removeprefix(f"{results.method}-") if named else ""


def _is_stale(results: Results, hashes: Mapping[str, str]) -> bool:
    return hashes.get(results.method, results.file_hash) != results.file_hash


def _overview(found: Sequence[Results], hashes: Mapping[str, str]) -> str:
    if not found:
        return "No results are recorded yet.\n"
    lines = [
        "| method | supported | not supported | inconclusive | measured |",
        "|---|--:|--:|--:|---|",
    ]
    for results, title in zip(found, _titles(found), strict=True):
        counts = [
            sum(claim["verdict"] == verdict for claim in results.claims)
            for verdict in ("supported", "not supported", "inconclusive")
        ]
        mark = " (stale)" if _is_stale(results, hashes) else ""
        cells = [_cell(title), *map(str, counts), _cell(results.date[:10] + mark)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        told = (claim["text"], f"**{claim['verdict']}**{reason}", difference(claim), sense(claim))
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
