"""`stillhouse methods show ID`: the card, the settings, the claims and what was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from stillhouse import catalogue
from stillhouse.cli.printing import print_fields, print_json


def show_entry(entry: catalogue.Entry, as_json: bool) -> None:
    """Print all about one entry, for people or for programs."""
    results = recorded(entry)
    if as_json:
        print_json({**asdict(entry), "results": results})
        return
    _show_card(entry)
    _show_settings(entry)
    if entry.variants:
        _heading("Variants (-o variant=NAME)")
        for variant, said in entry.variants.items():
            changes = {
                **said.get("set", {}),
                **{f"budget.{k}": v for k, v in said.get("budget", {}).items()},
            }
            listed = ", ".join(f"{k}: {v}" for k, v in changes.items())
            _paragraph(f"{variant}: {said.get('about', '')} ({listed})")
    _show_claims(entry, results)
    _show_results(results)


def _heading(text: str) -> None:
    typer.echo(f"\n{typer.style(text, bold=True)}")


def _paragraph(text: str, indent: str = "  ") -> None:
    typer.echo(textwrap.fill(text, 98, initial_indent=indent, subsequent_indent=indent + "  "))


def _show_card(entry: catalogue.Entry) -> None:
    card = entry.card
    typer.echo(typer.style(f"{entry.id}: {card['title']}", bold=True))
    _paragraph(str(card["summary"]), "")
    stages = " -> ".join(f"{name} ({kind})" for name, kind in card.get("stages", ()))
    typer.echo("")
    print_fields(
        {
            "kind": entry.kind,
            "room": card.get("room"),
            "paper": card.get("paper"),
            "year": str(card.get("year") or ""),
            "authors": card.get("authors"),
            "links": card.get("links"),
            "task": card.get("task", "classification"),
            "needs of the teacher": " ".join(card.get("needs", ())) or "nothing",
            "yields": card.get("yields", "model"),
            "stages": stages,
            "reconstructed": "yes: parts are inferred, as its docstring says"
            if card.get("reconstructed")
            else "",
            "file": entry.path,
        },
        "  ",
    )
    if entry.about:
        typer.echo("\n" + textwrap.indent(entry.about.strip(), "  "))


def _show_settings(entry: catalogue.Entry) -> None:
    _heading("Settings (-o settings.NAME=VALUE)")
    if not entry.config:
        typer.echo("  none")
    for setting in entry.config:
        default = "required" if setting.get("required") else json.dumps(setting.get("default"))
        bounds = f", {setting['range']}" if "range" in setting else ""
        typer.echo(f"  {setting['name']}: {setting['type']} = {default}{bounds}")
        if setting.get("help"):
            _paragraph(setting["help"], "      ")
        if setting.get("source"):
            _paragraph(f"source: {setting['source']}", "      ")


def _show_claims(entry: catalogue.Entry, results: Mapping[str, Any] | None) -> None:
    if not entry.claims:
        return
    _heading("Claims")
    verdicts = {c.get("text"): c for c in (results or {}).get("claims", ())}
    for claim in entry.claims:
        found = verdicts.get(claim["text"], {})
        verdict = found.get("verdict", "not benched yet")
        _paragraph(f"{verdict}: {claim['text']} ({claim['metric']})")


def _show_results(results: Mapping[str, Any] | None) -> None:
    _heading("Results")
    if results is None:
        typer.echo("  none recorded; measure them with: stillhouse bench ID")
        return
    if results["stale"]:
        typer.echo("  stale: the method's file has changed since these were measured")
    for side, figures in results["means"].items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        _paragraph(f"{side}: {shown}")
    print_fields(
        {
            "seeds": [str(seed) for seed in results.get("seeds", ())],
            "data": [d.get("edition") or d.get("name") for d in results.get("data", ())],
            "command": results.get("command"),
            "hardware": results.get("hardware"),
            "date": results.get("date"),
            "note": results.get("note"),
        },
        "  ",
    )


def recorded(entry: catalogue.Entry) -> dict[str, Any] | None:
    """The recorded results of an entry with the means of each side, or None."""
    for folder in results_folders():
        path = folder / f"{entry.id}.json"
        if path.is_file():
            from stillhouse.bench.results import file_hash

            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["stale"] = found.get("file_hash") != file_hash(entry.file)
            found["means"] = {
                side: _means(runs) for side, runs in dict(found.get("sides", {})).items()
            }
            return found
    return None


def results_folders() -> list[Path]:
    """Folders that hold recorded results: the checkout's, else the installed package's."""
    root = catalogue.PACKAGE.parents[1]
    own = [root / "results"] if (root / "pyproject.toml").is_file() else []
    return [f for f in [*own, catalogue.PACKAGE / "_shipped" / "results"] if f.is_dir()]


def _means(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean over seeds of each figure that every seed has."""
    lists = [
        {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
        for figures in runs.values()
    ]
    if not lists:
        return {}
    names = [name for name in lists[0] if all(name in figures for figures in lists)]
    return {name: sum(figures[name] for figures in lists) / len(lists) for name in names}
