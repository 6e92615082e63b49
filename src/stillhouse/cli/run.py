"""`stillhouse run`: from a recipe to an artifact and a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.cli.printing import print_fields, print_json, process

if TYPE_CHECKING:
    from stillhouse.launch import RunResult
    from stillhouse.recipe import Recipe

Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", "--set", metavar="A.B=VALUE", help="Set a field of the recipe."),
]


def complete_recipe(incomplete: str) -> list[str]:
    """Ids of recipes and files that begin so, for the shell."""
    from stillhouse.recipe import recipe_ids

    files = [str(path) for path in Path().glob(f"{incomplete}*") if path.suffix == ".yaml"]
    return [name for name in recipe_ids() if name.startswith(incomplete)] + files


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or the id of a method.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved plan, and do nothing.")
    ] = False,
    redo: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Run this stage and all after it again."),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds the run shows.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu, cuda, mps ...")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on each machine.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    strategy: Annotated[str | None, typer.Option(help="auto, flat, ddp or fsdp.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed ...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where a step's time goes, and what to do.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run a recipe to its end; run it again to go on where it was stopped."""
    from stillhouse.recipe import load_recipe

    chosen = {
        "seed": seed,
        "seeds": seeds,
        "hardware.accelerator": accelerator,
        "hardware.devices": devices,
        "hardware.nodes": nodes,
        "hardware.strategy": strategy,
        "hardware.precision": precision,
        "hardware.threads": threads,
    }
    options = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    resolved = load_recipe(recipe, [*(overrides or ()), *options])
    if dry_run:
        _show_plan(resolved, as_json)
        return
    from stillhouse import launch

    result = launch.run(resolved, redo=redo, folder=folder, progress=not as_json, profiled=profile)
    # Under torchrun, or when Fabric has started further processes, one of them speaks.
    if process() == 0:
        _show_result(result, as_json)
        if profile and not as_json:
            _show_profile(result)


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    from stillhouse import planning
    from stillhouse.recipe import dump_recipe

    plan = planning.plan(recipe)
    if as_json:
        print_json({"plan": plan, "recipe": recipe.model_dump(mode="json")})
        return
    stages = " -> ".join(f"{s['name']} ({s['kind']})" for s in plan.get("stages", ()))
    print_fields({**plan, "stages": stages})
    typer.echo("\n# the recipe with every default\n" + dump_recipe(recipe).rstrip())


def _show_result(result: RunResult, as_json: bool) -> None:
    if as_json:
        shown: dict[str, Any] = {"folder": str(result.folder), **result.summary}
        print_json(shown)
        return
    result.report()
    typer.echo(f"artifact: {result.folder / 'artifact'}")


def _show_profile(result: RunResult) -> None:
    """Where the steps' time went, stage by stage."""
    found = result.summary["profile"]
    if not found:
        typer.echo(
            "\nnothing was profiled: every training of this run had finished before; "
            "run it with --redo STAGE or in another --folder"
        )
    for stage in found:
        typer.echo(
            f"\na step of '{stage['stage']}' took {stage['step_ms']:.2f} ms "
            f"(mean of {stage['steps']:,} measured steps)"
        )
        for phase, spent in stage["ms"].items():
            if spent > 0:
                typer.echo(f"  {phase:16} {spent:9.3f} ms  {spent / stage['step_ms']:6.1%}")
        for sentence in stage["advice"]:
            typer.echo(f"  - {sentence}")
