"""`run`, `report`, `infer`, `bench`: real small runs, and what is refused before any training."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stillhouse.cli.infer import split_options
from stillhouse.errors import RecipeError
from stillhouse.recipe_models import KNOWS_NOTHING


def test_a_run_leaves_artifact_and_report_and_is_not_run_twice(call, small: Path) -> None:
    done = call("run", str(small), "--folder", "r")
    assert done.code == 0, done.err
    for name in ("artifact/artifact.json", "report.html", "run.json", "recipe.yaml", "log.jsonl"):
        assert Path("r", name).is_file()
    assert "accuracy" in done.out
    assert f"artifact: {Path('r', 'artifact')}" in done.out
    first = json.loads(Path("r/run.json").read_text())["sides"]
    again = call("run", str(small), "--folder", "r", "--json")
    assert again.code == 0, again.err
    told = json.loads(again.out)
    assert told["folder"] == "r"
    assert told["sides"]["distilled"]["0"]["accuracy"] == first["distilled"]["0"]["accuracy"]
    from_its_recipe = call("run", "r/recipe.yaml", "--folder", "r", "--json")
    assert from_its_recipe.code == 0, from_its_recipe.err

    report = call("report", "r")
    assert report.code == 0
    assert "accuracy" in report.out
    assert json.loads(call("report", "r", "--json").out)["method"] == "kd"


def test_a_changed_recipe_is_refused_with_its_fields_unless_told_to_redo(call, small: Path) -> None:
    assert call("run", str(small), "--folder", "r").code == 0
    refused = call("run", str(small), "--folder", "r", "-o", "budget.lr=0.5", "--seed", "3")
    assert refused.code == 1
    assert "changed: budget.lr, seed" in refused.err
    assert "--redo" in refused.err
    kept = call("run", str(small), "--folder", "r", "-o", "output.log_every=1")
    assert kept.code == 0, kept.err
    redone = call("run", str(small), "--folder", "r", "-o", "budget.lr=0.5", "--redo", "student")
    assert redone.code == 0, redone.err


def test_a_folder_in_use_is_refused(call, small: Path, tmp_path: Path) -> None:
    holder = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from stillhouse.engine.job import locked
        with locked(Path("r/run.lock")):
            print("held", flush=True)
            sys.stdin.read()
        """
    )
    Path("r").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", holder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = call("run", str(small), "--folder", "r")
    finally:
        other.communicate("")
    assert done.code == 1
    assert "in use" in done.err


def test_a_dry_run_shows_the_plan_and_does_nothing(call, small: Path) -> None:
    done = call("run", str(small), "--dry-run", "--devices", "1")
    assert done.code == 0, done.err
    for words in ("edition", "parameters", "student (train)", "steps", "optimizer: adamw"):
        assert words in done.out
    assert not Path("runs").exists()
    told = json.loads(call("run", str(small), "--dry-run", "--json").out)
    assert told["plan"]["steps"] == 4
    assert told["recipe"]["budget"]["epochs"] is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method=supervized", "unknown method 'supervized'; did you mean 'supervised'"),
        ("task=clasification", "unknown task 'clasification'; did you mean 'classification'"),
        ("data.name=generatd", "unknown data set 'generatd'; did you mean 'generated'"),
        ("budget.stepz=3", "budget.stepz: unknown field; did you mean 'steps'"),
        ("settings.temprature=3", "settings.temprature: unknown field; did you mean 'temperature'"),
        ("settings.alpha=2", "settings.alpha: must be at most 1.0, found 2"),
        ("student.model=stillhouse:mpl", "no model is called 'stillhouse:mpl'; did you mean 'mlp'"),
        ("student.options.width=[3]", "has no option 'width'; did you mean 'widths'"),
        ("student.options.classes=3", "has 3 outputs"),
        ("student.taps.low=layerz.0", "names the module 'layerz.0'"),
        ("teacher=null", "needs a teacher and the recipe names none"),
        ("student=null", "names no student"),
        ("hardware.accelerator=quantum", "quantum"),
        ("data.options.kid=x", "'kid'"),
    ],
)
def test_what_cannot_be_is_told_before_any_training(
    call, small: Path, override: str, words: str
) -> None:
    done = call("run", str(small), "-o", override, "--folder", "r")
    assert done.code == 1
    assert words in done.err
    told = done.err.removeprefix(f"warning: {KNOWS_NOTHING.format(model='stillhouse:mlp')}\n")
    assert told.startswith("error: ")
    assert not list(Path().glob("r/stages/*/finished.state"))


def test_a_run_that_failed_before_its_first_stage_leaves_the_folder_free(call, small: Path) -> None:
    assert call("run", str(small), "-o", "data.options.kid=x", "--folder", "r").code == 1
    done = call("run", str(small), "--folder", "r")
    assert done.code == 0, done.err


def test_mistakes_in_the_file_are_told_with_their_lines(call, small: Path) -> None:
    text = small.read_text().replace("steps: 4", "steps: four").replace("widths:", "widths: ", 1)
    small.write_text(text)
    line = 1 + next(i for i, t in enumerate(text.splitlines()) if "four" in t)
    done = call("run", "small.yaml")
    assert done.code == 1
    told = (
        f"error: small.yaml:{line}: budget.steps: must be a whole number, found the text 'four'\n"
    )
    assert done.err == told


def test_missing_data_says_where_it_was_looked_for(call, small: Path) -> None:
    done = call("run", str(small), "-o", "data={name: set5}", "-o", "task=super-resolution")
    assert done.code == 1
    assert "STILLHOUSE_DATA" in done.err
    assert "how to get it" in done.err


def test_infer_reads_options_and_refuses_what_it_does_not_know(call, small: Path) -> None:
    import numpy as np

    assert call("run", str(small), "--folder", "r").code == 0
    plan = json.loads(call("run", str(small), "--dry-run", "--json").out)["plan"]
    size = plan["data"]["input"]
    np.save("one.npy", np.zeros(size, dtype="float32"))
    done = call("infer", "r", "one.npy", "-o", "out.jsonl", "-o", "top=2")
    assert done.code == 0, done.err
    row = json.loads(Path("out.jsonl").read_text())
    assert len(row["top"]) == 2
    shown = call("infer", "r", "one.npy")
    assert json.loads(shown.out.splitlines()[0])["class"] == row["class"]
    wrong = call("infer", "r", "one.npy", "-o", "tpo=2")
    assert wrong.code == 1
    assert "unknown option 'tpo'; did you mean 'top'" in wrong.err
    assert "there is no input nothing.npy" in call("infer", "r", "nothing.npy").err
    Path("empty").mkdir()
    assert "is not an artifact" in call("infer", "empty", "one.npy").err
    weights = Path("r/artifact/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-20])
    damaged = call("infer", "r", "one.npy")
    assert damaged.code == 1
    assert "damaged" in damaged.err


def test_outputs_and_options_share_one_letter() -> None:
    output, options = split_options(["out=put/x.jsonl", "top=2", "name=a b"][1:])
    assert (output, options) == (None, {"top": 2, "name": "a b"})
    assert split_options(["folder/x.jsonl", "top=2"]) == (Path("folder/x.jsonl"), {"top": 2})
    assert split_options(["./a=b.jsonl"])[0] == Path("a=b.jsonl")
    with pytest.raises(RecipeError, match="two outputs"):
        split_options(["a", "b"])
    with pytest.raises(RecipeError, match="'top' is given twice"):
        split_options(["top=1", "top=2"])


def test_a_report_of_what_is_no_run_is_refused(call) -> None:
    assert "there is no run folder nowhere" in call("report", "nowhere").err
    Path("r").mkdir()
    assert "no run folder" in call("report", "r").err
    Path("r/recipe.yaml").write_text("method: kd\n")
    told = call("report", "r")
    assert told.code == 1
    assert "not finished" in told.err
    assert "stillhouse run" in told.err


def test_bench_refuses_unknown_names(call) -> None:
    done = call("bench", "supervized")
    assert done.code == 1
    assert "did you mean 'supervised'" in done.err
    unknown = call("bench", "kd", "--sides", "supervized", "--recipe", "quickstart")
    assert unknown.code == 1
    assert "unknown side 'supervized'; did you mean 'supervised'" in unknown.err


def test_bench_records_results(call, small: Path) -> None:
    done = call(
        "bench", "kd", "--seeds", "1", "--sides", "supervised", "--recipe", str(small),
        "--folder", "b", "--results", "results", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert set(told["sides"]) == {"kd", "supervised"}
    assert json.loads(Path("results/kd.json").read_text())["seeds"] == [0]


def test_export_of_a_run(call, small: Path) -> None:
    assert call("run", str(small), "--folder", "r").code == 0
    done = call("export", "r", "--to", "torch", "--json")
    assert done.code == 0, done.err
    assert "model.safetensors" in json.loads(done.out)["files"]
    refused = call("export", "r", "--to", "hf")
    assert refused.code == 1
    assert "needs a Hugging Face model" in refused.err
    shapeless = call("export", "r", "--to", "torch", "--shape", "3,wide")
    assert "--shape 3,wide: sizes are whole numbers" in shapeless.err
