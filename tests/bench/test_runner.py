from __future__ import annotations

import sys

import pytest

from stillhouse import catalogue
from stillhouse.bench import results as recorded
from stillhouse.bench import runner
from stillhouse.bench.runner import run, side_names
from stillhouse.errors import CheckpointError, RecipeError, TrainingError
from stillhouse.launch import side_recipe
from stillhouse.method import Claim
from stillhouse.recipe import load_recipe

SOURCE = '''
from stillhouse.method import Card, Claim, Method, MethodConfig, Variant

class Toy(Method):
    """A toy."""
    card = Card(id="bench-toy", title="Toy", summary="For tests.", needs=("logits",))
    variants = {"plain": Variant(set={})}
    claims = [
        Claim("beats the other", "accuracy", "bench-toy", "bench-other"),
        Claim("the variant matters", "accuracy", "bench-toy", "bench-toy/plain", "higher", 0.5),
    ]
    class Config(MethodConfig):
        x: int = 0

class Other(Method):
    class Config(MethodConfig):
        y: int = 0

    card = Card(id="bench-other", title="Other", summary="For tests.", kind="baseline")
'''

RECIPE = {"method": "bench-toy", "data": {"name": "package.module:data"}, "compare": []}
DATA = [{"name": "toy", "edition": "toy (a copy)", "hash": "abc"}]
SKILL = {"bench-toy": 0.9, "bench-other": 0.8, "bench-toy/plain": 0.7, "teacher": 0.95}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Two catalogue entries that lie in a file of their own, which may be edited."""
    file = tmp_path / "package" / "bench_toy_methods.py"
    file.parent.mkdir()
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(file.parent))

    def entry(name, kind, variants):
        card = {"id": name, "kind": kind, "needs": ["logits"], "task": "classification"}
        found = {"bench-toy": "Toy", "bench-other": "Other"}[name]
        return catalogue.Entry(name, file.stem, found, str(file), card, variants=variants)

    found = {
        "bench-toy": entry("bench-toy", "method", {"plain": {"set": {}}}),
        "bench-other": entry("bench-other", "baseline", {}),
    }
    monkeypatch.setattr(catalogue, "scan", lambda: catalogue.Found(found))
    monkeypatch.setattr(runner, "surroundings", lambda recipe: (DATA, {"torch": "2"}, "cpu"))
    monkeypatch.chdir(tmp_path)
    yield file
    sys.modules.pop("bench_toy_methods", None)


class Runs:
    """Stands for `launch.run_side`: figures by side and seed, with a count of calls."""

    def __init__(self, seconds=300.0, fail_at=None):
        self.seconds, self.fail_at, self.calls = seconds, fail_at, []

    def __call__(self, recipe, side, seed, folder):
        if self.fail_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((side, seed))
        folder.mkdir(parents=True, exist_ok=True)
        wobble = 0.01 * ((seed * 7) % 3)
        return {"accuracy": SKILL[side] + wobble, "seconds": self.seconds, "peak_mb": 10.0}


def quiet(_):
    pass


def test_a_whole_bench(toy, tmp_path, capsys):
    runs = Runs()
    said = []
    results = run("bench-toy", seeds=3, recipe=RECIPE, run_side=runs, say=said.append)
    assert set(results.sides) == {"bench-toy", "bench-other", "bench-toy/plain"}
    # seeds are the outer loop
    assert [seed for _, seed in runs.calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    beats, matters = results.claims
    assert beats["verdict"] == "supported"
    assert beats["difference"] == pytest.approx(0.1)
    assert matters["verdict"] == "not supported"
    assert results.data == DATA
    assert results.versions == {"torch": "2"}
    assert results.hardware == "cpu"
    assert results.file_hash == recorded.file_hash(toy)
    assert recorded.read(tmp_path / "results" / "bench-toy.json") == results
    assert any("seed 2 · bench-other" in line for line in said)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("killed_at", range(9))
def test_killed_anywhere_it_goes_on_and_ends_equal(toy, tmp_path, killed_at):
    whole = run(
        "bench-toy",
        seeds=3,
        recipe=RECIPE,
        run_side=Runs(),
        say=quiet,
        folder="a",
        results_folder="ra",
    )
    first, second = Runs(fail_at=killed_at), Runs()
    with pytest.raises(KeyboardInterrupt):
        run("bench-toy", seeds=3, recipe=RECIPE, run_side=first, say=quiet, folder="b")
    if killed_at:
        half = recorded.read(tmp_path / "results" / "bench-toy.json")
        assert sum(len(runs) for runs in half.sides.values()) == killed_at
        assert half.claims[1]["verdict"] == "inconclusive"  # its variant comes last
    results = run("bench-toy", seeds=3, recipe=RECIPE, run_side=second, say=quiet, folder="b")
    assert len(first.calls) + len(second.calls) == 9
    assert not set(first.calls) & set(second.calls)
    assert results.sides == whole.sides
    assert results.claims == whole.claims
    assert results.note == ""


def test_a_finished_bench_runs_nothing(toy):
    run("bench-toy", seeds=2, recipe=RECIPE, run_side=Runs(), say=quiet)
    again = Runs()
    run("bench-toy", seeds=2, recipe=RECIPE, run_side=again, say=quiet)
    assert again.calls == []


def test_five_seeds_where_a_side_is_fast(toy):
    results = run("bench-toy", recipe=RECIPE, run_side=Runs(seconds=10.0), say=quiet)
    assert results.seeds == [0, 1, 2, 3, 4]
    assert results.claims[0]["verdict"] == "supported"
    slow = run(
        "bench-toy",
        recipe=RECIPE,
        run_side=Runs(seconds=200.0),
        say=quiet,
        folder="slow",
        results_folder="slow-results",
    )
    assert slow.seeds == [0, 1, 2]
    asked = run(
        "bench-toy",
        seeds=3,
        recipe=RECIPE,
        run_side=Runs(seconds=10.0),
        say=quiet,
        folder="asked",
        results_folder="asked-results",
    )
    assert asked.seeds == [0, 1, 2]
    assert "asks for 5" in asked.claims[0]["reason"]


def test_an_edited_method_file_starts_its_own_sides_anew(toy):
    run("bench-toy", seeds=2, recipe=RECIPE, run_side=Runs(), say=quiet)
    toy.write_text(SOURCE + "\n# edited\n")
    again = Runs()
    results = run("bench-toy", seeds=2, recipe=RECIPE, run_side=again, say=quiet)
    assert len(again.calls) == 6  # all sides lie in the edited file
    assert results.file_hash == recorded.file_hash(toy)


def test_other_settings_rerun_the_method_and_not_its_baselines(toy):
    run("bench-toy", seeds=2, recipe=RECIPE, run_side=Runs(), say=quiet)
    again = Runs()
    tuned = {**RECIPE, "settings": {"x": 1}}
    run("bench-toy", seeds=2, recipe=tuned, run_side=again, say=quiet)
    assert {side for side, _ in again.calls} == {"bench-toy", "bench-toy/plain"}


def test_settings_of_a_side_rerun_that_side_alone(toy):
    run("bench-toy", seeds=2, recipe=RECIPE, run_side=Runs(), say=quiet)
    again = Runs()
    tuned = {**RECIPE, "sides": {"bench-other": {"y": 1}}}
    run("bench-toy", seeds=2, recipe=tuned, run_side=again, say=quiet)
    assert {side for side, _ in again.calls} == {"bench-other"}


def test_settings_of_a_side_win_over_its_variant_and_over_shared_ones():
    example = catalogue.load("kd").example(0)
    settings = {**example.get("settings", {}), "temperature": 2.0}
    tuned = {"kd/jsd": {"temperature": 7.0}}
    recipe = load_recipe({**example, "settings": settings, "sides": tuned})
    assert side_recipe(recipe, "kd/jsd", 0).settings["temperature"] == 7.0
    assert side_recipe(recipe, "kd/reverse", 0).settings["temperature"] == 2.0


def test_a_wrong_setting_of_a_side_is_told_before_anything_runs(toy):
    runs = Runs()
    tuned = {**RECIPE, "sides": {"bench-other": {"z": 1}}}
    with pytest.raises(RecipeError, match=r"sides\.bench-other\.z"):
        run("bench-toy", seeds=1, recipe=tuned, run_side=runs, say=quiet)
    assert runs.calls == []


def test_chosen_sides(toy):
    runs = Runs()
    results = run(
        "bench-toy", seeds=1, sides=["/plain", "teacher"], recipe=RECIPE, run_side=runs, say=quiet
    )
    assert list(results.sides) == ["bench-toy", "bench-toy/plain", "teacher"]
    assert "was not run" in results.claims[0]["reason"]
    assert (
        results.command == "stillhouse bench bench-toy --seeds 1 --sides /plain,teacher "
        "--recipe RECIPE.yaml"
    )


def test_unknown_names_are_told_before_anything_runs(toy):
    runs = Runs()
    for sides, match in (
        (["bench-othr"], "bench-other"),
        (["bench-toy/plan"], "plain"),
        (["/plan"], "plain"),
    ):
        with pytest.raises(RecipeError, match=match):
            run("bench-toy", sides=sides, recipe=RECIPE, run_side=runs, say=quiet)
    with pytest.raises(RecipeError, match="one seed"):
        run("bench-toy", seeds=0, recipe=RECIPE, run_side=runs, say=quiet)
    with pytest.raises(RecipeError, match="bench-other"):
        run("bench-other", recipe=RECIPE, run_side=runs, say=quiet)
    assert runs.calls == []


def test_sides_of_claims_come_once_and_the_method_first(toy):
    claims = [Claim("a", "m", "bench-other", "bench-toy"), Claim("b", "m", "bench-toy", "teacher")]
    assert side_names("bench-toy", claims, None) == ["bench-toy", "bench-other", "teacher"]


def test_an_error_names_the_side_and_seed(toy):
    def fails(recipe, side, seed, folder):
        raise TrainingError("the term 'task' is nan")

    with pytest.raises(TrainingError, match=r"seed 0 · bench-toy .*the term 'task' is nan"):
        run("bench-toy", recipe=RECIPE, run_side=fails, say=quiet)


def test_a_damaged_score_is_told(toy, tmp_path):
    run("bench-toy", seeds=1, recipe=RECIPE, run_side=Runs(), say=quiet)
    (score, *_) = (tmp_path / "runs" / "bench" / "bench-toy").glob("bench-toy-*/seed-0/score.json")
    score.write_text('{"stamp": ')
    with pytest.raises(CheckpointError, match=r"score\.json.*remove it"):
        run("bench-toy", seeds=1, recipe=RECIPE, run_side=Runs(), say=quiet)


def test_a_real_bench_on_generated_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = catalogue.load("kd").example(0)
    recipe["budget"]["validate_every"] = 2
    found = run("kd", seeds=2, sides=["supervised", "kd/jsd", "teacher"], recipe=recipe, say=quiet)
    assert {side: sorted(seeds) for side, seeds in found.sides.items()} == {
        "kd": ["0", "1"], "supervised": ["0", "1"], "kd/jsd": ["0", "1"], "teacher": ["0", "1"],
    }  # fmt: skip
    for seeds in found.sides.values():
        for figures in seeds.values():
            assert 0 <= figures["accuracy"] <= 1
            assert figures["seconds"] >= 0
    assert "simulated" in found.data[0]["edition"]
    assert found.versions["torch"]
    assert "cpu" in found.hardware or "cuda" in found.hardware
    beats_alone, beats_smoothing = found.claims
    assert beats_alone["seeds"] == 2
    assert "asks for 5" in beats_alone["reason"]
    assert "'label-smoothing' was not run" in beats_smoothing["reason"]
    again = run(
        "kd", seeds=2, sides=["supervised", "kd/jsd", "teacher"], recipe=recipe, say=quiet,
        run_side=Runs(fail_at=0),
    )  # fmt: skip
    assert again.sides == found.sides
