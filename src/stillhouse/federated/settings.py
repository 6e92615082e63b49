"""What a Flower run and its nodes are told: which recipe, which folders, how long to wait."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.data.roots import cache_folder
from stillhouse.errors import RecipeError, nearest
from stillhouse.recipe import FREE, Recipe, differences, load_recipe

# What may differ between server and client: where data lie, and what is not computed together.
_OWN = (*FREE, "data", "hardware", "compare", "seeds")


@dataclass(frozen=True)
class Settings:
    """The app's run config; a node's own config overrides it on that node.

    Attributes:
        recipe: id of a recipe that comes with Stillhouse, or the absolute path of a file.
        options: changes to it as in `stillhouse run -o`, with semicolons between them.
        folder: of the server's run; resumable.
        memory: where clients keep what they remember; each node's own disk.
        timeout: seconds within which every exchange is answered.
    """

    recipe: str
    options: str = ""
    folder: str = ""
    memory: str = ""
    timeout: float = 3600.0

    @classmethod
    def of(cls, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Settings:
        """The settings of a node in a run.

        Args:
            run_config: of the run; every key must be a setting.
            node_config: of the node; it may hold Flower's own and the client's id beside.

        Raises:
            RecipeError: an unknown key, a value of a wrong type, or no recipe.
        """
        known = dict(cls.__annotations__)
        given = dict(run_config) | {k: v for k, v in node_config.items() if k in known}
        for name, value in given.items():
            if name not in known:
                raise RecipeError(f"run config: no setting '{name}'{nearest(name, known)}")
            kinds: tuple[type, ...] = (int, float) if known[name] == "float" else (str,)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise RecipeError(f"run config: {name} must be a {known[name]}, not {value!r}")
        if not given.get("recipe"):
            raise RecipeError(
                "run config: no recipe; flwr run ... --run-config 'recipe=\"/path/to/it.yaml\"'"
            )
        return cls(**given)

    def opened(self) -> Recipe:
        """The recipe, of this run alone: comparisons and further seeds are left to other runs.

        Raises:
            RecipeError: it cannot be read, or its path depends on where a process was started.
        """
        path = Path(self.recipe).expanduser()
        is_file = path.suffix in {".yaml", ".yml"} or "/" in self.recipe
        if is_file and not path.is_absolute():
            raise RecipeError(
                f"run config: recipe '{self.recipe}' must be an absolute path: the processes of "
                "Flower were started elsewhere"
            )
        changes = [part.strip() for part in self.options.split(";") if part.strip()]
        recipe = load_recipe(str(path) if is_file else self.recipe, changes)
        return recipe.model_copy(update={"compare": [], "seeds": 1})

    def server_folder(self, recipe: Recipe) -> Path:
        """Where the server's run lies."""
        if self.folder:
            return _absolute("folder", self.folder)
        data = recipe.data.name.rpartition(":")[2].replace("/", "-")
        return cache_folder() / "federated" / "server" / f"{recipe.method}-{data}"

    def memory_folder(self) -> Path:
        """Where this node's clients remember."""
        if self.memory:
            return _absolute("memory", self.memory)
        return cache_folder() / "federated" / "clients"


def _absolute(name: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_absolute():
        raise RecipeError(
            f"run config: {name} '{value}' must be an absolute path: the processes of Flower "
            "were started elsewhere"
        )
    return path


def told_recipe(recipe: Recipe) -> str:
    """A recipe as the server tells it to clients, for comparison."""
    return json.dumps(recipe.model_dump(mode="json", exclude={"data", "output"}), sort_keys=True)


def check_recipe(told: str, own: Recipe) -> None:
    """Refuse to work for a server that follows another recipe.

    Args:
        told: of the server, by `told_recipe`.
        own: of this client; its data may be others.

    Raises:
        RecipeError: names the fields that differ.
    """
    given = {**json.loads(told), "data": own.model_dump(mode="json")["data"]}
    differing = differences(Recipe.model_validate(given), own, free=_OWN)
    if differing:
        raise RecipeError(
            f"the server follows another recipe; different: {', '.join(differing)}. Give both "
            "sides the same file and options"
        )
