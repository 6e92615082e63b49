"""The server app: a federated recipe run as anywhere else, its exchanges carried by Flower."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import ServerApp

from stillhouse.engine.job import Job
from stillhouse.errors import RecipeError
from stillhouse.federated.settings import Settings, told_recipe
from stillhouse.launch import RunResult, run
from stillhouse.recipe_models import Given, open_method
from stillhouse.stages.federation import FederatedMethod
from stillhouse.stages.flower import FlowerTransport


def main(grid: Any, context: Any) -> None:
    """What Flower calls."""
    result = serve(grid, Settings.of(context.run_config, {}))
    print(f"finished: {result.folder}", flush=True)


def serve(grid: Any, settings: Settings) -> RunResult:
    """Run the recipe of a Flower run to its end, or go on where it was stopped.

    Args:
        grid: of the server app.
        settings: of the run.

    Raises:
        RecipeError: the recipe's method is not federated.
        StillhouseError: what a run, or one of its clients, cannot go on with.
    """
    recipe = settings.opened()
    method = open_method(recipe)
    if not isinstance(method, FederatedMethod):
        raise RecipeError(f"'{recipe.method}' is not federated: it has no clients")

    def connect(job: Job) -> FlowerTransport:
        return FlowerTransport(
            grid, method.clients(job), recipe=told_recipe(recipe), timeout=settings.timeout
        )

    folder = settings.server_folder(recipe)
    print(f"stillhouse: {recipe.method} in {folder}", flush=True)
    return run(recipe, folder=folder, progress=False, given=Given(connect=connect))


app = ServerApp()
app.main()(main)
