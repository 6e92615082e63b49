"""A bench on the terminal: figures of each side with intervals, claims with verdicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stillhouse.bench.results import Results
from stillhouse.report.figures import number, with_interval

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {"supported": "green", "not supported": "red", "inconclusive": "yellow"}


def difference(claim: dict[str, Any]) -> str:
    """A claim's difference with its interval in brackets."""
    if claim.get("difference") is None:
        return "–"
    text = f"{claim['difference']:+.4g}"
    if claim.get("interval"):
        low, high = claim["interval"]
        text += f" [{low:+.4g}, {high:+.4g}]"
    return text


def sense(claim: dict[str, Any]) -> str:
    """What a claim expects, in words: `metric: ours higher than other by more than 0.01`."""
    margin = float(claim.get("margin") or 0.0)
    ours, than, expect = claim["ours"], claim["than"], claim.get("expect", "higher")
    if claim.get("than_metric"):
        than = f"{claim['than_metric']} of {than}"
    if expect == "equal":
        return f"{claim['metric']}: {ours} within {margin:g} of {than}"
    by = f" by more than {margin:g}" if margin > 0 else ""
    if margin < 0:
        by = f", or short of it by less than {-margin:g}"
    return f"{claim['metric']}: {ours} {expect} than {than}{by}"


def show(results: Results, console: Console | None = None, *, stale: bool = False) -> None:
    """Print results: a table of sides, a table of claims, what a reader must know.

    Args:
        results: finished or not.
        console: where; standard output by default. Without a terminal it is plain text.
        stale: the method's file has changed since.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    # A narrow terminal shows fewer metrics, those of claims first, and no broken figures.
    longest = max((len(side) for side in results.sides), default=0)
    room = (out.width - min(longest, 28) - 24) // 20
    metrics = results.metrics()[: max(1, min(6, room))]
    title = f"{results.method}: mean ± 95% interval over seeds {results.seeds}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column(Text("side"), overflow="fold", min_width=min(longest, 28))
    for heading in (*metrics, "seconds", "seeds"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for side, runs in results.sides.items():
        cells = [with_interval(results.summary(side, metric)) for metric in metrics]
        seconds = number(results.summary(side, "seconds").mean)
        table.add_row(*(Text(c) for c in (side, *cells, seconds, str(len(runs)))))
    out.print(table)
    for claim in results.claims:
        found = str(claim["verdict"])
        line = Text(found, style=_STYLE.get(found, "")).append(f"  {claim['text']}", style="bold")
        out.print(line)
        told = f"  {sense(claim)}: {difference(claim)} over {claim.get('seeds', 0)} seeds"
        if claim.get("reason"):
            told += f" ({claim['reason']})"
        out.print(Text(told))
        if claim.get("per_second") is not None:
            out.print(Text(f"  {claim['per_second']:+.3g} {claim['metric']} per extra second"))
    if stale:
        out.print(Text("stale: the method's file has changed since this was measured", "yellow"))
    if results.note:
        out.print(Text(results.note))
