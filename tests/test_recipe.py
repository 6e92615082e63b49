"""Recipes: what is accepted, what is refused and in which words, writing back, comparing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from stillhouse.errors import RecipeError
from stillhouse.method import MethodConfig
from stillhouse.recipe import (
    Recipe,
    differences,
    dump_recipe,
    load_recipe,
    settings_of,
)

PLAIN: dict[str, Any] = {
    "method": "kd",
    "data": "digits",
    "teacher": {"model": "stillhouse:mlp", "options": {"widths": [64]}},
    "student": "stillhouse:mlp",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(source: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


# What is accepted


def test_short_forms_are_written_out_and_defaults_resolved() -> None:
    recipe = load_recipe(PLAIN)
    assert recipe.data.name == "digits"
    assert recipe.student is not None
    assert recipe.student.model == "stillhouse:mlp"
    assert recipe.task == "classification"
    assert recipe.compare == ["supervised"]
    assert (recipe.budget.epochs, recipe.budget.steps) == (10, None)


def test_supervised_training_is_not_compared_with_itself() -> None:
    assert load_recipe({**PLAIN, "method": "supervised"}).compare == []


def test_given_comparisons_are_kept() -> None:
    assert load_recipe({**PLAIN, "compare": []}).compare == []


def test_a_methods_own_settings_are_no_settings_of_a_side() -> None:
    assert "stand under `settings`" in refused({**PLAIN, "sides": {"kd": {"alpha": 0.5}}})


def test_dump_reads_back_equal_and_holds_every_field() -> None:
    recipe = load_recipe(PLAIN, ["teacher.store.form=topk", "teacher.train.epochs=2"])
    written = yaml.safe_load(dump_recipe(recipe))
    assert set(written) == set(Recipe.model_fields)
    assert written["hardware"]["precision"] == "32-true"
    again = load_recipe(written)
    assert again == recipe
    assert differences(recipe, again) == []


def test_overrides_take_yaml_values_and_the_last_wins() -> None:
    recipe = load_recipe(
        PLAIN,
        [
            "settings.alpha=1e-1",
            "budget.lr=3",
            "budget.lr=2e-3",
            "student.taps={low: layer1}",
            "data.options.limit=100",
        ],
    )
    assert recipe.settings == {"alpha": 0.1}
    assert recipe.budget.lr == 2e-3
    assert recipe.student is not None
    assert recipe.student.taps == {"low": "layer1"}
    assert recipe.data.options == {"limit": 100}


def test_override_leaves_the_callers_mapping_alone() -> None:
    given = {**PLAIN, "settings": {"alpha": 0.5}}
    load_recipe(given, ["settings.alpha=0.1", "budget.batch=8"])
    assert given == {**PLAIN, "settings": {"alpha": 0.5}}


def test_steps_override_epochs_and_the_other_way_round() -> None:
    by_epochs = load_recipe({**PLAIN, "budget": {"epochs": 3}}, ["budget.steps=7"])
    assert (by_epochs.budget.epochs, by_epochs.budget.steps) == (None, 7)
    by_steps = load_recipe({**PLAIN, "budget": {"steps": 7}}, ["budget.epochs=3"])
    assert (by_steps.budget.epochs, by_steps.budget.steps) == (3, None)


def test_variant_is_spelt_out_and_given_settings_win() -> None:
    recipe = load_recipe({**PLAIN, "variant": "reverse", "settings": {"alpha": 0.3}})
    assert recipe.settings == {"direction": "reverse", "alpha": 0.3}
    kept = load_recipe({**PLAIN, "variant": "reverse", "settings": {"direction": "jsd"}})
    assert kept.settings == {"direction": "jsd"}


def test_anchors_and_merges_are_allowed_and_own_values_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "method: kd\ndata: digits\nteacher:\n  model: stillhouse:mlp\n"
        "  train: &b {epochs: 2, lr: 0.5}\nbudget:\n  <<: *b\n  lr: 0.25\n",
    )
    recipe = load_recipe(path)
    assert (recipe.budget.epochs, recipe.budget.lr) == (2, 0.25)


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    options = "{rate: 1e-3, country: no, day: 2024-01-02, code: 010, big: 10_000, flag: true}"
    recipe = load_recipe(write(tmp_path, f"method: kd\ndata: {{name: digits, options: {options}}}"))
    assert recipe.data.options == {
        "rate": 1e-3,
        "country": "no",
        "day": "2024-01-02",
        "code": 10,
        "big": 10000,
        "flag": True,
    }


def test_a_recipe_as_teacher_takes_over_what_it_leaves_unsaid() -> None:
    recipe = load_recipe(
        {
            **PLAIN,
            "seed": 4,
            "teacher": {"method": "supervised", "student": "stillhouse:mlp"},
        },
        ["teacher.recipe.budget.steps=5"],
    )
    assert recipe.teacher is not None
    assert recipe.teacher.source == "recipe"
    inner = recipe.teacher.recipe
    assert inner is not None
    assert (inner.method, inner.data.name, inner.seed, inner.budget.steps) == (
        "supervised",
        "digits",
        4,
        5,
    )


def test_a_recipe_file_as_teacher(tmp_path: Path) -> None:
    inner = write(tmp_path, "method: supervised\ndata: digits\nstudent: stillhouse:mlp\nseed: 9\n")
    recipe = load_recipe({**PLAIN, "teacher": {"recipe": str(inner)}})
    assert recipe.teacher is not None
    assert recipe.teacher.recipe is not None
    assert recipe.teacher.recipe.seed == 9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (True, {"form": "dense", "path": None}),
        ("runs/store", {"path": "runs/store"}),
        ({"form": "topk", "k": 4}, {"form": "topk", "k": 4, "dtype": "float16"}),
    ],
)
def test_store_forms(given: Any, expected: dict[str, Any]) -> None:
    teacher = load_recipe({**PLAIN, "teacher": {"model": "m", "store": given}}).teacher
    assert teacher is not None
    assert teacher.store is not None
    dumped = teacher.store.model_dump()
    assert {key: dumped[key] for key in expected} == expected


def test_a_store_alone_is_a_teacher() -> None:
    teacher = load_recipe({**PLAIN, "teacher": {"store": "runs/store"}}).teacher
    assert teacher is not None
    assert teacher.source == "store"


# What is refused


def test_every_mistake_is_told_with_its_line_what_is_right_and_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        "# a comment\n"
        "method: kd\n"
        "data: digits\n"
        "student:\n"
        "  modle: stillhouse:mlp\n"
        "budget:\n"
        "  epochs: ten\n"
        "  lr: -1\n"
        "  optimizer: adm\n"
        "hardware: {devices: true}\n"
        "seed: 1.5\n",
    )
    told = refused("mine.yaml").splitlines()
    assert told == [
        "mine.yaml:4: student.model: is missing (timm:ID, hf:ID, torchvision:ID, stillhouse:ID, "
        "package.module:factory or a local folder)",
        "mine.yaml:5: student.modle: unknown field; did you mean 'model'?",
        "mine.yaml:7: budget.epochs: must be a whole number, found the text 'ten'",
        "mine.yaml:8: budget.lr: must be greater than 0.0, found -1",
        "mine.yaml:9: budget.optimizer: must be 'sgd', 'adam' or 'adamw', found the text 'adm'; "
        "did you mean 'adam' or 'adamw'?",
        "mine.yaml:10: hardware.devices: must be a whole number, found true",
        "mine.yaml:11: seed: must be a whole number, found 1.5",
    ]


@pytest.mark.parametrize(
    ("change", "place", "nearest"),
    [
        ({"method": "supervized"}, "method: unknown method 'supervized'", "'supervised'"),
        ({"task": "clasification"}, "task: unknown task 'clasification'", "'classification'"),
        ({"data": "digit"}, "data.name: unknown data set 'digit'", "'digits'"),
        ({"compare": ["supervized"]}, "compare.0: unknown entry 'supervized'", "'supervised'"),
        ({"compare": ["kd/revers"]}, "compare.0: 'kd' has no variant 'revers'", "'reverse'"),
        ({"sides": {"supervized": {}}}, "sides.supervized: unknown entry", "'supervised'"),
        ({"sides": {"kd/revers": {}}}, "sides.kd/revers: 'kd' has no variant", "'reverse'"),
        ({"variant": "revers"}, "variant: 'kd' has no variant 'revers'", "'reverse'"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(
    change: dict[str, Any], place: str, nearest: str
) -> None:
    told = refused({**PLAIN, **change})
    assert place in told
    assert f"did you mean {nearest}" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: kd\nmethod: kd\n", "mine.yaml:2: 'method' is written twice (first in line 1)"),
        ("method: kd\ndata: {name: digits\nseed: 1\n", "mine.yaml:3: not valid YAML"),
        ("method: kd\n\tdata: digits\n", "mine.yaml:2: not valid YAML"),
        ("a: &a [*a]\n", "mine.yaml:1: an anchor refers to itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "mine.yaml:1: not valid YAML"),
        ("method: kd\nseed: .inf\n", "mine.yaml:2: numbers must be finite, found '.inf'"),
        ("", "mine.yaml is empty"),
        ("- kd\n", "mine.yaml: a recipe is a mapping of fields"),
        ("[" * 3000, "mine.yaml: nested too deeply"),
        ("a: \x01\n", "mine.yaml:1: the character '\\x01' is not allowed"),
    ],
)
def test_broken_files_are_told_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    assert words in refused("mine.yaml")


def test_aliases_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "unfolds to too many values" in refused(write(tmp_path, "\n".join(lines)))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"method: \xff\xfe\n")
    assert "not UTF-8" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_also_in_free_fields(value: float) -> None:
    told = refused({**PLAIN, "settings": {"deep": [{"alpha": value}]}})
    assert "settings.deep.0.alpha: numbers must be finite" in told


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({}, "has no source of knowledge; give exactly one of"),
        ({"model": "a", "artifact": "b"}, "gives model and artifact; give exactly one of"),
        ({"store": True}, "a store without a teacher needs the folder of one made before"),
        ({"artifact": "b", "weights": "w"}, "weights belongs to a teacher given as model"),
        ({"model": "a", "train": {"steps": 1, "epochs": 1}}, "both epochs and steps are given"),
        ({"callable": "nonsense"}, "package.module:function"),
        ({"endpoint": {}}, "give exactly one of base_url or serve"),
        ({"endpoint": {"base_url": "host/v1"}}, "http://host:port/v1"),
        ({"endpoint": {"serve": {}}}, "give exactly one of rule, replay, model or encoder"),
    ],
)
def test_a_teacher_has_exactly_one_whole_source(teacher: dict[str, Any], words: str) -> None:
    assert words in refused({**PLAIN, "teacher": teacher})


def test_a_key_in_a_recipe_is_refused_and_not_repeated() -> None:
    secret = "sk-very-secret"
    for field in ("api_key", "key"):
        endpoint = {"base_url": "http://127.0.0.1:1/v1", field: secret}
        told = refused({**PLAIN, "teacher": {"endpoint": endpoint}})
        assert "key_env" in told
        assert secret not in told
    wrong = {"base_url": "http://127.0.0.1:1/v1", "key_env": secret}
    assert "environment variable" in refused({**PLAIN, "teacher": {"endpoint": wrong}})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.epoch=3", "-o budget.epoch=3: budget.epoch: unknown field; did you mean 'epochs'"),
        ("budget.lr=fast", "-o budget.lr=fast: budget.lr: must be a number"),
        ("budget", "an override is written a.b=value"),
        ("=3", "an override is written a.b=value"),
        ("seed.x=3", "-o seed.x=3: seed is 0, which has no fields to set"),
        ("budget.lr=.nan", "-o budget.lr=.nan: numbers must be finite"),
        ("compare.5=kd", "'5' is no position in a list of 1"),
    ],
)
def test_bad_overrides_are_named(override: str, words: str) -> None:
    assert words in refused({**PLAIN, "seed": 0, "compare": ["kd"]}, override)


def test_files_and_ids_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path, "method: kd\n")
    assert "did you mean 'mine.yaml'" in refused(tmp_path / "mein.yaml")
    assert "is a folder" in refused(tmp_path)
    assert "did you mean 'supervised'" in refused("supervized")


def test_missing_fields_say_what_they_are() -> None:
    assert "data: is missing (data set, by name)" in refused({"method": "kd"})


class Config(MethodConfig):
    """Settings of no method."""

    alpha: float = Field(0.5, ge=0, le=1, description="a weight")


def test_settings_are_checked_with_the_recipes_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "method: kd\ndata: digits\nsettings:\n  alpha: 2\n  alhpa: 1\n")
    with pytest.raises(RecipeError) as caught:
        settings_of(load_recipe("mine.yaml"), Config)
    assert str(caught.value).splitlines() == [
        "mine.yaml:4: settings.alpha: must be at most 1.0, found 2",
        "mine.yaml:5: settings.alhpa: unknown field; did you mean 'alpha'?",
    ]


def test_others_can_refuse_a_field_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "method: kd\ndata: digits\nstudent:\n  model: x\n  taps: {low: nowhere}\n")
    recipe = load_recipe("mine.yaml", ["seed=3"])
    told = str(recipe.refusal("student.taps.low", "there is no such module"))
    assert told == "mine.yaml:5: student.taps.low: there is no such module"
    assert recipe.where("seed") == "-o seed=3"


# Comparing


def test_differences_name_fields_and_leave_out_what_changes_nothing() -> None:
    old = load_recipe(PLAIN)
    new = load_recipe(
        PLAIN,
        ["budget.lr=1", "settings.alpha=0.1", "output.keep=5", "hardware.workers=2", "seed=1"],
    )
    assert differences(old, new) == ["budget.lr", "seed", "settings.alpha"]
    assert "output.keep" in differences(old, new, free=())
    gone = load_recipe({k: v for k, v in PLAIN.items() if k != "teacher"})
    assert differences(old, gone) == ["teacher"]


def test_where_a_value_stood_is_no_difference(tmp_path: Path) -> None:
    path = write(tmp_path, dump_recipe(load_recipe(PLAIN)))
    assert load_recipe(path) == load_recipe(PLAIN)


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; from stillhouse.recipe import load_recipe; "
        "load_recipe({'method': 'kd', 'data': 'digits'}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_teacher_may_be_trained_on_data_of_its_own(tmp_path):
    """It is normalised by that data, and another data set makes another teacher."""
    from stillhouse.launch import open_job

    def opened(folder, options):
        spec = {
            "method": "kd",
            "data": {"name": "digits", "options": {"subset": 200, "image_size": 12}},
            "teacher": {
                "model": "stillhouse:small_cnn",
                "options": {"widths": [4]},
                "train": {"steps": 2, "batch": 8, "data": {"name": "digits", "options": options}},
            },
            "student": "stillhouse:small_cnn",
        }
        return open_job(load_recipe(spec), tmp_path / folder)

    job = opened("a", {"canvas": 16, "val": 0})
    teacher = job.teacher()
    own = job.task.about["mean"]
    assert teacher.net.mean.item() != pytest.approx(own[0], abs=1e-3)
    assert len(list((job.cache / "shared").glob("teacher-*"))) == 1
    opened("b", {"canvas": 20, "val": 0}).teacher()
    opened("c", {"canvas": 16, "val": 0}).teacher()
    assert len(list((job.cache / "shared").glob("teacher-*"))) == 2


def test_bad_data_of_a_teacher_is_told():
    spec = {"method": "kd", "data": "digits", "student": "stillhouse:small_cnn"}
    teacher = {"model": "stillhouse:small_cnn", "train": {"data": "digts"}}
    with pytest.raises(RecipeError, match=r"teacher.train.data.name: unknown data set 'digts'"):
        load_recipe({**spec, "teacher": teacher})
