"""What a Flower run and its nodes are told, and what is said of mistakes; Flower is not needed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from stillhouse.errors import RecipeError
from stillhouse.federated.settings import Settings, check_recipe, told_recipe
from stillhouse.recipe import load_recipe
from stillhouse.writing import file_name

APP = Path(__file__).resolve().parents[2] / "examples" / "federated" / "pyproject.toml"


def settings(**given):
    return Settings.of({"recipe": "quickstart", **given}, {})


def test_the_ready_app_names_every_setting_and_nothing_else():
    told = tomllib.loads(APP.read_text())["tool"]["flwr"]["app"]["config"]
    assert told.keys() == Settings.__annotations__.keys()
    assert Settings.of(told, {}) == Settings(recipe="fedlgd")


def test_a_node_has_its_own_recipe_and_disk():
    node = {"memory": "/disk", "recipe": "/own.yaml", "client": "a", "partition-id": 3}
    found = Settings.of({"recipe": "quickstart", "timeout": 5}, node)
    assert (found.recipe, found.memory, found.timeout) == ("/own.yaml", "/disk", 5)
    assert found.memory_folder() == Path("/disk")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"recipies": "x"}, "no setting 'recipies'; did you mean 'recipe'"),
        ({"timeout": "long"}, "timeout must be a float"),
        ({"timeout": True}, "timeout must be a float"),
        ({"folder": 3}, "folder must be a str"),
        ({"recipe": ""}, "no recipe"),
    ],
)
def test_wrong_settings_are_told(given, told):
    with pytest.raises(RecipeError, match=told):
        settings(**given)


def test_paths_do_not_depend_on_where_a_process_was_started():
    for wrong in ("mine.yaml", "./mine", "runs/mine.yml"):
        with pytest.raises(RecipeError, match="absolute path"):
            settings(recipe=wrong).opened()
    with pytest.raises(RecipeError, match="folder 'runs' must be an absolute path"):
        settings(folder="runs").server_folder(load_recipe("quickstart"))
    with pytest.raises(RecipeError, match="memory 'm' must be an absolute path"):
        settings(memory="m").memory_folder()


def test_options_change_the_recipe_and_comparisons_are_left_out():
    recipe = settings(options="budget.lr=0.5; student.options.widths=[4, 8];").opened()
    assert recipe.budget.lr == 0.5
    assert recipe.student.options["widths"] == [4, 8]
    assert recipe.compare == []
    assert recipe.seeds == 1


def test_default_folders_are_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))
    server = settings().server_folder(load_recipe("quickstart"))
    assert tmp_path in server.parents
    assert settings().memory_folder() not in {server, *server.parents}


def test_a_client_refuses_a_server_with_another_recipe():
    told = told_recipe(load_recipe("quickstart"))
    check_recipe(told, load_recipe("quickstart"))
    elsewhere = ["data.options.val=0.2", "hardware.threads=3", "output.keep=5", "compare=[]"]
    check_recipe(told, load_recipe("quickstart", elsewhere))
    with pytest.raises(RecipeError, match=r"different: budget\.lr, seed"):
        check_recipe(told, load_recipe("quickstart", ["seed=7", "budget.lr=0.7"]))


def test_file_names_stand_for_one_name_each():
    names = ["a", "a/b", "a_b", "a b", "..", ".", "", "A" * 60, "A" * 61, "A" * 62, "ä"]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(name == Path(name).name and not name.startswith(".") for name in made)
    assert file_name("client-1") == "client-1"
